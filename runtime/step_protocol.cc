#include "runtime/step_protocol.h"

#include <algorithm>
#include <type_traits>

#include "base/status.h"

namespace ballast {
namespace {

constexpr int32_t kLeader = 0;
static_assert(std::is_trivially_copyable_v<StepHeader>);

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
  // An aborted plan has ended when every member has received it and has nothing of it under way any
  // more. Until then the controller must not send another: its messages would meet the old ones.
  if (aborted_.has_value() && std::ranges::all_of(headers, [this](const StepHeader& h) {
        return h.busy == 0 && h.last_plan_id >= aborted_->plan_id;
      })) {
    opening.ended = std::exchange(aborted_, std::nullopt);
  }
  const StepHeader& leader = headers[kLeader];
  opening.stop = leader.stop;
  BALLAST_ASSIGN_OR_RETURN(const Rebalancer::Outcome outcome,
                           rebalancer_->Execute({leader.command_plan_id, leader.command}));
  if (outcome.done == Command::kFlip) {
    opening.ended = outcome;
  } else if (outcome.done == Command::kAbort) {
    aborted_ = outcome;
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
