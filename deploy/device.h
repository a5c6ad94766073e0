// Devices that models can run on (--device), as far as this build has any.
#ifndef BALLAST_DEPLOY_DEVICE_H_
#define BALLAST_DEPLOY_DEVICE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "runtime/backend.h"

namespace ballast {

// Takes a device of this machine for a rank, the `node_rank`-th of this machine's.
// `world`, over which ranks of one machine lend each other memory, must outlive it; where
// `node_of_rank` has several machines, NCCL carries rows between them.
// ERRORS kInvalidArgument: this build has no CUDA, or the machine no device that it runs on
absl::StatusOr<std::unique_ptr<Backend>> MakeDeviceBackend(int32_t node_rank,
                                                           const std::vector<int32_t>& node_of_rank,
                                                           Communicator* world);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_DEVICE_H_
