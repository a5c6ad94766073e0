// The exact split in one block. What decides (water-filling, augmenting paths) is a chain of small
// steps: one warp takes them, in the order of ExactSplitter and with its ties, so the quotas are
// the same ones. What does not (sums over sources, sorting, cutting, layout) is done by all.
#include "base/status.h"
#include "kernels/device_split.h"
#include "kernels/exchange.cuh"

namespace ballast::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / static_cast<int>(kWarp);

// The arguments, with the layer as it is now.
struct Problem : DeviceSplitArgs {
  __device__ explicit Problem(const DeviceSplitArgs& args) : DeviceSplitArgs(args), hosts(*layer) {}
  DeviceHosts hosts;
};

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
  int* scalar;   // [3]
};

constexpr int kNumShared = 0, kTail = 1, kPushed = 2;  // in scalar

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
size_t WorkBytes(const DeviceSplitArgs& a) {
  constexpr uintptr_t kBase = 1024;  // no memory: only addresses are worked out
  const Work w = WorkAt(reinterpret_cast<int*>(kBase), a);
  return reinterpret_cast<uintptr_t>(w.scalar + 3) - kBase;
}

__device__ int CeilDivide(int a, int b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

__device__ unsigned LanesBelow(unsigned lane) {
  return (1u << lane) - 1;
}

// ---- by all threads ---------------------------------------------------------------------------

__device__ void SumDemand(const Problem& a, const Work& w) {
  const int experts = a.hosts.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    int sum = 0, before = 0, own = 0;
    for (int s = 0; s < a.hosts.num_ranks; ++s) {
      int count = 0;
      for (int kind = 0; kind < a.num_kinds; ++kind) {
        count += LoadPeer(&a.counts[(static_cast<size_t>(s) * a.num_kinds + kind) * experts + e]);
      }
      if (s == a.rank) {
        before = sum;
        own = count;
      }
      sum += count;
    }
    w.demand[e] = sum;
    w.before[e] = before;
    w.own[e] = own;
  }
}

__device__ bool IsShared(const DeviceHosts& hosts, int e) {
  return hosts.host_offsets[e + 1] - hosts.host_offsets[e] > 1;
}

// Experts with one host go there; the others are put in order.
__device__ void PlaceSingles(const Problem& a, const Work& w) {
  const DeviceHosts& hosts = a.hosts;
  for (int e = static_cast<int>(threadIdx.x); e < hosts.num_experts; e += kThreads) {
    const int host = hosts.host_offsets[e];
    const int demand = w.demand[e];
    if (!IsShared(hosts, e)) {
      w.quota[host] = demand;
      atomicAdd(&w.load[hosts.host_rank[host]], demand);
      continue;
    }
    int place = 0;  // larger demand first, then the lower expert
    for (int other = 0; other < hosts.num_experts; ++other) {
      if (!IsShared(hosts, other)) continue;
      const int theirs = w.demand[other];
      if (theirs > demand || (theirs == demand && other < e)) ++place;
    }
    w.order[place] = e;
    atomicAdd(&w.scalar[kNumShared], 1);
  }
}

// ---- by one warp ------------------------------------------------------------------------------

// Divides the expert's demand over its hosts as water finds its level (ExactSplitter::Pour).
__device__ void Pour(const DeviceHosts& hosts, const Work& w, int e, unsigned lane) {
  const int first = hosts.host_offsets[e], n = hosts.host_offsets[e + 1] - first;
  const int demand = w.demand[e];
  // Host i is wet if its level is reached when all lower ones are raised to it.
  const auto place = [&](int i, long long* below) {
    const int load = w.load[hosts.host_rank[first + i]];
    int lower = 0;
    *below = 0;
    for (int j = 0; j < n; ++j) {
      const int other = w.load[hosts.host_rank[first + j]];
      if (other > load || (other == load && j >= i)) continue;
      ++lower;
      *below += other;
    }
    return lower;
  };
  int wet = 0, level_sum = 0;
  for (int i = static_cast<int>(lane); i < n; i += kWarp) {
    long long below = 0;
    const int lower = place(i, &below);
    const int load = w.load[hosts.host_rank[first + i]];
    if (static_cast<long long>(lower) * load - below > demand) continue;
    ++wet;
    level_sum += load;
  }
  wet = __reduce_add_sync(kFullWarp, wet);
  level_sum =
      __reduce_add_sync(kFullWarp, level_sum) + demand;  // all loads are below 2^31 together
  const int level = level_sum / wet, remainder = level_sum % wet;
  for (int i = static_cast<int>(lane); i < n; i += kWarp) {
    long long below = 0;
    const int lower = place(i, &below);
    const int load = w.load[hosts.host_rank[first + i]];
    w.quota[first + i] = lower < wet ? level - load + (lower < remainder ? 1 : 0) : 0;
  }
  __syncwarp();
  for (int i = static_cast<int>(lane); i < n; i += kWarp) {
    w.load[hosts.host_rank[first + i]] += w.quota[first + i];
  }
  __syncwarp();
}

