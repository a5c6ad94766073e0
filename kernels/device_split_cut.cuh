// How the device's split cuts quotas over the sources.
#ifndef BALLAST_KERNELS_DEVICE_SPLIT_CUT_CUH_
#define BALLAST_KERNELS_DEVICE_SPLIT_CUT_CUH_

#include "kernels/device_split.cuh"

namespace ballast::cuda::split {

__device__ inline int Overlap(int begin_a, int end_a, int begin_b, int end_b) {
  return max(0, min(end_a, end_b) - max(begin_a, begin_b));
}

// The sources' counts of the expert and the hosts' quotas, less what every rank keeps of its own.
__device__ inline void KeepOwn(const Problem& a, const Work& w, int first, int n, unsigned lane,
                               int* count, int* quota) {
  const DeviceHosts& hosts = a.hosts;
  const int e = hosts.expert_of_host[first];
  for (int s = static_cast<int>(lane); s < hosts.num_ranks; s += kWarp) {
    count[s] = CountOf(a, s, e);
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
__device__ inline void CutExpert(const Problem& a, const Work& w, int e, unsigned lane, int* count,
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
  __syncwarp();  // the next expert uses the same memory
}

// Where the groups of every rank begin. Returns, to the thread that has this rank, how many rows
// its groups take; -1 to others.
__device__ inline int LayOut(const Problem& a, const Work& w) {
  const DeviceHosts& hosts = a.hosts;
  int own_rows = -1;
  for (int r = static_cast<int>(threadIdx.x); r < hosts.num_ranks; r += kThreads) {
    int begin = 0;
    for (int i = hosts.rank_offsets[r]; i < hosts.rank_offsets[r + 1]; ++i) {
      const int host = hosts.rank_hosts[i];
      w.begin[host] = begin;
      begin += CeilDiv(w.quota[host], a.row_align) * a.row_align;
    }
    if (r == a.rank) own_rows = begin;
    if (begin > a.row_capacity) Report(a.status, ExchangeCode::kRowsExceeded, r);
    a.rank_load[r] = w.load[r];
  }
  return own_rows;
}

// Tells this rank where its groups are, which take `rows` rows. The experts know of no failure:
// they must find nothing that has no room. By all threads.
__device__ inline void WriteGroups(const Problem& a, const Work& w, int rows) {
  const DeviceHosts& hosts = a.hosts;
  const int first = hosts.rank_offsets[a.rank];
  const int num_groups = hosts.rank_offsets[a.rank + 1] - first;
  for (int g = static_cast<int>(threadIdx.x); g <= a.max_groups; g += kThreads) {
    const int host = g < num_groups ? hosts.rank_hosts[first + g] : -1;
    a.group_begin[g] = host >= 0 ? w.begin[host] : rows;
    if (g == a.max_groups) continue;
    a.group_rows[g] = host >= 0 && rows <= a.row_capacity ? w.quota[host] : 0;
  }
}

// What the experts find where there was no split. By all threads.
__device__ inline void EmptyGroups(const DeviceSplitArgs& a) {
  for (int g = static_cast<int>(threadIdx.x); g <= a.max_groups; g += kThreads) {
    a.group_begin[g] = 0;
    if (g < a.max_groups) a.group_rows[g] = 0;
  }
}

}  // namespace ballast::cuda::split

#endif  // BALLAST_KERNELS_DEVICE_SPLIT_CUT_CUH_
