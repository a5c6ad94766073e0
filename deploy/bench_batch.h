#ifndef BALLAST_DEPLOY_BENCH_BATCH_H_
#define BALLAST_DEPLOY_BENCH_BATCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

struct BatchBenchFlags {
  std::vector<std::string> traces;  // .npy ids, read as one sequence; none: drawn traffic
  std::string constants;            // JSON of CostConstantsFromJson; "": the defaults
  int32_t ranks = 8;
  int32_t slots = 72;
  std::string json;
  std::string report;
};

// `ballast bench batch`: the predicted time of the slowest rank at 1, 2, 4 ... 16,384 tokens under
// the exact split, with every expert's rows on one host, and under the cost split. Prints a table,
// writes JSON and a page. Returns the exit code: 1 when in any layer and step the cost split is
// worse than the better of the others.
// ERRORS kInvalidArgument names the flag or the file, the value and what is allowed
absl::StatusOr<int> RunBatchBench(const BatchBenchFlags& flags);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_BENCH_BATCH_H_
