#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "deploy/device.h"
#include "kernels/device_kernels.h"
#include "runtime/device_backend.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int32_t node_rank, Communicator* world) {
  const absl::Status device = cuda::UseDevice(node_rank);
  if (!device.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--device is cuda, allowed on this machine: cpu; ", std::string(device.message())));
  }
  BALLAST_ASSIGN_OR_RETURN(auto backend, DeviceBackend::Create({.kernels = &DeviceKernels(),
                                                                .rank = world->rank(),
                                                                .lend = LendByIpc(world)}));
  return backend;
}

}  // namespace ballast
