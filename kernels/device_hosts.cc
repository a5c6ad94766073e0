#include "kernels/device_hosts.h"

namespace ballast {

CompiledHosts::CompiledHosts(const LayerHosts& hosts, int64_t epoch)
    : num_experts_(hosts.num_experts),
      num_ranks_(hosts.num_ranks),
      num_hosts_(static_cast<int32_t>(hosts.host_rank.size())),
      epoch_(static_cast<uint32_t>(epoch)) {
  words_.assign(hosts.host_offsets.begin(), hosts.host_offsets.end());
  words_.insert(words_.end(), hosts.host_rank.begin(), hosts.host_rank.end());
  for (int32_t e = 0; e < num_experts_; ++e) {
    words_.insert(words_.end(), hosts.host_offsets[e + 1] - hosts.host_offsets[e], e);
  }
  words_.insert(words_.end(), hosts.node_of_rank.begin(), hosts.node_of_rank.end());
  std::vector<int32_t> rank_offsets(static_cast<size_t>(num_ranks_) + 1);
  for (int32_t rank : hosts.host_rank) ++rank_offsets[rank + 1];
  for (int32_t r = 0; r < num_ranks_; ++r) rank_offsets[r + 1] += rank_offsets[r];
  words_.insert(words_.end(), rank_offsets.begin(), rank_offsets.end());
  // Hosts are numbered by expert, so each rank gets its own in that order.
  std::vector<int32_t> rank_hosts(hosts.host_rank.size());
  for (int32_t h = 0; h < num_hosts_; ++h) rank_hosts[rank_offsets[hosts.host_rank[h]]++] = h;
  words_.insert(words_.end(), rank_hosts.begin(), rank_hosts.end());
}

DeviceHosts CompiledHosts::At(const int32_t* base) const {
  DeviceHosts hosts{num_experts_, num_ranks_, num_hosts_, epoch_};
  const auto next = [&](int32_t count) {
    const int32_t* at = base;
    base += count;
    return at;
  };
  hosts.host_offsets = next(num_experts_ + 1);
  hosts.host_rank = next(num_hosts_);
  hosts.expert_of_host = next(num_hosts_);
  hosts.node_of_rank = next(num_ranks_);
  hosts.rank_offsets = next(num_ranks_ + 1);
  hosts.rank_hosts = next(num_hosts_);
  return hosts;
}

int32_t CompiledHosts::num_groups(int32_t rank) const {
  const DeviceHosts hosts = At(words_.data());
  return hosts.rank_offsets[rank + 1] - hosts.rank_offsets[rank];
}

}  // namespace ballast
