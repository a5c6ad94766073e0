#ifndef BALLAST_KERNELS_DEVICE_HOSTS_H_
#define BALLAST_KERNELS_DEVICE_HOSTS_H_

#include <cstdint>
#include <vector>

#include "base/layer_hosts.h"

namespace ballast {

// One layer's placement as the device reads it. SHAPES host_offsets [E+1]; host_rank,
// expert_of_host [H]; node_of_rank [R]; rank_offsets [R+1]; rank_hosts [H]: the hosts on each rank
// by ascending expert, which is also the order of the rank's groups
struct DeviceHosts {
  int32_t num_experts = 0, num_ranks = 0, num_hosts = 0;
  uint32_t epoch = 0;  // the low half of the placement's
  const int32_t* host_offsets = nullptr;
  const int32_t* host_rank = nullptr;
  const int32_t* expert_of_host = nullptr;
  const int32_t* node_of_rank = nullptr;
  const int32_t* rank_offsets = nullptr;
  const int32_t* rank_hosts = nullptr;
};

// DeviceHosts made on the host: one array to copy to the device.
class CompiledHosts {
 public:
  CompiledHosts(const LayerHosts& hosts, int64_t epoch);
  const std::vector<int32_t>& words() const { return words_; }
  // `base`: where the words are. Points into them.
  DeviceHosts At(const int32_t* base) const;
  int32_t num_groups(int32_t rank) const;  // hosts on the rank

 private:
  int32_t num_experts_, num_ranks_, num_hosts_;
  uint32_t epoch_;
  std::vector<int32_t> words_;
};

}  // namespace ballast

#endif  // BALLAST_KERNELS_DEVICE_HOSTS_H_
