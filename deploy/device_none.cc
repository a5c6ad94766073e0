// A build without CUDA.
#include "deploy/device.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int32_t, const std::vector<int32_t>&,
                                                           Communicator*) {
  return absl::InvalidArgumentError(
      "--device is cuda, allowed: cpu; this ballast was built without CUDA "
      "(cmake --preset cuda builds it in)");
}

}  // namespace ballast
