#include "runtime/rebalancer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "placement/placement_check.h"

namespace ballast {

Rebalancer::Rebalancer(const Options& options, CopyStore* store, Placement initial,
                       std::function<void(const Placement&)> on_flip)
    : options_(options),
      budget_(options.slice),
      store_(store),
      placement_(std::move(initial)),
      on_flip_(std::move(on_flip)) {}

std::optional<Placement> Rebalancer::staged_placement() const {
  return vote_ == Vote::kStaged ? target_ : std::nullopt;
}

void Rebalancer::OnPlan(MigrationPlan plan) {
  last_plan_id_ = plan.plan_id;
  // Made before the ranks regrouped: nobody carries it out, and nobody waits for it.
  if (plan.base_epoch < placement_.epoch()) return;
  // What is wrong with a plan is wrong on every rank: then none of them stages any of it.
  auto target = plan.Apply(placement_);
  absl::Status status = target.status();
  if (status.ok()) status = CheckLayers(*target, plan.rows);
  if (status.ok()) status = store_->Stage(plan, placement_);
  if (plan.plan_id <= aborted_through_) {
    // The others gave it up before it got here, and may have sent parts of it: take these in.
    if (status.ok()) store_->Discard();
    return;
  }
  if (target.ok()) target_ = *std::move(target);
  if (!status.ok()) LogWarning("rebalancer", std::string(status.message()));
  plan_ = std::move(plan);
  plan_began_ns_ = options_.now_ns();
  budget_.Restart(plan_began_ns_);
  vote_ = status.ok() ? Vote::kStaging : Vote::kFailed;
}

void Rebalancer::Slice(SliceOf of) {
  if (!store_->staging()) return;
  const TransferBudget most = budget_.Open(options_.now_ns(), of);
  if (most.send <= 0 && most.receive <= 0) return;
  TransferBudget left = most;
  int64_t now_ns = 0;
  bool moved = true;
  // A chunk each way at a time, so that the time is looked at in between.
  while (moved && store_->staging()) {
    TransferBudget one{std::min<int64_t>(left.send, 1), std::min<int64_t>(left.receive, 1)};
    const TransferBudget before = one;
    const auto done = store_->Poll(&one);
    left.send -= before.send - one.send;
    left.receive -= before.receive - one.receive;
    if (!done.ok()) {
      LogWarning("rebalancer", std::string(done.status().message()));
      vote_ = Vote::kFailed;
    } else if (*done && vote_ == Vote::kStaging) {
      vote_ = Vote::kStaged;
    }
    now_ns = options_.now_ns();
    moved = (one.send < before.send || one.receive < before.receive) && budget_.HasTime(now_ns);
  }
  budget_.Close(now_ns, most.send - left.send, most.receive - left.receive);
}

PlanCommand Rebalancer::Judge(std::span<const PlanVote> votes, int64_t now_ns) {
  if (!plan_.has_value()) return {};
  bool all_staged = true, failed = false;
  for (const PlanVote& vote : votes) {
    const bool ours = vote.plan_id == plan_->plan_id;
    all_staged = all_staged && ours && vote.vote == Vote::kStaged;
    failed = failed || (ours && vote.vote == Vote::kFailed);
  }
  const bool late = now_ns - plan_began_ns_ > options_.plan_deadline_ms * 1'000'000;
  if (failed || (late && !all_staged)) return {plan_->plan_id, Command::kAbort};
  return all_staged ? PlanCommand{plan_->plan_id, Command::kFlip} : PlanCommand{};
}

absl::StatusOr<Rebalancer::Outcome> Rebalancer::Execute(PlanCommand command) {
  if (command.command == Command::kNone) return Outcome{};
  const int64_t began = options_.now_ns();
  Outcome outcome{.done = command.command, .plan_id = command.plan_id};
  const bool have_it = plan_.has_value() && plan_->plan_id == command.plan_id;
  if (have_it) {
    outcome.copies = static_cast<int32_t>(plan_->moves.size());
    for (const Move& move : plan_->moves) {
      outcome.own_copies += placement_.topology().rank_of_slot(move.to_slot) == options_.rank;
    }
    outcome.own_bytes = outcome.own_copies * static_cast<int64_t>(store_->block_bytes());
  }
  if (command.command == Command::kFlip) {
    if (!have_it || vote_ != Vote::kStaged) {
      return absl::InternalError(absl::StrCat("rank ", options_.rank, " was told to flip plan ",
                                              command.plan_id, ", which it has not staged"));
    }
    Commit();
  } else {
    aborted_through_ = std::max(aborted_through_, command.plan_id);
    if (have_it) store_->Discard();
  }
  if (have_it) {
    plan_.reset();
    target_.reset();
    vote_ = Vote::kNone;
  }
  outcome.stall_ns = options_.now_ns() - began;
  return outcome;
}

void Rebalancer::Commit() {
  store_->Commit(*target_);
  placement_ = *std::move(target_);
  if (on_flip_) on_flip_(placement_);
}

void Rebalancer::GiveUp() {
  store_->Abandon();
  plan_.reset();
  target_.reset();
  vote_ = Vote::kNone;
}

absl::StatusOr<Regrouped> Rebalancer::Regroup(int64_t commit_plan_id, int64_t epoch,
                                              std::span<const GroupMember> members, int32_t rank) {
  if (placement_.epoch() < epoch) {
    if (vote_ != Vote::kStaged || plan_->plan_id != commit_plan_id) {
      return absl::InternalError(absl::StrCat("rank ", options_.rank, " is at epoch ",
                                              placement_.epoch(), " and has not staged plan ",
                                              commit_plan_id, ", which leads to epoch ", epoch));
    }
    Commit();
  } else {
    store_->Abandon();
  }
  if (placement_.epoch() != epoch) {
    return absl::InternalError(absl::StrCat("rank ", options_.rank, " is at epoch ",
                                            placement_.epoch(), ", the others are at ", epoch));
  }
  plan_.reset();
  target_.reset();
  vote_ = Vote::kNone;
  BALLAST_ASSIGN_OR_RETURN(Regrouped regrouped, ballast::Regroup(placement_, members, epoch + 1));
  BALLAST_RETURN_IF_ERROR(CheckPlacement(regrouped.placement));
  placement_ = regrouped.placement;
  options_.rank = rank;
  return regrouped;
}

}  // namespace ballast
