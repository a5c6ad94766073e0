// Dispatch, expand and combine: who moves which row, and when (how: row_moves.cuh).
#include "base/status.h"
#include "kernels/exchange.cuh"
#include "kernels/exchange.h"
#include "kernels/row_moves.cuh"

namespace ballast::cuda {
namespace {

constexpr int kThreads = kRowThreads;

// ---- device functions -------------------------------------------------------------------------

struct RowTargets {
  std::byte* to[kMostChoices];
  int count;
};

// Tells every rank which rows the copies of token t have there.
__device__ void PublishRows(const DispatchArgs& a, const Exchange& x, int t) {
  const ArenaShape& shape = x.shape;
  const size_t first = static_cast<size_t>(t) * shape.top_k;
  const size_t own = static_cast<size_t>(PlaceOf(x.place, x.rank));
  const size_t slot = (own * shape.max_tokens + t) * shape.top_k;
  const int entries = shape.num_ranks * shape.top_k;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const int rank = i / shape.top_k, k = i % shape.top_k;
    int32_t* rows = InArena<int32_t>(x, rank, shape.row_of_copy_offset());
    StorePeer(&rows[slot + k], a.copy_rank[first + k] == rank ? a.copy_row[first + k] : -1);
  }
}

__device__ void DispatchRows(const DispatchArgs& a, const Exchange& x, Part part,
                             RowTargets& targets) {
  const ArenaShape& shape = x.shape;
  for (int t = part.index; t < a.num_tokens; t += part.count) {
    __syncthreads();  // the targets of the token before are read
    if (threadIdx.x < kWarp) {
      const int k = static_cast<int>(threadIdx.x);
      const int rank =
          k < shape.top_k ? a.copy_rank[static_cast<size_t>(t) * shape.top_k + k] : -1 - k;
      const unsigned same = __match_any_sync(kFullWarp, rank);
      const bool first = rank >= 0 && rank != x.rank && __ffs(static_cast<int>(same)) - 1 == k;
      const unsigned firsts = __ballot_sync(kFullWarp, first);
      if (first) {
        const size_t own = static_cast<size_t>(PlaceOf(x.place, x.rank));
        const size_t slot = own * shape.max_tokens + t;
        targets.to[__popc(firsts & LanesBelow(k))] = InArena<std::byte>(
            x, rank, shape.rows_offset() + slot * static_cast<size_t>(shape.row_bytes));
      }
      if (k == 0) targets.count = __popc(firsts);
    }
    __syncthreads();
    PublishRows(a, x, t);
    CopyRow<true>(a.x + static_cast<size_t>(t) * shape.row_bytes, targets.to, targets.count,
                  shape.row_bytes);
  }
}

// The last block of the rank tells the others that all rows are there.
__device__ void EndDispatch(const DispatchArgs& a, const Exchange& x, Part part, int& ticket) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();  // what this block stored, before it is counted
    ticket = atomicAdd(&x.state->blocks_done, 1);
    __threadfence_system();  // and what those counted before have stored, before what follows
  }
  __syncthreads();
  if (ticket != part.count - 1) return;
  if (threadIdx.x == 0) x.state->blocks_done = 0;
  for (int r = static_cast<int>(threadIdx.x); r < x.shape.num_ranks; r += kThreads) {
    int32_t* num_tokens = InArena<int32_t>(x, r, x.shape.tokens_offset());
    StorePeer(&num_tokens[PlaceOf(x.place, x.rank)], a.num_tokens);
  }
  RaiseFlag(x, Flag::kRows);
}

