#ifndef BALLAST_DEPLOY_DEMO_DRIVER_MEASURES_H_
#define BALLAST_DEPLOY_DEMO_DRIVER_MEASURES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "deploy/demo/driver/run_record.h"

namespace ballast {

// Consecutive steps are one window until they have this many tokens.
inline constexpr int64_t kWindowTokens = 4096;

// The figures of one phase of one run. Imbalance is max over ranks of load / mean; 1 is perfect.
struct PhaseMeasures {
  double imbalance = 1;          // of the windows' summed loads: mean over windows and layers
  double step_imbalance = 1;     // of single steps: plain mean over steps with tokens and layers
  double settled_imbalance = 1;  // as `imbalance`, over the second half of the windows
  double critical_path_ms = 0;   // largest processor time of a rank in a step: mean over steps
  double step_ms_p50 = 0, step_ms_p99 = 0;  // wall time of steps with tokens (nearest rank)
  double tokens_per_s = 0;                  // tokens routed / wall time of the phase
  int64_t copies_moved = 0;
};

PhaseMeasures Measure(const PhaseRecord& phase);

struct PhaseComparison {
  std::string name;
  PhaseMeasures fixed;  // the run with the static placement
  PhaseMeasures dynamic;
};

struct Comparison {
  std::vector<PhaseComparison> phases;
  bool texts_identical = true;
  std::string first_difference;  // empty where they are identical
  int64_t ranks = 0;
  int64_t cores = 0;
};

// ERRORS kInvalidArgument: the runs are not of the same requests; a phase has no steps
absl::StatusOr<Comparison> Compare(const RunRecord& fixed, const RunRecord& dynamic);

// result.json.
std::string ToJson(const Comparison& comparison);

// The table for a terminal, and what to keep in mind when reading it.
std::string ToTable(const Comparison& comparison);

// "oversubscribed: N ranks on M cores", or nothing where every rank can have a core.
std::optional<std::string> Oversubscribed(const Comparison& comparison);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_DEMO_DRIVER_MEASURES_H_
