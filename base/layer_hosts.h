// Who hosts which expert in one layer: the view that the split, the kernels and the runtime share.
#ifndef BALLAST_BASE_LAYER_HOSTS_H_
#define BALLAST_BASE_LAYER_HOSTS_H_

#include <cstdint>
#include <span>

namespace ballast {

inline constexpr int32_t kNoExpert = -1;  // an empty slot
inline constexpr int32_t kNoSlot = -1;

// Hosts in CSR form. A *host* is a (logical expert, rank) pair: two copies of an expert on one rank
// are one host. Hosts of expert e are the indices [host_offsets[e], host_offsets[e+1]), in
// ascending rank order.
//
// SHAPES host_offsets [E+1]   host_rank, host_copies, host_slot [num_hosts]
struct LayerHosts {
  int32_t num_experts = 0;                // E
  int32_t num_ranks = 0;                  // R
  std::span<const int32_t> host_offsets;
  std::span<const int32_t> host_rank;
  std::span<const int32_t> host_copies;   // copies of the expert on that rank, at least 1
  std::span<const int32_t> host_slot;     // the lowest global slot of that rank that holds it
  std::span<const int32_t> node_of_rank;  // [R]
};

}  // namespace ballast

#endif  // BALLAST_BASE_LAYER_HOSTS_H_