__device__ void ExpandRows(const ExpandArgs& a, const Exchange& x, Part part, RowTargets& targets) {
  const ArenaShape& shape = x.shape;
  const int32_t* row_of_copy = InArena<int32_t>(x, x.rank, shape.row_of_copy_offset());
  const int32_t* num_tokens = InArena<int32_t>(x, x.rank, shape.tokens_offset());
  int before = 0;  // tokens of earlier sources: the blocks take turns over all of them
  for (int source = 0; source < shape.num_ranks; ++source) {
    const int place = PlaceOf(x.place, source);
    const int tokens = LoadPeer(&num_tokens[place]);
    const std::byte* rows =
        source == x.rank ? a.own
                         : InArena<std::byte>(x, x.rank, shape.rows_offset()) +
                               static_cast<size_t>(place) * shape.max_tokens * shape.row_bytes;
    const int begin = (part.index - before % part.count + part.count) % part.count;
    before += tokens;
    for (int t = begin; t < tokens; t += part.count) {
      const size_t slot = static_cast<size_t>(place) * shape.max_tokens + t;
      __syncthreads();  // the targets of the token before are read
      if (threadIdx.x < kWarp) {
        const int k = static_cast<int>(threadIdx.x);
        const int row = k < shape.top_k ? LoadPeer(&row_of_copy[slot * shape.top_k + k]) : -1;
        const unsigned here = __ballot_sync(kFullWarp, row >= 0);
        if (row >= 0) {
          targets.to[__popc(here & LanesBelow(k))] =
              a.x + static_cast<size_t>(row) * shape.row_bytes;
        }
        if (k == 0) targets.count = __popc(here);
      }
      __syncthreads();
      if (targets.count == 0) continue;
      CopyRow<false>(rows + static_cast<size_t>(t) * shape.row_bytes, targets.to, targets.count,
                     shape.row_bytes);
    }
  }
}

template <typename T>
__device__ void CombineRows(const PullCombineArgs& a, const Exchange& x, Part part,
                            Results& results) {
  const ArenaShape& shape = x.shape;
  const int vectors = shape.row_bytes / 16;
  for (int t = part.index; t < a.num_tokens; t += part.count) {
    __syncthreads();  // the results of the token before are read
    const int k = static_cast<int>(threadIdx.x);
    if (k < shape.top_k) {
      const size_t copy = static_cast<size_t>(t) * shape.top_k + k;
      results.weight[k] = a.weights[copy];
      results.row[k] = InArena<std::byte>(x, a.copy_rank[copy], shape.results_offset()) +
                       static_cast<size_t>(a.copy_row[copy]) * shape.row_bytes;
    }
    __syncthreads();
    const size_t first = static_cast<size_t>(t) * vectors * Vector<T>::kSize;
    AddResults<T>(results, shape.top_k, vectors, a.base + first, a.out + first);
  }
}

// Tells all that this rank's results are there: the kernels before this one made them. The first
// block to run does it: all wait for it, so it must be one that surely runs.
__device__ void AnnounceResults(const Exchange& x, int& ticket) {
  if (threadIdx.x == 0) {
    ticket = atomicAdd(&x.state->blocks_begun, 1);
    if (ticket == static_cast<int>(gridDim.x) - 1) x.state->blocks_begun = 0;
  }
  __syncthreads();
  if (ticket == 0) RaiseFlag(x, Flag::kResults);
}

// ---- kernels ----------------------------------------------------------------------------------

struct DispatchMemory {
  RowTargets targets;
  int ticket;
};

__global__ void __launch_bounds__(kThreads) DispatchKernel(DispatchArgs a, Exchange x) {
  DispatchMemory& memory = Shared<DispatchMemory>();
  if (HasFailed(&x.state->status)) return;
  DispatchRows(a, x, WholeGrid(), memory.targets);
  EndDispatch(a, x, WholeGrid(), memory.ticket);
}

__global__ void __launch_bounds__(kThreads) ExpandKernel(ExpandArgs a, Exchange x) {
  if (HasFailed(&x.state->status) || !AwaitFlags(x, Flag::kRows, ExchangeCode::kRowsLate)) return;
  ExpandRows(a, x, WholeGrid(), Shared<RowTargets>());
}

