#ifndef BALLAST_DEPLOY_BENCH_REBALANCE_H_
#define BALLAST_DEPLOY_BENCH_REBALANCE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace ballast {

struct RebalanceBenchFlags {
  int64_t steps = 1000;  // to sample of each kind, quiet and moving
  int32_t layers = 2, experts_per_rank = 8, top_k = 4;
  int32_t hidden = 1024, inter = 1408;
  int32_t tokens = 16;  // of each rank in a step
  std::string dtype = "auto";
  double bandwidth_mb = 0.0;
  double share = 0.05;
  uint64_t slice_bytes = 1 << 20, chunk_bytes = 256 << 10;
  std::string json;
};

// `ballast bench rebalance`, under mpirun: what a migration does to the steps that it runs beside.
// Steps of decoding through MoE layers, with a quarter of all copies moving in every second block
// of steps and none in the others, so that noise of the machine falls on both. Prints medians and
// p99, and writes JSON. Returns the exit code: 1 when any output has other bits than at the start.
// COLLECTIVE over the ranks of the job
// ERRORS kInvalidArgument names the flag, the value and what is allowed
absl::StatusOr<int> RunRebalanceBench(const RebalanceBenchFlags& flags, int* argc, char*** argv);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_BENCH_REBALANCE_H_
