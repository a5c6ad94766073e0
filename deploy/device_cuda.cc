#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "deploy/device.h"
#include "kernels/device_kernels.h"
#include "runtime/device_backend.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int32_t node_rank,
                                                           const std::vector<int32_t>& node_of_rank,
                                                           Communicator* world) {
  const absl::Status device = cuda::UseDevice(node_rank);
  if (!device.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--device is cuda, allowed on this machine: cpu; ", std::string(device.message())));
  }
  auto backend = DeviceBackend::Create({.kernels = &DeviceKernels(),
                                        .rank = world->rank(),
                                        .lend = LendByIpc(world),
                                        .node_of_rank = node_of_rank});
  if (absl::IsFailedPrecondition(backend.status())) {  // how the job was started
    return absl::InvalidArgumentError(
        absl::StrCat("--device is cuda: ", std::string(backend.status().message())));
  }
  return backend;
}

}  // namespace ballast
