// The I/O thread of a front end.
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"
#include "runtime/frontend_state.h"

namespace ballast {
namespace {

constexpr int64_t kNsPerMs = 1'000'000;

RequestEnd EndOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kCancelled:
      return RequestEnd::kCancelled;
    case FinishReason::kDeadline:
      return RequestEnd::kDeadline;
    case FinishReason::kFailed:
      return RequestEnd::kFailed;
    default:
      return RequestEnd::kFinished;
  }
}

}  // namespace

// ---- both, under the mutex ---------------------------------------------------------------------

void Frontend::State::CountLocked(RequestEnd end) {
  switch (end) {
    case RequestEnd::kFinished:
      ++counts_.finished;
      break;
    case RequestEnd::kCancelled:
      ++counts_.cancelled;
      break;
    case RequestEnd::kDeadline:
      ++counts_.deadline;
      break;
    case RequestEnd::kFailed:
      ++counts_.failed;
      break;
    case RequestEnd::kRejected:
      ++counts_.rejected;
      break;
  }
  if (options_.on_end) options_.on_end(end);
}

void Frontend::State::AbandonLocked(uint64_t id, FinishReason reason) {
  const int rank = book_.End(id, reason);
  CountLocked(EndOf(reason));
  // Where no rank works on it, none needs to know. A broken channel is dealt with there.
  if (rank >= 0) BroadcastLocked(rank, CancelFrame{id}).IgnoreError();
  WakeIo();
}

void Frontend::State::EndAllLocked(FinishReason reason) {
  while (const auto id = book_.first()) {
    book_.End(*id, reason);
    CountLocked(EndOf(reason));
  }
}

void Frontend::State::FailLocked(int rank, absl::Status status) {
  if (failed_) return;
  failed_ = true;
  failed_rank_ = rank;
  failure_ = std::move(status);
  EndAllLocked(FinishReason::kFailed);
  WakeIo();
}

void Frontend::State::LoseLocked(int rank, absl::Status why) {
  closed_[rank] = true;
  // Once all are told to stop, ranks go as they end.
  if (group_.is_lost(rank) || stopped_) return;
  group_.OnLost(rank, std::move(why), NowNs());
  RegroupLocked();
}

// What the loss of a rank means here.
void Frontend::State::DropLocked(int rank, const absl::Status& why) {
  closed_[rank] = true;
  channels_[rank]->Shutdown();  // should it live, it must not believe that it still serves
  rank_status_[rank] = {};
  if (rank == 0 || !options_.survive_losses) return FailLocked(rank, why);
  book_.SetOpen(rank, false);
  book_.Orphan(rank);
  if (options_.on_lost) options_.on_lost(rank, why);
}

// The ranks are told to stop, and end without one more step together: some have ended already, or
// are gone, and would be waited for in vain.
void Frontend::State::DismissLocked() {
  ResumeFrame nobody;
  nobody.generation = group_.generation();
  BroadcastLocked(-1, std::move(nobody)).IgnoreError();
}

void Frontend::State::RegroupLocked() {
  const std::vector<GroupLeader::Lost> lost = group_.TakeLost();
  bool changed = !lost.empty();
  for (const auto& [r, why] : lost) DropLocked(r, why);
  while (auto send = group_.Take()) {
    changed = true;
    const int rank = send->rank;
    if (closed_[rank] || failed_) continue;
    auto body = std::visit(
        [](auto& frame) -> decltype(LeaderFrame::body) { return std::move(frame); }, send->frame);
    // Nobody sleeps through this, so it needs no number of its own.
    const absl::Status sent = channels_[rank]->Send(Serialize(LeaderFrame{wake_seq_, body}));
    if (!sent.ok()) LoseLocked(rank, sent);
  }
  if (changed) WakeIo();  // else the I/O thread, which comes here in every round, would never rest
  if (group_.halting() || failed_) return;
  for (const int32_t r : group_.members()) book_.SetOpen(r, !leaving_[r]);
  std::vector<RequestBook::Assignment> moved = book_.AssignWaiting();
  counts_.moved += static_cast<int64_t>(moved.size());
  if (options_.on_moved && !moved.empty()) options_.on_moved(static_cast<int64_t>(moved.size()));
  for (RequestBook::Assignment& given : moved) {
    BroadcastLocked(given.rank, SubmitFrame{std::move(given.request)}).IgnoreError();
  }
}

// ---- the I/O thread ----------------------------------------------------------------------------

void Frontend::State::RunIo() {
  const size_t num_ranks = channels_.size();
  std::vector<pollfd> entries(num_ranks + 1);
  entries[num_ranks] = {wake_fd_, POLLIN, 0};
  {
    const std::lock_guard lock(mutex_);
    io_thread_id_ = std::this_thread::get_id();
  }
  while (Deliver()) {
    {
      const std::lock_guard lock(mutex_);
      for (size_t r = 0; r < num_ranks; ++r) {
        const bool unsent = channels_[r]->HasUnsent();
        const int fd = closed_[r] ? -1 : channels_[r]->fd();
        entries[r] = {fd, static_cast<short>(POLLIN | (unsent ? POLLOUT : 0)), 0};
      }
    }
    if (poll(entries.data(), entries.size(), PollTimeoutMs()) > 0) {
      if (entries[num_ranks].revents != 0) {
        uint64_t count;
        [[maybe_unused]] const ssize_t got = read(wake_fd_, &count, sizeof count);
      }
      for (size_t r = 0; r < num_ranks; ++r) {
        if (entries[r].revents != 0) Receive(static_cast<int>(r));
      }
    }
    // What came meanwhile counts: nobody is lost of whom something waits to be read.
    const std::vector<std::pair<int, int64_t>> silent = Silent();
    for (const auto& [r, heard_ns] : silent) Receive(r);
    const std::lock_guard lock(mutex_);
    for (const auto& [r, heard_ns] : silent) {
      if (closed_[r] || heard_ns_[r] != heard_ns) continue;
      LoseLocked(r, absl::DeadlineExceededError(
                        absl::StrCat("it said nothing for ", options_.silence_ms, " ms")));
    }
    ExpireLocked();
  }
}

