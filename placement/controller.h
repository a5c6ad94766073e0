#ifndef BALLAST_PLACEMENT_CONTROLLER_H_
#define BALLAST_PLACEMENT_CONTROLLER_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/migration_plan.h"
#include "placement/placement.h"
#include "placement/policy.h"
#include "placement/split.h"
#include "placement/step_counts.h"

namespace ballast {

struct ControllerOptions {
  std::string policy = "eplb";
  int32_t num_groups = 1;
  double rho = 0.1;      // transfer of one copy, in ideal times of a layer and batch
  bool in_step = false;  // plans serve the very step whose counts made them
  PlacementRules rules = {};
  // Batches and windows per kind of token; false: one for all. In-step plans are for a step as a
  // whole: they have one for all in any case.
  bool separate_kinds = true;
  int64_t batch_tokens = 1;        // tokens per batch for planners that look at batches
  int64_t window_tokens = 8192;    // tokens of a kind that a decision looks back over
  int32_t min_steps_between = 16;  // steps between the end of one plan and the next
  int32_t force_every_steps = 0;   // 0: by trigger; N: plan every N steps whatever the gain
  double min_gain = 0.02;          // smallest fall of imbalance (max/mean) that is worth moving for
  int32_t max_incoming_per_rank = 0;  // copies that one plan may bring to a rank; 0: no limit
  int32_t layers_per_plan = 0;        // most layers that one plan changes; 0: no limit
  int32_t backoff_steps = 256;        // after an aborted plan; for force_every_steps too
  bool retry_from_file = false;       // after an aborted plan, see Controller
  int64_t last_plan_id = 0;           // plans are numbered from the next one
  double copy_burst = 0.0;  // most copies that may go unused and be made later; 0: no budget
};

// Why the controller decided as it did, for metrics and logs.
enum class Decision {
  kNone,
  kPlanned,
  kWindowNotFull,
  kTooSoon,
  kInFlight,
  kNothingToGain,
  kPolicyStays,
  kOverBudget,
  kPlannerFailed
};
const char* NameOf(Decision decision);

// Watches loads and says which experts to copy where. A pure state machine: no clock, no I/O, no
// threads; the same calls give the same plans, byte for byte, in a server and in a replay.
//
//   gain of a layer = T(window, placement in force) / mean - T(window, policy's row) / mean
//
// where T is the largest rank load under the exact split, window the sum of the windows of both
// kinds of token, and mean its load per rank.
// Layers whose gain is at least min_gain take the policy's row; a policy that meters itself needs
// no gate, and one with an interval takes its rows when it is over, from a window of those steps.
//
// Prefill and decode gather apart: a batch for the planners holds tokens of one kind, so that a
// planner can look for a row that is good at each. That is enough, because for any loads a and b
//
//   T(a + b) <= T(a) + T(b)
//
// (splitting each in its best way is one way to split their sum): a row that is within a factor of
// balance for each kind is within it for every mix of the two. A batch that is a part of its step
// weighs as that part. And each kind keeps a window of its
// own last window_tokens tokens, so a long prompt does not flush out what generation did. A policy
// that plans from a window is given the sum of both, in which a token is a token and the rarer kind
// weighs up to as much as the other. The windows count as full when they hold window_tokens
// together. A kind that has ended keeps its window.
//
// Under max_incoming_per_rank the layers with the largest gain go first, and one that would bring
// any rank over the limit waits for a later plan.
//
// With layers_per_plan the layers with the largest gain go first, and the others follow in plans of
// their own: the next as soon as the one before is committed, whatever min_steps_between says. An
// abort drops those that have not begun, and so do Vacate and want of credit.
//
// Under a budget (copy_burst > 0) a plan is made of credit, which begins at copy_burst and grows by
// GrantCopies up to it:
//
//   copies of all plans of Decide between two moments <= grants between them + copy_burst
//
// The layers with the largest gain go first; the first that credit does not last for, and all after
// it, wait, so that none is passed over for good. A forced plan waits too. An aborted plan's copies
// are spent: their bytes may have travelled.
//
// With retry_from_file, the plan after an aborted one takes its copies from the checkpoint, the one
// after that from ranks again if it is aborted too, and so on until a plan is committed: whatever
// is wrong with one kind of source, the other does not share it.
//
// Call order: ((GrantCopies | OnStep)* Decide? (OnCommitted | OnAborted)?)*. At most one plan is in
// flight.
class Controller {
 public:
  // ERRORS kInvalidArgument: an unknown policy, one that does not support the placement, or an
  //        option out of range (the message names it). max_incoming_per_rank may not be less than
  //        the slots of the largest rank, and copy_burst not less than the slots of a layer, or one
  //        layer alone could be too much for any plan.
  static absl::StatusOr<std::unique_ptr<Controller>> Create(ControllerOptions options,
                                                            Placement initial);
  // The same with a policy that no name stands for.
  static absl::StatusOr<std::unique_ptr<Controller>> CreateWith(std::unique_ptr<Policy> policy,
                                                                ControllerOptions options,
                                                                Placement initial);

