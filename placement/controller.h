#ifndef BALLAST_PLACEMENT_CONTROLLER_H_
#define BALLAST_PLACEMENT_CONTROLLER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "placement/migration_plan.h"
#include "placement/placement.h"
#include "placement/policy.h"
#include "placement/split.h"

namespace ballast {

struct ControllerOptions {
  std::string policy = "eplb";
  int32_t num_groups = 1;
  int64_t window_tokens = 8192;      // tokens per layer that a decision looks back over
  int32_t min_steps_between = 16;    // steps between the end of one plan and the next
  int32_t force_every_steps = 0;     // 0: by trigger; N: plan every N steps whatever the gain (tests)
  double min_gain = 0.02;            // smallest fall of imbalance (max/mean) that is worth moving for
  int32_t max_incoming_per_rank = 0; // copies that one plan may bring to a rank; 0: no limit
  int32_t backoff_steps = 256;       // after an aborted plan
};

// Why the controller decided as it did, for metrics and logs.
enum class Decision { kNone, kPlanned, kWindowNotFull, kTooSoon, kInFlight, kNothingToGain, kPolicyStays };
const char* NameOf(Decision decision);

// Watches loads and says which experts to copy where. A pure state machine: no clock, no I/O, no
// threads; the same calls give the same plans, byte for byte, in a server and in a replay.
//
// Call order: (OnStep Decide? (OnCommitted | OnAborted)?)*. At most one plan is in flight.
class Controller {
 public:
  static absl::StatusOr<std::unique_ptr<Controller>> Create(ControllerOptions options,
                                                            Placement initial);

  // Counts of one step, folded to logical experts under the epoch they were counted in.
  // SHAPES counts [num_layers * E] copies over all ranks   num_tokens: tokens of the step
  void OnStep(int64_t step, int64_t num_tokens, std::span<const int32_t> counts);

  // A plan to start now, or nothing; `why` says which. `force` plans regardless of gain and of the
  // steps since the last plan (POST /v1/rebalance), but not while one is in flight.
  std::optional<MigrationPlan> Decide(int64_t step, bool force, Decision* why);

  void OnCommitted(int64_t plan_id, int64_t step);
  void OnAborted(int64_t plan_id, int64_t step);

  const Placement& placement() const;  // the placement in force
  bool in_flight() const;

 private:
  explicit Controller(ControllerOptions options, Placement initial, std::unique_ptr<Policy> policy);
  struct LayerWindow;

  ControllerOptions options_;
  Placement placement_;
  std::unique_ptr<Policy> policy_;
  // The implementer adds the windows and the state of the plan in flight here.
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_CONTROLLER_H_
