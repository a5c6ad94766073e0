// How an engine passes from one group of ranks to the next (group_leader.h).
#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "runtime/engine.h"

namespace ballast {

// The step cannot go on for want of others. The leader may know better who is missing.
absl::Status Engine::TellTrouble(const absl::Status& why) {
  TroubleFrame trouble{.generation = group_.generation, .missing = {}};
  for (const int member : comm_->missing()) trouble.missing.push_back(group_.ranks[member]);
  LogWarning("engine", std::string(why.message()));
  if (!channel_->Send(Serialize(RankFrame{std::move(trouble)})).ok()) return why;
  return absl::OkStatus();
}

absl::Status Engine::Regroup() {
  bool serves = false, parked = false;
  halted_ns_ = NowNs();
  while (!serves || !group_inbox_.empty()) {
    BALLAST_ASSIGN_OR_RETURN(const LeaderFrame frame, NextGroupFrame(/*patient=*/parked));
    if (stopping_ != StopKind::kNone) return absl::OkStatus();
    if (const auto* halt = std::get_if<HaltFrame>(&frame.body)) {
      serves = false;
      if (parked) {
        // It is called back: what was said before was not for it, what is said from now on is.
        halted_ns_ = NowNs();
        std::erase_if(inbox_, [&frame](const LeaderFrame& other) {
          return other.wake_seq <= frame.wake_seq;
        });
        wake_seq_ = std::max(wake_seq_, frame.wake_seq);
        parked = false;
      }
      BALLAST_RETURN_IF_ERROR(ReportHalted(*halt));
      continue;
    }
    const auto& resume = std::get<ResumeFrame>(frame.body);
    Group group = GroupOf(resume, base_transport_->rank());
    serves = group.member >= 0;
    parked = !serves;
    if (serves) {
      const absl::Status resumed = Resume(resume, std::move(group));
      // Told to halt again on the way.
      serves = !absl::IsAborted(resumed) || group_inbox_.empty();
      if (serves) BALLAST_RETURN_IF_ERROR(resumed);
    } else {
      Park();
    }
  }
  return absl::OkStatus();
}

// The next word on the group. One that is parked waits as long as it takes, and hears of nothing
// else but the end, of which it may have heard before.
absl::StatusOr<LeaderFrame> Engine::NextGroupFrame(bool patient) {
  const int64_t deadline = NowNs() + options_.halt_timeout_ms * 1'000'000;
  while (true) {
    BALLAST_RETURN_IF_ERROR(TakeFrames());
    if (!group_inbox_.empty()) {
      LeaderFrame frame = std::move(group_inbox_.front());
      group_inbox_.pop_front();
      return frame;
    }
    if (patient) {
      for (const LeaderFrame& other : inbox_) {
        const auto* stop = std::get_if<StopFrame>(&other.body);
        if (stop == nullptr) continue;
        stop_ = stop->complete ? StopKind::kComplete : StopKind::kIncomplete;
      }
      stopping_ = stop_;
      if (stopping_ != StopKind::kNone) return LeaderFrame{};
      if (!inbox_.empty()) wake_seq_ = inbox_.back().wake_seq;
      inbox_.clear();
    } else if (NowNs() > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", base_transport_->rank(), " heard nothing from the leader for ",
                       options_.halt_timeout_ms, " ms and cannot go on"));
    }
    BALLAST_RETURN_IF_ERROR(channel_->WaitReadable(/*timeout_ms=*/100).status());
  }
}

absl::Status Engine::ReportHalted(const HaltFrame& frame) {
  // What is finished counts.
  BALLAST_RETURN_IF_ERROR(SendEvents());
  return channel_->Send(Serialize(RankFrame{ReportTo(frame, protocol_->step(), *rebalancer_)}));
}

absl::Status Engine::Resume(const ResumeFrame& frame, Group group) {
  BALLAST_ASSIGN_OR_RETURN(const Regrouped regrouped, Follow(frame, group, rebalancer_.get()));
  // Also if this rank is told to halt again before it has joined.
  committed_plan_id_ = std::max(committed_plan_id_, frame.commit_plan_id);
  BALLAST_RETURN_IF_ERROR(JoinGroup(std::move(group), frame.step));
  observer_->OnRegrouped({.group = group_,
                          .reloads = static_cast<int32_t>(regrouped.reloads.size()),
                          .pause_ns = NowNs() - halted_ns_,
                          .committed_plan_id = committed_plan_id_},
                         regrouped.placement);
  return absl::OkStatus();
}

// Serves no more until it is called back: its sequences go on elsewhere.
void Engine::Park() {
  rebalancer_->GiveUp();
  scheduler_->Clear();
  events_.clear();
  ShowLoad();
  observer_->OnParked();
}

}  // namespace ballast
