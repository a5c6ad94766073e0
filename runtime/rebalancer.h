#ifndef BALLAST_RUNTIME_REBALANCER_H_
#define BALLAST_RUNTIME_REBALANCER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "placement/migration_plan.h"
#include "placement/placement.h"
#include "placement/regroup.h"
#include "runtime/copy_store.h"
#include "runtime/slice_budget.h"

namespace ballast {

// A rank's word on the plan it was told to stage.
enum class Vote : uint8_t {
  kNone,  // no plan, or none yet
  kStaging,
  kStaged,  // everything is here and verified
  kFailed,
};

// What the leader tells all ranks to do at this very step.
enum class Command : uint8_t { kNone, kFlip, kAbort };

struct PlanVote {
  int64_t plan_id = 0;
  Vote vote = Vote::kNone;
};

struct PlanCommand {
  int64_t plan_id = 0;
  Command command = Command::kNone;
};

// Carries out migration plans on one rank, as a two-phase commit: stage and verify, vote, then flip
// at the step at which the leader says so, or abort and stay.
//
// The votes and the leader's command travel in the step header, which every rank gets whole; so all
// ranks flip at the same step, and a placement is in force on all of them or on none. Where ranks
// are lost between the command and its execution, Regroup brings the others together again.
// THREADS one (the step thread).
class Rebalancer {
 public:
  struct Options {
    int32_t rank = 0;
    SliceBudget::Options slice = {};
    int64_t plan_deadline_ms = 30'000;        // from the leader's receipt of a plan to its flip
    std::function<int64_t()> now_ns = NowNs;  // any monotonic clock
  };
  // `on_flip` (may be empty) is called when a plan is in force in the store: tables are to change.
  Rebalancer(const Options& options, CopyStore* store, Placement initial,
             std::function<void(const Placement&)> on_flip = {});

  const Placement& placement() const { return placement_; }
  // After the staged plan, if it is staged.
  std::optional<Placement> staged_placement() const;

  // A plan from the leader: starts to stage it. What is wrong with it becomes the vote.
  void OnPlan(MigrationPlan plan);
  // Advances the transfers a little, as the budget of slices allows. Never fails: what goes wrong
  // becomes the vote.
  void Slice(SliceOf of);
  PlanVote vote() const { return {plan_.has_value() ? plan_->plan_id : 0, vote_}; }
  // The newest plan that has reached this rank; 0: none.
  int64_t last_plan_id() const { return last_plan_id_; }
  // Transfers are under way: steps must go on even if nobody has tokens.
  bool busy() const { return plan_.has_value() || store_->draining(); }

  // Leader only: what to command at the next step, from the votes of all ranks at this one.
  PlanCommand Judge(std::span<const PlanVote> votes, int64_t now_ns);

  // Executes the leader's command.
  // ERRORS kInternal: told to flip a plan that is not staged here
  struct Outcome {
    Command done = Command::kNone;
    int64_t plan_id = 0;
    int32_t copies = 0;      // experts that entered a rank by the plan, over all ranks
    int32_t own_copies = 0;  // of these, on this rank
    int64_t own_bytes = 0;   // of their parameters
    int64_t stall_ns = 0;    // time that the step thread was held up
  };
  absl::StatusOr<Outcome> Execute(PlanCommand command);

  // Gives up what is staged, without the others.
  void GiveUp();
  // This rank comes to a group that has `placement` in force. REQUIRES no plan is staged
  void Adopt(Placement placement) { placement_ = std::move(placement); }
  // Other ranks go on than before, this one as `rank`. First `commit_plan_id` (0: none) is put in
  // force if it is not yet, or what is staged is given up; then the placement is regrouped under
  // the epoch after that. The caller brings the store into line with it.
  // ERRORS kInternal: the plan is neither in force nor staged here, or `epoch` is not reached
  absl::StatusOr<Regrouped> Regroup(int64_t commit_plan_id, int64_t epoch,
                                    std::span<const GroupMember> members, int32_t rank);

 private:
  void Commit();

  Options options_;
  SliceBudget budget_;
  CopyStore* store_;
  Placement placement_;
  std::function<void(const Placement&)> on_flip_;
  std::optional<MigrationPlan> plan_;
  std::optional<Placement> target_;
  Vote vote_ = Vote::kNone;
  int64_t plan_began_ns_ = 0;
  int64_t last_plan_id_ = 0;
  int64_t aborted_through_ = 0;  // plans up to this id are dead, should one arrive late
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_REBALANCER_H_
