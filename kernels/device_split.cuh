// What the device's split keeps in shared memory.
#ifndef BALLAST_KERNELS_DEVICE_SPLIT_CUH_
#define BALLAST_KERNELS_DEVICE_SPLIT_CUH_

#include "kernels/device_split.h"
#include "kernels/exchange.cuh"

namespace ballast::cuda::split {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / static_cast<int>(kWarp);

// The arguments, with the layer as it is now.
struct Problem : DeviceSplitArgs {
  __device__ explicit Problem(const DeviceSplitArgs& args) : DeviceSplitArgs(args), hosts(*layer) {}
  DeviceHosts hosts;
};

// Copies of source s for expert e, of all kinds.
__device__ inline int CountOf(const Problem& a, int s, int e) {
  const size_t first = static_cast<size_t>(PlaceOf(a.place, s)) * a.num_kinds;
  int count = 0;
  for (int kind = 0; kind < a.num_kinds; ++kind) {
    count += LoadPeer(&a.counts[(first + kind) * a.hosts.num_experts + e]);
  }
  return count;
}

// Shared memory. Every pointer is to so many words as its comment says.
struct Work {
  int* demand;   // [E] copies of the batch
  int* before;   // [E] those of the sources before this rank
  int* own;      // [E] those of this rank
  int* order;    // [E] experts with several hosts, largest demand first
  int* seen;     // [E] by the search
  int* quota;    // [H]
  int* begin;    // [H] of the host's group on its rank
  int* load;     // [R]
  int* queue;    // [R] reached ranks, breadth first
  int* reached;  // [R]
  int* give;     // [R] host of the parent rank that would give copies, or -1
  int* take;     // [R] host of this rank that would take them
  int* scratch;  // [kWarps, 2, R]: of the sources of an expert, of its hosts
  int* scalar;   // [4]
};

inline constexpr int kNumShared = 0, kTail = 1, kPushed = 2, kOwnRows = 3;  // in scalar

__host__ __device__ inline Work WorkAt(int* base, const DeviceSplitArgs& a) {
  Work w;
  int** of_experts[] = {&w.demand, &w.before, &w.own, &w.order, &w.seen};
  for (int** part : of_experts) {
    *part = base;
    base += a.num_experts;
  }
  int** of_hosts[] = {&w.quota, &w.begin};
  for (int** part : of_hosts) {
    *part = base;
    base += a.max_hosts;
  }
  int** of_ranks[] = {&w.load, &w.queue, &w.reached, &w.give, &w.take};
  for (int** part : of_ranks) {
    *part = base;
    base += a.num_ranks;
  }
  w.scratch = base;
  w.scalar = base + 2 * kWarps * a.num_ranks;
  return w;
}
inline size_t WorkBytes(const DeviceSplitArgs& a) {
  constexpr uintptr_t kBase = 1024;  // no memory: only addresses are worked out
  const Work w = WorkAt(reinterpret_cast<int*>(kBase), a);
  return reinterpret_cast<uintptr_t>(w.scalar + 4) - kBase;
}

}  // namespace ballast::cuda::split

#endif  // BALLAST_KERNELS_DEVICE_SPLIT_CUH_
