#ifndef BALLAST_COMM_NCCL_AGREEMENT_H_
#define BALLAST_COMM_NCCL_AGREEMENT_H_

#include <span>

#include "absl/status/status.h"
#include "comm/nccl_api.h"

namespace ballast {

// ERRORS kInvalidArgument: two stand on one GPU (by UUID, or by host and PCI bus), with their ranks
absl::Status CheckOneGpuEach(std::span<const GpuIdentity> gpu_of_rank);

}  // namespace ballast

#endif  // BALLAST_COMM_NCCL_AGREEMENT_H_
