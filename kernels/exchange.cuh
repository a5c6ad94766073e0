// What the kernels of an exchange share on the device.
#ifndef BALLAST_KERNELS_EXCHANGE_CUH_
#define BALLAST_KERNELS_EXCHANGE_CUH_

#include "kernels/device.cuh"
#include "kernels/exchange.h"

namespace ballast::cuda {

// A kernel's share of the blocks of its rank: all of a launch, or part of one that runs many ranks.
struct Part {
  int index, count;
};
__device__ inline Part WholeGrid() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};
}

template <typename T>
__device__ T* InArena(const Exchange& x, int rank, size_t offset) {
  return reinterpret_cast<T*>(x.arena[rank] + offset);
}

__device__ inline int PlaceOf(const int32_t* place, int rank) {
  return place == nullptr ? rank : place[rank];
}

// The flag that says about `source` what it says, in the arena of `rank`.
__device__ inline uint32_t* FlagOf(const Exchange& x, int rank, Flag flag, int source) {
  const size_t line = static_cast<size_t>(flag) * x.shape.places() + PlaceOf(x.place, source);
  return InArena<uint32_t>(x, rank, x.shape.flags_offset() + line * ArenaShape::kFlagBytes);
}

__device__ inline void Report(uint32_t* status, ExchangeCode code, int rank) {
  atomicCAS(status, 0u, StatusWord(code, rank));
}
// By all threads of a block, which get one answer.
__device__ inline bool HasFailed(const uint32_t* status) {
  return __syncthreads_or(threadIdx.x == 0 && LoadAcquire(status) != 0) != 0;
}

// By all threads of one block: tells every rank that this one is so far. What the block's threads
// stored before, and what they saw others store, the ranks see when they see the flag.
__device__ inline void RaiseFlag(const Exchange& x, Flag flag) {
  __syncthreads();
  const uint32_t number = x.state->number;
  for (int r = static_cast<int>(threadIdx.x); r < x.shape.num_ranks; r += blockDim.x) {
    StoreRelease(FlagOf(x, r, flag, x.rank), number);
  }
}

// By all threads of a block: waits until every rank has raised the flag. Returns whether all have;
// else the status says what was missed, or what had failed before.
__device__ inline bool AwaitFlags(const Exchange& x, Flag flag, ExchangeCode late) {
  const uint64_t begin = NanosecondsNow();
  const uint32_t number = x.state->number;
  bool missed = false;
  for (int r = static_cast<int>(threadIdx.x); r < x.shape.num_ranks; r += blockDim.x) {
    const uint32_t* at = FlagOf(x, x.rank, flag, r);
    // Numbers go round; the difference tells before from after.
    while (static_cast<int32_t>(LoadAcquire(at) - number) < 0 && !missed) {
      if (NanosecondsNow() - begin < x.deadline_ns && LoadAcquire(&x.state->status) == 0) continue;
      Report(&x.state->status, late, r);
      missed = true;
    }
  }
  return __syncthreads_or(missed) == 0;
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_EXCHANGE_CUH_
