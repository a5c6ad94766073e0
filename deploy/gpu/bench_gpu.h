#ifndef BALLAST_DEPLOY_GPU_BENCH_GPU_H_
#define BALLAST_DEPLOY_GPU_BENCH_GPU_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// One measurement. Each is the median over replays of a captured graph, per launch sequence.
struct GpuBenchRow {
  std::string name, shape;
  double median_us = 0;
  double spread_us = 0;  // the 90th percentile less the 10th
  double bytes = 0;      // that must move at least: each input read once, each output written once
  double flops = 0;      // 0: the kernel is not for computing
};

struct GpuBenchResult {
  std::string device;
  double copy_bytes_per_second = 0;  // of a large copy on the device, read and written
  std::vector<GpuBenchRow> rows;
};

// Measures the kernels at the shapes of DeepSeek-V3, Qwen3-30B-A3B and OLMoE. `small`: shapes that
// an emulator can run, for seeing that everything is launched as it should be.
// ERRORS kInternal: what CUDA says, with the call; kInvalidArgument: built without CUDA
absl::StatusOr<GpuBenchResult> RunGpuBench(bool small);

std::string ToTable(const GpuBenchResult& result);
std::string ToJson(const GpuBenchResult& result);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_GPU_BENCH_GPU_H_