int Frontend::State::PollTimeoutMs() const {
  const std::lock_guard lock(mutex_);
  std::optional<int64_t> wake_ns;
  if (!stopped_) wake_ns = group_.wake_ns();
  const auto earlier = [&wake_ns](int64_t ns) { wake_ns = std::min(wake_ns.value_or(ns), ns); };
  if (const auto deadline = book_.next_deadline()) earlier(deadline->first);
  // Half as long as what counts as absence (Silent).
  if (options_.silence_ms > 0) earlier(NowNs() + options_.silence_ms * kNsPerMs / 4);
  if (!wake_ns.has_value()) return -1;
  const int64_t left = *wake_ns - NowNs();
  return static_cast<int>(std::clamp<int64_t>((left + kNsPerMs - 1) / kNsPerMs, 0, 60'000));
}

// Ranks that seem to have said nothing for too long, each with when it was heard last. Rank 0 is
// not among them: it is this process. Where this thread was away itself (the process stopped, or a
// callback took long), all that it has not heard says nothing: every time begins anew.
std::vector<std::pair<int, int64_t>> Frontend::State::Silent() {
  const std::lock_guard lock(mutex_);
  const int64_t limit_ns = options_.silence_ms * kNsPerMs;
  if (limit_ns == 0 || stopped_ || failed_) return {};
  const int64_t now = NowNs();
  const bool away = looked_ns_ != 0 && now - looked_ns_ > limit_ns / 2;
  looked_ns_ = now;
  if (away) group_.WaitAnew(now);
  std::vector<std::pair<int, int64_t>> silent;
  for (int r = 1; r < static_cast<int>(channels_.size()); ++r) {
    // One that has said nothing yet may still be loading the model.
    if (closed_[r] || heard_ns_[r] == 0) continue;
    if (away) heard_ns_[r] = now;
    if (now - heard_ns_[r] >= limit_ns) silent.emplace_back(r, heard_ns_[r]);
  }
  return silent;
}

void Frontend::State::Receive(int rank) {
  while (true) {
    auto bytes = channels_[static_cast<size_t>(rank)]->TryReceive();
    absl::Status status = bytes.status();
    if (status.ok()) {
      if (!bytes->has_value()) return;
      const absl::StatusOr<RankFrame> frame = ParseRankFrame(**bytes);
      status = frame.status();
      if (status.ok()) Handle(rank, *frame);
    }
    if (!status.ok()) {
      const std::lock_guard lock(mutex_);
      LoseLocked(rank, status);
      return;
    }
  }
}

void Frontend::State::Handle(int rank, const RankFrame& frame) {
  if (const auto* routing = std::get_if<RoutingFrame>(&frame.body)) {
    if (options_.on_routing) options_.on_routing(rank, *routing);
    return;
  }
  if (const auto* verified = std::get_if<VerifiedFrame>(&frame.body)) {
    if (options_.on_verified) options_.on_verified(rank, *verified);
    return;
  }
  const std::lock_guard lock(mutex_);
  heard_ns_[rank] = NowNs();
  if (const auto* status = std::get_if<RankStatusFrame>(&frame.body)) {
    rank_status_[rank] = *status;
  } else if (const auto* events = std::get_if<EventsFrame>(&frame.body)) {
    HandleLocked(rank, *events);
  } else if (const auto* halted = std::get_if<HaltedFrame>(&frame.body)) {
    if (stopped_) return;
    group_.OnHalted(rank, *halted, NowNs());
    RegroupLocked();
  } else if (const auto* trouble = std::get_if<TroubleFrame>(&frame.body)) {
    HandleLocked(rank, *trouble);
  }
}

void Frontend::State::HandleLocked(int rank, const EventsFrame& frame) {
  for (const TokenEvent& event : frame.events) {
    if (const auto end = book_.OnEvent(rank, event)) CountLocked(EndOf(*end));
  }
}

void Frontend::State::HandleLocked(int rank, const TroubleFrame& frame) {
  if (stopped_) {
    // Somebody was lost over the stop, and did not tell all that it had heard of it.
    BroadcastLocked(-1, StopFrame{.complete = false}).IgnoreError();
    return DismissLocked();
  }
  group_.OnTrouble(rank, frame, NowNs());
  RegroupLocked();
}

void Frontend::State::ExpireLocked() {
  const int64_t now = NowNs();
  for (auto next = book_.next_deadline(); next.has_value() && next->first <= now;
       next = book_.next_deadline()) {
    AbandonLocked(next->second, FinishReason::kDeadline);
  }
  if (stopped_ || failed_) return;
  group_.OnTick(now);
  RegroupLocked();
}

bool Frontend::State::Deliver() {
  std::unique_lock lock(mutex_);
  while (book_.has_deliveries()) {
    std::vector<RequestBook::Delivery> batch = book_.TakeDeliveries();
    delivering_ = true;
    lock.unlock();
    for (const RequestBook::Delivery& delivery : batch) delivery.sink->OnEvent(delivery.event);
    batch.clear();  // a sink may end here, so not under the mutex
    lock.lock();
    delivering_ = false;
  }
  changed_.notify_all();
  if (!failed_ || exiting_) return !exiting_;
  // A failed front end is done: what is left are calls that return errors.
  const int rank = failed_rank_;
  const absl::Status status = failure_;
  lock.unlock();
  if (on_failure_) on_failure_(rank, status);
  return false;
}

}  // namespace ballast
