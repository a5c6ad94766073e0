#include "runtime/step_protocol.h"

#include <algorithm>
#include <type_traits>

#include "base/status.h"

namespace ballast {
namespace {

constexpr int32_t kLeader = 0;
static_assert(std::is_trivially_copyable_v<StepHeader>);

// What most members say; at a tie the one that the lowest member says.
uint64_t MostCommonChoice(std::span<const StepHeader> headers) {
  uint64_t best = 0;
  int64_t most = 0;
  for (const StepHeader& h : headers) {
    const int64_t count = std::ranges::count(headers, h.choice_hash, &StepHeader::choice_hash);
    if (count > most) best = h.choice_hash;
    most = std::max(most, count);
  }
  return best;
}

}  // namespace

StepHeader StepProtocol::Begin(const Wish& wish) {
  const PlanVote vote = rebalancer_->vote();
  StepHeader mine{};
  mine.step = ++step_;
  mine.wake_seq = wish.wake_seq;
  mine.vote_plan_id = vote.plan_id;
  mine.vote = vote.vote;
  mine.last_plan_id = rebalancer_->last_plan_id();
  mine.last_cpu_us = wish.last_cpu_us;
  mine.choice_hash = wish.choice_hash;
  mine.num_tokens = wish.num_tokens;
  mine.num_prefill = wish.num_prefill;
  mine.busy = rebalancer_->busy();
  if (member_ == kLeader) {
    mine.command_plan_id = next_command_.plan_id;
    mine.command = next_command_.command;
    mine.stop = wish.stop;
    mine.record_ids = wish.record_ids;
    next_command_ = {};
  }
  return mine;
}

absl::StatusOr<StepProtocol::Opening> StepProtocol::Open(std::span<const StepHeader> headers,
                                                         int64_t now_ns) {
  for (size_t r = 0; r < headers.size(); ++r) {
    if (headers[r].step != step_) {
      return absl::InternalError(absl::StrCat("member ", r, " opens step ", headers[r].step,
                                              ", member ", member_, " step ", step_));
    }
  }
  Opening opening;
  const uint64_t choice = MostCommonChoice(headers);
  for (const StepHeader& h : headers) opening.num_dissenters += h.choice_hash != choice;
  if (headers[static_cast<size_t>(member_)].choice_hash != choice) {
    return absl::InternalError(absl::StrCat("member ", member_, " chose other replicas in step ",
                                            step_ - 1,
                                            " than the others: it can no longer be trusted"));
  }
  // An aborted plan has ended when every member has received it and has nothing of it under way any
  // more. Until then the controller must not send another: its messages would meet the old ones.
  if (aborted_.has_value() && std::ranges::all_of(headers, [this](const StepHeader& h) {
        return h.busy == 0 && h.last_plan_id >= aborted_->plan_id;
      })) {
    opening.ended = std::exchange(aborted_, std::nullopt);
  }
  if (aborted_.has_value() && member_ == kLeader && now_ns - aborted_ns_ > drain_deadline_ns_) {
    return absl::DeadlineExceededError(
        absl::StrCat("messages of plan ", aborted_->plan_id, ", which was given up, are missing"));
  }
  const StepHeader& leader = headers[kLeader];
  opening.stop = leader.stop;
  BALLAST_ASSIGN_OR_RETURN(const Rebalancer::Outcome outcome,
                           rebalancer_->Execute({leader.command_plan_id, leader.command}));
  if (outcome.done == Command::kFlip) {
    opening.ended = outcome;
  } else if (outcome.done == Command::kAbort) {
    aborted_ = outcome;
    aborted_ns_ = now_ns;
  } else if (member_ == kLeader) {
    std::vector<PlanVote> votes;
    for (const StepHeader& h : headers) votes.push_back({h.vote_plan_id, h.vote});
    next_command_ = rebalancer_->Judge(votes, now_ns);
  }
  opening.busy = next_command_.command != Command::kNone || aborted_.has_value();
  opening.same_wake = true;
  for (const StepHeader& h : headers) {
    opening.run = opening.run || h.num_tokens > 0;
    opening.busy = opening.busy || h.busy != 0;
    opening.same_wake = opening.same_wake && h.wake_seq == headers[0].wake_seq;
  }
  return opening;
}

}  // namespace ballast