__device__ int LargestLoad(const DeviceHosts& hosts, const Work& w, unsigned lane) {
  int largest = 0;
  for (int r = static_cast<int>(lane); r < hosts.num_ranks; r += kWarp) {
    largest = max(largest, w.load[r]);
  }
  return __reduce_max_sync(kFullWarp, largest);
}

__device__ void PourAll(const DeviceHosts& hosts, const Work& w, int target, unsigned lane) {
  const int num_shared = w.scalar[kNumShared];
  for (int i = 0; i < num_shared; ++i) Pour(hosts, w, w.order[i], lane);
  if (LargestLoad(hosts, w, lane) <= target) return;
  for (int i = 0; i < num_shared; ++i) {  // again, now that each knows where the others went
    const int e = w.order[i];
    for (int h = hosts.host_offsets[e] + static_cast<int>(lane); h < hosts.host_offsets[e + 1];
         h += kWarp) {
      w.load[hosts.host_rank[h]] -= w.quota[h];
    }
    __syncwarp();
    Pour(hosts, w, e, lane);
  }
}

// ExactSplitter::PushTo, by one lane. Returns how many copies.
__device__ int PushTo(const DeviceHosts& hosts, const Work& w, int rank, int target) {
  int amount = target - w.load[rank];
  int root = rank;
  while (w.give[root] >= 0) {
    amount = min(amount, w.quota[w.give[root]]);
    root = hosts.host_rank[w.give[root]];
  }
  amount = min(amount, w.load[root] - target);
  if (amount <= 0) return 0;
  for (int at = rank; w.give[at] >= 0; at = hosts.host_rank[w.give[at]]) {
    w.quota[w.give[at]] -= amount;
    w.quota[w.take[at]] += amount;
  }
  w.load[root] -= amount;
  w.load[rank] += amount;
  return amount;
}

// What the search does at one expert whose copies host `give` could hand on.
__device__ void Reach(const DeviceHosts& hosts, const Work& w, int give, int target,
                      unsigned lane) {
  const int e = hosts.expert_of_host[give];
  const int end = hosts.host_offsets[e + 1];
  for (int chunk = hosts.host_offsets[e]; chunk < end; chunk += kWarp) {
    const int take = chunk + static_cast<int>(lane);
    const int to = take < end ? hosts.host_rank[take] : 0;
    const bool fresh = take < end && w.reached[to] == 0;
    const unsigned all_fresh = __ballot_sync(kFullWarp, fresh);
    const int tail = w.scalar[kTail];
    if (fresh) {
      w.reached[to] = 1;
      w.give[to] = give;
      w.take[to] = take;
      w.queue[tail + __popc(all_fresh & LanesBelow(lane))] = to;
    }
    const unsigned low = __ballot_sync(kFullWarp, fresh && w.load[to] < target);
    __syncwarp();
    if (lane == 0) {
      w.scalar[kTail] = tail + __popc(all_fresh);
      for (unsigned left = low; left != 0; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        if (PushTo(hosts, w, hosts.host_rank[chunk + i], target) > 0) w.scalar[kPushed] = 1;
      }
    }
    __syncwarp();
  }
}