  // Counts of one step. ORDER planners get the batch of prefill before that of decode
  void OnStep(int64_t step, const StepCounts& counts);

  // Adds to the credit. REQUIRES copies >= 0
  void GrantCopies(double copies);

  // A plan to start now, or nothing; `why` says which. `force` plans regardless of gain and of the
  // steps since the last plan (POST /v1/rebalance), but not while one is in flight, and not before
  // any token was counted.
  std::optional<MigrationPlan> Decide(int64_t step, bool force, Decision* why);

  // A plan that gives other ranks copies of what only `rank` holds, as much as
  // max_incoming_per_rank allows at a time; nothing where that is nothing, or where the others have
  // no room. An operator asked for it, so it takes no credit. REQUIRES none in flight, another rank
  std::optional<MigrationPlan> Vacate(int64_t step, int32_t rank);

  // REQUIRES plan_id is the plan in flight.
  void OnCommitted(int64_t plan_id, int64_t step);
  void OnAborted(int64_t plan_id, int64_t step);

  const Placement& placement() const { return placement_; }  // the placement in force
  // What was wrong with the row of a policy, after Decide said kPlannerFailed. It is left alone for
  // backoff_steps then.
  const absl::Status& planner_failure() const { return planner_failure_; }
  bool in_flight() const { return target_.has_value(); }
  // Layers are left for the next plan (layers_per_plan), which Decide gives at once.
  bool has_more() const { return !rest_.empty(); }
  int64_t last_plan_id() const { return last_plan_id_; }

  // Tokens in the windows of both kinds.
  int64_t window_tokens() const;
  // [E] copies per logical expert in them.
  std::span<const int64_t> window_load(int32_t layer) const;

 private:
  // Consecutive steps, summed: at least a sixteenth of the window, but for the last one.
  struct Chunk {
    int64_t num_tokens = 0;
    std::vector<int64_t> counts;  // [num_layers * E]
  };
  // Of one kind.
  struct Window {
    std::deque<Chunk> chunks;
    int64_t num_tokens = 0;  // in all chunks
  };
  // Steps of one kind that were not yet handed to the planners.
  struct Batch {
    int64_t num_tokens = 0;
    std::vector<int32_t> counts;  // [num_layers * E]
  };
  struct Candidate {
    Placement::LayerRow row;
    double gain = 0.0;
  };

  Controller(ControllerOptions options, Placement initial, std::unique_ptr<Policy> policy);
  void AddToBatch(TokenKind kind, int64_t num_tokens, std::span<const int32_t> counts,
                  int64_t step_tokens);
  void HandOverBatch(TokenKind kind, int64_t step_tokens);
  void AddToWindow(TokenKind kind, int64_t num_tokens, std::span<const int32_t> counts);
  void ForgetWindows();
  std::vector<Candidate> WantedRows(bool forced, bool* policy_stays);
  absl::Status CheckRow(int32_t layer, std::span<const int32_t> row) const;
  void MeasureGains(std::vector<Candidate>* wanted) const;
  std::vector<Placement::LayerRow> WithinLimits(std::vector<Candidate> candidates);
  bool IsFull(size_t num_layers) const;  // a plan of so many
  MigrationPlan Start(std::vector<Placement::LayerRow> rows, int64_t step);
  double Imbalance(const LayerHosts& hosts, std::span<const int64_t> load) const;

  ControllerOptions options_;
  const bool separate_kinds_;
  Placement placement_;
  std::unique_ptr<Policy> policy_;
  std::vector<std::unique_ptr<LayerPlanner>> planners_;  // [num_layers]
  PerKind<Window> windows_;
  Chunk spare_;  // memory of the chunk that left a window last
  int64_t window_steps_ = 0;
  std::vector<int64_t> window_sums_;  // [num_layers * E] over windows_
  PerKind<Batch> batches_;
  std::vector<int32_t> joint_;   // [num_layers * E] a step of both kinds, where kinds are one
  std::vector<Candidate> rest_;  // of the plan before, over layers_per_plan
  bool new_batch_ = false;       // the planners have seen one since the last plan was asked for
  double credit_;                // copies that may be made now
  CopySource source_ = CopySource::kRanks;  // of the next plan
  std::optional<Placement> target_;         // where the plan in flight leads
  absl::Status planner_failure_;
  int64_t last_plan_id_ = 0;
  int64_t last_start_ = 0;           // step of the last plan's start
  int64_t not_before_ = 0;           // no plan before this step, unless forced by the caller
  int64_t not_before_by_abort_ = 0;  // the same after an abort; holds for force_every_steps too
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_CONTROLLER_H_
