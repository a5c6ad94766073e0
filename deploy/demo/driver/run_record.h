// What one run of the demo left behind: the steps that the server logged and the requests that the
// driver sent.
#ifndef BALLAST_DEPLOY_DEMO_DRIVER_RUN_RECORD_H_
#define BALLAST_DEPLOY_DEMO_DRIVER_RUN_RECORD_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// One line of the server's `--step-log`.
struct StepRecord {
  int64_t step = 0;
  int64_t unix_us = 0;  // end of the step
  int64_t wall_us = 0;
  int64_t tokens = 0;  // over all ranks
  int64_t epoch = 0;
  int64_t copies = 0;                      // expert copies put in force at this step's flip
  std::vector<int64_t> cpu_us;             // [R]
  std::vector<std::vector<int64_t>> load;  // [L][R] (token, k) copies computed by each rank
};

struct RequestRecord {
  int64_t index = 0;
  double latency_ms = 0;
  std::vector<int32_t> token_ids;
};

struct PhaseRecord {
  std::string name;
  int64_t begin_us = 0, end_us = 0;
  double tokens_per_s = 0;  // generated, as the clients saw it
  std::vector<RequestRecord> requests;
  std::vector<StepRecord> steps;
};

struct RunRecord {
  int64_t cores = 0;  // of the machine
  int64_t seed = 0;
  int64_t concurrency = 0;
  int64_t max_tokens = 0;
  std::vector<PhaseRecord> phases;
};

// ERRORS kInvalidArgument with the line's number: a line that is not a step. An unfinished last
// line is left out.
absl::StatusOr<std::vector<StepRecord>> ParseStepLog(std::string_view text);

// Gives each phase the steps that ended in it, up to the beginning of the next phase.
void AssignSteps(const std::vector<StepRecord>& steps, std::vector<PhaseRecord>* phases);

std::string ToJson(const RunRecord& run);
absl::StatusOr<RunRecord> ParseRunRecord(std::string_view text);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_DEMO_DRIVER_RUN_RECORD_H_