// ExactSplitter::Augment: a breadth-first search from all ranks above the target.
__device__ bool Augment(const DeviceHosts& hosts, const Work& w, int target, unsigned lane) {
  for (int e = static_cast<int>(lane); e < hosts.num_experts; e += kWarp) w.seen[e] = 0;
  if (lane == 0) w.scalar[kPushed] = 0;
  int tail = 0;
  for (int chunk = 0; chunk < hosts.num_ranks; chunk += kWarp) {
    const int r = chunk + static_cast<int>(lane);
    const bool over = r < hosts.num_ranks && w.load[r] > target;
    const unsigned all_over = __ballot_sync(kFullWarp, over);
    if (r < hosts.num_ranks) w.reached[r] = over;
    if (over) {
      w.give[r] = -1;
      w.queue[tail + __popc(all_over & LanesBelow(lane))] = r;
    }
    tail += __popc(all_over);
  }
  if (lane == 0) w.scalar[kTail] = tail;
  __syncwarp();
  for (int head = 0; head < w.scalar[kTail]; ++head) {
    const int rank = w.queue[head];
    const int end = hosts.rank_offsets[rank + 1];
    for (int chunk = hosts.rank_offsets[rank]; chunk < end; chunk += kWarp) {
      const int i = chunk + static_cast<int>(lane);
      const int give = i < end ? hosts.rank_hosts[i] : 0;
      const int e = hosts.expert_of_host[give];
      const bool usable = i < end && IsShared(hosts, e) && w.quota[give] != 0 && w.seen[e] == 0;
      if (usable)
        w.seen[e] = 1;  // all its hosts are reached from here; each edge has its own expert
      const unsigned all_usable = __ballot_sync(kFullWarp, usable);
      for (unsigned left = all_usable; left != 0; left &= left - 1) {
        const int from = __shfl_sync(kFullWarp, give, __ffs(static_cast<int>(left)) - 1);
        Reach(hosts, w, from, target, lane);
      }
    }
  }
  return w.scalar[kPushed] != 0;
}

// ExactSplitter::Run after the sums.
__device__ void Balance(const DeviceHosts& hosts, const Work& w, unsigned lane) {
  int total = 0;
  for (int e = static_cast<int>(lane); e < hosts.num_experts; e += kWarp) total += w.demand[e];
  total = __reduce_add_sync(kFullWarp, total);
  int target = max(CeilDivide(total, hosts.num_ranks), LargestLoad(hosts, w, lane));
  PourAll(hosts, w, target, lane);
  while (LargestLoad(hosts, w, lane) > target) {
    if (Augment(hosts, w, target, lane)) continue;
    int load = 0, ranks = 0;
    for (int r = static_cast<int>(lane); r < hosts.num_ranks; r += kWarp) {
      if (w.reached[r] == 0) continue;
      load += w.load[r];
      ++ranks;
    }
    target = CeilDivide(__reduce_add_sync(kFullWarp, load), __reduce_add_sync(kFullWarp, ranks));
  }
}

// ---- the cut ----------------------------------------------------------------------------------

__device__ int Overlap(int begin_a, int end_a, int begin_b, int end_b) {
  return max(0, min(end_a, end_b) - max(begin_a, begin_b));
}

// The sources' counts of the expert and the hosts' quotas, less what every rank keeps of its own.
__device__ void KeepOwn(const Problem& a, const Work& w, int first, int n, unsigned lane,
                        int* count, int* quota) {
  const DeviceHosts& hosts = a.hosts;
  const int e = hosts.expert_of_host[first];
  for (int s = static_cast<int>(lane); s < hosts.num_ranks; s += kWarp) {
    count[s] = 0;
    for (int kind = 0; kind < a.num_kinds; ++kind) {
      const size_t row = static_cast<size_t>(s) * a.num_kinds + kind;
      count[s] += LoadPeer(&a.counts[row * hosts.num_experts + e]);
    }
  }
  __syncwarp();
  for (int i = static_cast<int>(lane); i < n; i += kWarp) {
    const int to = hosts.host_rank[first + i];
    const int kept = min(count[to], w.quota[first + i]);
    count[to] -= kept;
    quota[i] = w.quota[first + i] - kept;
  }
  __syncwarp();
}

