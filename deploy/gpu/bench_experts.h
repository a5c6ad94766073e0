#ifndef BALLAST_DEPLOY_GPU_BENCH_EXPERTS_H_
#define BALLAST_DEPLOY_GPU_BENCH_EXPERTS_H_

#include "absl/status/status.h"
#include "deploy/gpu/bench_gpu.h"

namespace ballast {

// Adds the grouped experts, bf16 on the device's best path, at prefill and decode sizes.
absl::Status BenchExperts(bool small, GpuBenchResult* result);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_GPU_BENCH_EXPERTS_H_