__global__ void __launch_bounds__(kThreads)
    VirtualRanksKernel(const VirtualRank* ranks, int blocks_per_rank) {
  DispatchMemory& memory = Shared<DispatchMemory>();
  const VirtualRank& v = ranks[static_cast<int>(blockIdx.x) / blocks_per_rank];
  const Part part = {static_cast<int>(blockIdx.x) % blocks_per_rank, blocks_per_rank};
  if (HasFailed(&v.exchange.state->status)) return;
  DispatchRows(v.dispatch, v.exchange, part, memory.targets);
  EndDispatch(v.dispatch, v.exchange, part, memory.ticket);
  if (!AwaitFlags(v.exchange, Flag::kRows, ExchangeCode::kRowsLate)) return;
  ExpandRows(v.expand, v.exchange, part, memory.targets);
}

struct CombineMemory {
  Results results;
  int ticket;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) CombineKernel(PullCombineArgs a, Exchange x) {
  CombineMemory& memory = Shared<CombineMemory>();
  if (HasFailed(&x.state->status)) return;
  AnnounceResults(x, memory.ticket);
  if (!AwaitFlags(x, Flag::kResults, ExchangeCode::kResultsLate)) return;
  CombineRows<T>(a, x, WholeGrid(), memory.results);
}

__global__ void AdvanceKernel(const VirtualRank* ranks) {
  ++ranks[threadIdx.x].exchange.state->number;
}

absl::Status CheckExchange(const Exchange& x, int32_t num_tokens) {
  BALLAST_RETURN_IF_ERROR(CheckArenaShape(x.shape));
  if (x.max_blocks < 1) return absl::InvalidArgumentError("exchange: no block is allowed");
  if (num_tokens >= 0 && num_tokens <= x.shape.max_tokens) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("exchange: ", num_tokens, " tokens, allowed: 0 to ", x.shape.max_tokens));
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status Dispatch(const DispatchArgs& a, const Exchange& x, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckExchange(x, a.num_tokens));
  const int blocks = std::min(std::max(a.num_tokens, 1), x.max_blocks);
  return Launch({static_cast<unsigned>(blocks), kThreads, sizeof(DispatchMemory)}, stream,
                DispatchKernel, a, x);
}

absl::Status Expand(const ExpandArgs& a, const Exchange& x, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckExchange(x, 0));
  // How many tokens come is known on the device only.
  const int blocks = std::min(x.shape.num_ranks * x.shape.max_tokens, x.max_blocks);
  return Launch({static_cast<unsigned>(blocks), kThreads, sizeof(RowTargets)}, stream, ExpandKernel,
                a, x);
}

absl::StatusOr<int32_t> MostResidentBlocks() {
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, VirtualRanksKernel, kThreads,
                                                          sizeof(DispatchMemory));
  }
  if (error == cudaSuccess) return blocks * multiprocessors;
  return absl::InternalError(absl::StrCat("exchange: no device: ", cudaGetErrorString(error)));
}

absl::Status AdvanceNumbers(const VirtualRank* ranks, int32_t num_ranks, Stream stream) {
  return Launch({1, static_cast<unsigned>(num_ranks)}, stream, AdvanceKernel, ranks);
}

absl::Status DispatchAndExpand(const VirtualRank* ranks, int32_t num_ranks, int32_t blocks_per_rank,
                               Stream stream) {
  const LaunchShape shape = {.blocks = static_cast<unsigned>(num_ranks * blocks_per_rank),
                             .threads = kThreads,
                             .shared_bytes = sizeof(DispatchMemory),
                             .cooperative = true};
  return Launch(shape, stream, VirtualRanksKernel, ranks, blocks_per_rank);
}

absl::Status PullCombine(const PullCombineArgs& a, const Exchange& x, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckExchange(x, a.num_tokens));
  const int blocks = std::min(std::max(a.num_tokens, 1), x.max_blocks);
  const LaunchShape shape = {static_cast<unsigned>(blocks), kThreads, sizeof(CombineMemory)};
  if (a.type == DType::kF32) return Launch(shape, stream, CombineKernel<float>, a, x);
  return Launch(shape, stream, CombineKernel<__nv_bfloat16>, a, x);
}

}  // namespace ballast::cuda