// Cuts the quotas of one expert with several hosts, by one warp: a source serves its own rank
// first, then its node, then the others, in ascending order. Serving in order is the overlap of two
// rows of intervals, the sources' counts and the hosts' quotas, so every host can be worked out by
// itself.
__device__ void CutExpert(const Problem& a, const Work& w, int e, unsigned lane, int* count,
                          int* quota) {
  const DeviceHosts& hosts = a.hosts;
  const int first = hosts.host_offsets[e], n = hosts.host_offsets[e + 1] - first;
  KeepOwn(a, w, first, n, lane, count, quota);

  // Within each node: interval [begin, begin + length) of a host or source among its like.
  const auto sources_before = [&](int node, int s) {
    int sum = 0;
    for (int r = 0; r < s; ++r) sum += hosts.node_of_rank[r] == node ? count[r] : 0;
    return sum;
  };
  const auto hosts_before = [&](int node, int i) {
    int sum = 0;
    for (int j = 0; j < i; ++j) {
      sum += hosts.node_of_rank[hosts.host_rank[first + j]] == node ? quota[j] : 0;
    }
    return sum;
  };
  const int own_node = hosts.node_of_rank[a.rank];
  // What sources before this rank, and this rank, send over the network: what their nodes left.
  int far_before = 0, far_own = 0;
  for (int s = static_cast<int>(lane); s <= a.rank; s += kWarp) {
    const int node = hosts.node_of_rank[s];
    const int begin = sources_before(node, s);
    const int left = count[s] - Overlap(begin, begin + count[s], 0, hosts_before(node, n));
    (s < a.rank ? far_before : far_own) += left;
  }
  far_before = __reduce_add_sync(kFullWarp, far_before);
  far_own = __reduce_add_sync(kFullWarp, far_own);
  int far_begin = 0;  // of the host's interval among those of the hosts over the network
  for (int chunk = 0; chunk < n; chunk += kWarp) {
    const int i = chunk + static_cast<int>(lane);
    int send = 0, before = 0, far_quota = 0;
    if (i < n) {
      const int to = hosts.host_rank[first + i], node = hosts.node_of_rank[to];
      const int kept = w.quota[first + i] - quota[i];
      if (to == a.rank) send += kept;
      if (to < a.rank) before += kept;
      const int begin = hosts_before(node, i), end = begin + quota[i];
      const int near = sources_before(node, a.rank);
      before += Overlap(0, near, begin, end);
      if (node == own_node) send += Overlap(near, near + count[a.rank], begin, end);
      far_quota = quota[i] - Overlap(begin, end, 0, sources_before(node, hosts.num_ranks));
    }
    int through = far_quota;  // the sum up to this lane
    for (unsigned step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += below;
    }
    const int begin = far_begin + through - far_quota, end = far_begin + through;
    if (i < n) {
      before += Overlap(0, far_before, begin, end);
      send += Overlap(far_before, far_before + far_own, begin, end);
      a.send[first + i] = send;
      a.row_begin[first + i] = w.begin[first + i] + before;
    }
    far_begin += __shfl_sync(kFullWarp, through, kWarp - 1);
  }
}

// Tells this rank where its groups are, of which `rows` rows are aligned ones.
__device__ void WriteGroups(const Problem& a, const Work& w, int rows) {
  const DeviceHosts& hosts = a.hosts;
  const int first = hosts.rank_offsets[a.rank];
  const int num_groups = hosts.rank_offsets[a.rank + 1] - first;
  for (int g = 0; g < a.max_groups; ++g) {
    const int host = g < num_groups ? hosts.rank_hosts[first + g] : -1;
    a.group_begin[g] = host >= 0 ? w.begin[host] : rows;
    // The experts know of no failure: they must find nothing that has no room.
    a.group_rows[g] = host >= 0 && rows <= a.row_capacity ? w.quota[host] : 0;
  }
  a.group_begin[a.max_groups] = rows;
}

// Where the groups of every rank begin.
__device__ void LayOut(const Problem& a, const Work& w) {
  const DeviceHosts& hosts = a.hosts;
  for (int r = static_cast<int>(threadIdx.x); r < hosts.num_ranks; r += kThreads) {
    int begin = 0;
    for (int i = hosts.rank_offsets[r]; i < hosts.rank_offsets[r + 1]; ++i) {
      const int host = hosts.rank_hosts[i];
      w.begin[host] = begin;
      begin += CeilDivide(w.quota[host], a.row_align) * a.row_align;
    }
    if (r == a.rank) WriteGroups(a, w, begin);
    if (begin > a.row_capacity) Report(a.status, ExchangeCode::kRowsExceeded, r);
    a.rank_load[r] = w.load[r];
  }
}

