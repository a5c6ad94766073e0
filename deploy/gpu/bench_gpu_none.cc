#include "deploy/gpu/bench_gpu.h"

namespace ballast {

absl::StatusOr<GpuBenchResult> RunGpuBench(bool) {
  return absl::InvalidArgumentError(
      "bench gpu: this command was built without CUDA (BALLAST_WITH_CUDA, preset cuda)");
}

}  // namespace ballast
