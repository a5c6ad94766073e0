// The exact split in one block. What decides (water-filling, augmenting paths) is a chain of small
// steps: one warp takes them, in the order of ExactSplitter and with its ties, so the quotas are
// the same ones. What does not (sums over sources, sorting, cutting, layout) is done by all.
#include "base/status.h"
#include "kernels/device_split.h"
#include "kernels/device_split_cut.cuh"

namespace ballast::cuda {
namespace split {
namespace {

// ---- by all threads ---------------------------------------------------------------------------

__device__ void SumDemand(const Problem& a, const Work& w) {
  const int experts = a.hosts.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    int sum = 0, before = 0, own = 0;
    for (int s = 0; s < a.hosts.num_ranks; ++s) {
      const int count = CountOf(a, s, e);
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
  int target = max(CeilDiv(total, hosts.num_ranks), LargestLoad(hosts, w, lane));
  PourAll(hosts, w, target, lane);
  while (LargestLoad(hosts, w, lane) > target) {
    if (Augment(hosts, w, target, lane)) continue;
    int load = 0, ranks = 0;
    for (int r = static_cast<int>(lane); r < hosts.num_ranks; r += kWarp) {
      if (w.reached[r] == 0) continue;
      load += w.load[r];
      ++ranks;
    }
    target = CeilDiv(__reduce_add_sync(kFullWarp, load), __reduce_add_sync(kFullWarp, ranks));
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
  const int own_rows = LayOut(a, w);
  if (own_rows >= 0) w.scalar[kOwnRows] = own_rows;
  __syncthreads();
  WriteGroups(a, w, w.scalar[kOwnRows]);
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

// Puts this rank's counts, and the epoch of its tables, where every rank looks for them.
__device__ void PublishCounts(const Exchange& x, uint32_t epoch, const int32_t* own_counts) {
  const int size = x.shape.num_kinds * x.shape.num_experts;
  for (int i = static_cast<int>(threadIdx.x); i < x.shape.num_ranks * size; i += kThreads) {
    int32_t* counts = InArena<int32_t>(x, i / size, x.shape.counts_offset());
    StorePeer(&counts[PlaceOf(x.place, x.rank) * size + i % size], own_counts[i % size]);
  }
  for (int r = static_cast<int>(threadIdx.x); r < x.shape.num_ranks; r += kThreads) {
    int32_t* epochs = InArena<int32_t>(x, r, x.shape.epochs_offset());
    StorePeer(&epochs[PlaceOf(x.place, x.rank)], static_cast<int32_t>(epoch));
  }
}

// By all threads: whether all ranks' tables are of one epoch.
__device__ bool EpochsAgree(const Exchange& x, uint32_t epoch) {
  const int32_t* epochs = InArena<int32_t>(x, x.rank, x.shape.epochs_offset());
  bool differs = false;
  for (int r = static_cast<int>(threadIdx.x); r < x.shape.num_ranks; r += kThreads) {
    if (LoadPeer(&epochs[PlaceOf(x.place, r)]) == static_cast<int32_t>(epoch)) continue;
    Report(&x.state->status, ExchangeCode::kEpochDiffers, r);
    differs = true;
  }
  return __syncthreads_or(differs) == 0;
}

// The tables change in device memory; what was said of them at the launch must hold.
__device__ bool Fits(const Problem& a) {
  const DeviceHosts& hosts = a.hosts;
  if (hosts.num_experts == a.num_experts && hosts.num_ranks == a.num_ranks &&
      hosts.num_hosts <= a.max_hosts &&
      hosts.rank_offsets[a.rank + 1] - hosts.rank_offsets[a.rank] <= a.max_groups) {
    return true;
  }
  Report(a.status, ExchangeCode::kLayerTooLarge, a.rank);
  return false;
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) SplitKernel(DeviceSplitArgs a) {
  const Problem problem(a);
  if (Fits(problem)) {
    SplitBlock(problem, WorkAt(&Shared<int>(), a));
  } else {
    EmptyGroups(a);
  }
}

__global__ void __launch_bounds__(kThreads)
    ExchangeCountsKernel(DeviceSplitArgs a, Exchange x, const int32_t* own_counts) {
  const Problem problem(a);
  if (HasFailed(&x.state->status) || !Fits(problem)) return EmptyGroups(a);
  if (threadIdx.x == 0) {  // an exchange begins
    ++x.state->number;
    x.state->blocks_done = 0;
    x.state->blocks_begun = 0;
  }
  PublishCounts(x, problem.hosts.epoch, own_counts);
  RaiseFlag(x, Flag::kCounts);
  if (!AwaitFlags(x, Flag::kCounts, ExchangeCode::kCountsLate) ||
      !EpochsAgree(x, problem.hosts.epoch)) {
    return EmptyGroups(a);
  }
  SplitBlock(problem, WorkAt(&Shared<int>(), a));
}

// Whether the layer fits into shared memory: *bytes of it.
absl::Status Reserve(const DeviceSplitArgs& a, size_t* bytes) {
  *bytes = WorkBytes(a);
  if (*bytes <= kMostShared) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("split: ", a.num_experts, " experts on ", a.max_hosts, " hosts of ", a.num_ranks,
                   " ranks take ", *bytes, " bytes of shared memory, allowed: ", kMostShared));
}

absl::Status CheckFits(const DeviceSplitArgs& a, const Exchange& x) {
  BALLAST_RETURN_IF_ERROR(CheckArenaShape(x.shape));
  const auto* counts = reinterpret_cast<const int32_t*>(x.arena[x.rank] + x.shape.counts_offset());
  if (a.num_experts == x.shape.num_experts && a.num_ranks == x.shape.num_ranks &&
      a.num_kinds == x.shape.num_kinds && a.rank == x.rank &&
      a.row_capacity == x.shape.row_capacity && a.counts == counts && a.place == x.place &&
      a.status == &x.state->status) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("split: the arguments are not those of the exchange");
}

}  // namespace
}  // namespace split

// ---- launchers --------------------------------------------------------------------------------

absl::Status SplitOnDevice(const DeviceSplitArgs& a, Stream stream) {
  size_t bytes = 0;
  BALLAST_RETURN_IF_ERROR(split::Reserve(a, &bytes));
  BALLAST_RETURN_IF_ERROR(AllowMostShared<split::SplitKernel>());
  return Launch({1, split::kThreads, bytes}, stream, split::SplitKernel, a);
}

absl::Status ExchangeCountsAndSplit(const DeviceSplitArgs& a, const Exchange& x,
                                    const int32_t* own_counts, Stream stream) {
  size_t bytes = 0;
  BALLAST_RETURN_IF_ERROR(split::CheckFits(a, x));
  BALLAST_RETURN_IF_ERROR(split::Reserve(a, &bytes));
  BALLAST_RETURN_IF_ERROR(AllowMostShared<split::ExchangeCountsKernel>());
  return Launch({1, split::kThreads, bytes}, stream, split::ExchangeCountsKernel, a, x, own_counts);
}

}  // namespace ballast::cuda