// ---- the block --------------------------------------------------------------------------------

__device__ void SplitBlock(const Problem& a, const Work& w) {
  const DeviceHosts& hosts = a.hosts;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned lane = threadIdx.x % kWarp;
  const int warp = thread / static_cast<int>(kWarp);
  for (int r = thread; r < hosts.num_ranks; r += kThreads) w.load[r] = 0;
  if (thread == 0) w.scalar[kNumShared] = 0;
  SumDemand(a, w);
  __syncthreads();
  PlaceSingles(a, w);
  __syncthreads();
  if (warp == 0) Balance(hosts, w, lane);
  __syncthreads();
  LayOut(a, w);
  __syncthreads();
  for (int e = thread; e < hosts.num_experts; e += kThreads) {
    if (IsShared(hosts, e)) continue;
    const int host = hosts.host_offsets[e];
    a.send[host] = w.own[e];
    a.row_begin[host] = w.begin[host] + w.before[e];
  }
  int* scratch = w.scratch + 2 * warp * hosts.num_ranks;
  for (int i = warp; i < w.scalar[kNumShared]; i += kWarps) {
    CutExpert(a, w, w.order[i], lane, scratch, scratch + hosts.num_ranks);
  }
  for (int h = thread; h < hosts.num_hosts; h += kThreads) a.quota[h] = w.quota[h];
}

// Puts this rank's counts where every rank looks for them.
__device__ void PublishCounts(const Exchange& x, const int32_t* own_counts) {
  const int size = x.shape.num_kinds * x.shape.num_experts;
  for (int i = static_cast<int>(threadIdx.x); i < x.shape.num_ranks * size; i += kThreads) {
    int32_t* counts = InArena<int32_t>(x, i / size, x.shape.counts_offset());
    StorePeer(&counts[x.rank * size + i % size], own_counts[i % size]);
  }
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) SplitKernel(DeviceSplitArgs a) {
  SplitBlock(Problem(a), WorkAt(&Shared<int>(), a));
}

__global__ void __launch_bounds__(kThreads)
    ExchangeCountsKernel(DeviceSplitArgs a, Exchange x, const int32_t* own_counts) {
  if (HasFailed(x.status)) return;
  if (threadIdx.x == 0) ++*x.number;  // an exchange begins
  PublishCounts(x, own_counts);
  RaiseFlag(x, Flag::kCounts);
  if (!AwaitFlags(x, Flag::kCounts, ExchangeCode::kCountsLate)) return;
  SplitBlock(Problem(a), WorkAt(&Shared<int>(), a));
}

template <typename Kernel>
absl::Status Reserve(Kernel* kernel, const DeviceSplitArgs& a, size_t* bytes) {
  constexpr size_t kMost = 227 << 10;  // of a block, on Hopper
  *bytes = WorkBytes(a);
  if (*bytes <= kMost && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(*bytes)) == cudaSuccess) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("split: ", a.num_experts, " experts on ", a.max_hosts, " hosts of ", a.num_ranks,
                   " ranks take ", *bytes, " bytes of shared memory, allowed: ", kMost));
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status SplitOnDevice(const DeviceSplitArgs& a, Stream stream) {
  size_t bytes = 0;
  BALLAST_RETURN_IF_ERROR(Reserve(SplitKernel, a, &bytes));
  return Launch({1, kThreads, bytes}, stream, SplitKernel, a);
}

absl::Status ExchangeCountsAndSplit(const DeviceSplitArgs& a, const Exchange& x,
                                    const int32_t* own_counts, Stream stream) {
  size_t bytes = 0;
  BALLAST_RETURN_IF_ERROR(Reserve(ExchangeCountsKernel, a, &bytes));
  return Launch({1, kThreads, bytes}, stream, ExchangeCountsKernel, a, x, own_counts);
}

}  // namespace ballast::cuda
