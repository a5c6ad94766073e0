#include "comm/nccl_agreement.h"

#include <algorithm>
#include <array>

#include "base/status.h"

namespace ballast {
namespace {

bool Known(const std::array<uint8_t, 16>& uuid) {
  return std::any_of(uuid.begin(), uuid.end(), [](uint8_t byte) { return byte != 0; });
}

}  // namespace

absl::Status CheckOneGpuEach(std::span<const GpuIdentity> gpu_of_rank) {
  for (size_t b = 1; b < gpu_of_rank.size(); ++b) {
    for (size_t a = 0; a < b; ++a) {
      const GpuIdentity &first = gpu_of_rank[a], &second = gpu_of_rank[b];
      const bool same_place = first.host == second.host && first.pci_bus_id == second.pci_bus_id;
      // Containers of one machine may have host names of their own.
      const bool same_uuid = Known(first.uuid) && first.uuid == second.uuid;
      if (!same_place && !same_uuid) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "ranks ", a, " and ", b, " stand on one GPU (", first.host, ", PCI ", first.pci_bus_id,
          "); NCCL wants one for each rank: start no more ranks on a host than it has GPUs, and ",
          "let CUDA_VISIBLE_DEVICES give each rank its own"));
    }
  }
  return absl::OkStatus();
}

}  // namespace ballast
