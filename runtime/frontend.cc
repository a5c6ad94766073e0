#include "runtime/frontend.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"
#include "runtime/frontend_state.h"

namespace ballast {
namespace {

using std::chrono::milliseconds;

constexpr int64_t kNsPerMs = 1'000'000;
constexpr int64_t kMaxTimeoutMs = int64_t{30} * 24 * 3600 * 1000;
constexpr milliseconds kStopFlushTime(1000);  // for the last frames to leave after a drain

absl::Status Check(const FrontendOptions& options, const GenerationRequest& request) {
  const auto context = static_cast<size_t>(options.context_tokens);
  if (request.prompt.empty()) {
    return absl::InvalidArgumentError("prompt: it is empty; at least one token is needed");
  }
  if (request.prompt.size() >= context) {
    return absl::InvalidArgumentError(absl::StrCat("prompt: ", request.prompt.size(),
                                                   " tokens; at most ", context - 1,
                                                   " leave room to generate one"));
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    if (request.prompt[i] < 0 || request.prompt[i] >= options.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("prompt: token ", request.prompt[i],
                                                     " at index ", i, "; ids are 0 to ",
                                                     options.vocab_size - 1));
    }
  }
  if (request.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens: ", request.max_tokens, "; at least 1"));
  }
  const SamplingParams& sampling = request.sampling;
  if (!std::isfinite(sampling.temperature) || sampling.temperature < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature: ", sampling.temperature, "; a finite number of at least 0"));
  }
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p: ", sampling.top_p, "; above 0 and at most 1"));
  }
  return absl::OkStatus();
}

std::vector<int32_t> OrZeros(std::vector<int32_t> values, size_t size) {
  if (values.empty()) values.assign(size, 0);
  return values;
}

}  // namespace

Frontend::State::State(FrontendOptions options,
                       std::vector<std::unique_ptr<ControlChannel>> channels,
                       std::function<void(int, absl::Status)> on_failure, int wake_fd)
    : options_(std::move(options)),
      channels_(std::move(channels)),
      on_failure_(std::move(on_failure)),
      wake_fd_(wake_fd),
      book_(static_cast<int>(channels_.size()), options_.context_tokens),
      group_(options_.group, OrZeros(options_.slots, channels_.size()),
             OrZeros(options_.node, channels_.size())),
      leaving_(channels_.size(), false),
      closed_(channels_.size(), false),
      heard_ns_(channels_.size(), 0),
      rank_status_(channels_.size()) {
  io_thread_ = std::thread([this] { RunIo(); });
}

Frontend::State::~State() {
  {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    EndAllLocked(FinishReason::kCancelled);
    exiting_ = true;
  }
  WakeIo();
  io_thread_.join();
  close(wake_fd_);
}

void Frontend::State::WakeIo() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
}

// ---- callers -----------------------------------------------------------------------------------

absl::Status Frontend::State::BroadcastLocked(int rank, decltype(LeaderFrame::body) body) {
  const bool to_all = rank < 0;
  const std::vector<std::byte> frame = Serialize(LeaderFrame{++wake_seq_, std::move(body)});
  const std::vector<std::byte> wake =
      to_all ? std::vector<std::byte>() : Serialize(LeaderFrame{wake_seq_, WakeFrame{}});
  // Every channel gets its frame, and before any other, even when one of them is broken.
  std::vector<std::pair<int, absl::Status>> broken;
  for (int r = 0; r < static_cast<int>(channels_.size()); ++r) {
    if (closed_[r]) continue;
    const absl::Status sent = channels_[r]->Send(to_all || r == rank ? frame : wake);
    if (!sent.ok()) broken.emplace_back(r, sent);
  }
  for (const auto& [r, status] : broken) LoseLocked(r, status);
  WakeIo();
  return broken.empty() ? absl::OkStatus() : broken.front().second;
}

absl::StatusOr<uint64_t> Frontend::State::Submit(GenerationRequest request,
                                                 std::shared_ptr<TokenSink> sink,
                                                 int64_t timeout_ms) {
  BALLAST_CHECK(sink != nullptr);
  BALLAST_RETURN_IF_ERROR(Check(options_, request));
  const std::lock_guard lock(mutex_);
  if (failed_ || draining_) {
    CountLocked(RequestEnd::kRejected);
    return absl::UnavailableError(failed_ ? "the server has lost a rank"
                                          : "the server is draining");
  }
  if (static_cast<int64_t>(book_.size()) >= options_.max_pending) {
    CountLocked(RequestEnd::kRejected);
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", options_.max_pending, " requests are pending"));
  }
  const int64_t timeout = timeout_ms > 0 ? timeout_ms : options_.request_timeout_ms;
  const int64_t deadline_ns = NowNs() + std::min(timeout, kMaxTimeoutMs) * kNsPerMs;
  RequestBook::Assignment given = book_.Add(std::move(request), std::move(sink), deadline_ns);
  const uint64_t id = given.request.id;
  ++counts_.accepted;
  // If this breaks a channel, the request is treated like all others of that rank.
  BroadcastLocked(given.rank, SubmitFrame{std::move(given.request)}).IgnoreError();
  return id;
}

void Frontend::State::Cancel(uint64_t request_id, FinishReason reason) {
  BALLAST_CHECK(reason != FinishReason::kNone);
  const std::lock_guard lock(mutex_);
  if (book_.contains(request_id)) AbandonLocked(request_id, reason);
}

absl::Status Frontend::State::BroadcastPlan(std::vector<std::byte> plan) {
  const std::lock_guard lock(mutex_);
  if (failed_ || stopped_) return absl::UnavailableError("the ranks are stopped or lost");
  // Ranks that are regrouping take the plan afterwards, and find that it is for an epoch gone by.
  return BroadcastLocked(-1, PlanFrame{std::move(plan)});
}

absl::Status Frontend::State::AskToVerify(uint64_t id) {
  const std::lock_guard lock(mutex_);
  if (failed_ || stopped_) return absl::UnavailableError("the ranks are stopped or lost");
  return BroadcastLocked(-1, VerifyFrame{id});
}

absl::Status Frontend::State::CheckChangeLocked(int rank) const {
  if (failed_ || stopped_) return absl::UnavailableError("the ranks are stopped or lost");
  if (rank < 1 || rank >= static_cast<int>(channels_.size())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rank: ", rank, ", allowed: 1 to ", channels_.size() - 1, " (rank 0 takes the requests)"));
  }
  if (group_.is_lost(rank)) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " is lost"));
  }
  return absl::OkStatus();
}

absl::Status Frontend::State::BeginLeaving(int rank) {
  const std::lock_guard lock(mutex_);
  BALLAST_RETURN_IF_ERROR(CheckChangeLocked(rank));
  if (!group_.is_member(rank) || leaving_[rank]) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " is leaving or has left"));
  }
  leaving_[rank] = true;
  book_.SetOpen(rank, false);
  return absl::OkStatus();
}

absl::Status Frontend::State::Leave(int rank) {
  const std::lock_guard lock(mutex_);
  BALLAST_RETURN_IF_ERROR(CheckChangeLocked(rank));
  if (!leaving_[rank]) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", rank, " is not to leave (any more)"));
  }
  leaving_[rank] = false;
  group_.Leave(rank, NowNs());
  book_.SetOpen(rank, false);
  book_.Orphan(rank);
  RegroupLocked();
  return absl::OkStatus();
}

absl::Status Frontend::State::Return(int rank) {
  const std::lock_guard lock(mutex_);
  BALLAST_RETURN_IF_ERROR(CheckChangeLocked(rank));
  if (leaving_[rank]) {
    leaving_[rank] = false;
    book_.SetOpen(rank, !group_.halting());
    return absl::OkStatus();
  }
  if (!group_.is_member(rank) && group_.halting()) {
    // It may not have heard yet that it has left, and would keep what others go on with.
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", rank, ": the ranks are regrouping; try again"));
  }
  if (!group_.Return(rank, NowNs())) {
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " serves already"));
  }
  RegroupLocked();
  return absl::OkStatus();
}

bool Frontend::State::AnyLostLocked() const {
  for (int r = 0; r < static_cast<int>(channels_.size()); ++r) {
    if (group_.is_lost(r)) return true;
  }
  return false;
}

std::vector<Frontend::RankState> Frontend::State::rank_states() const {
  const std::lock_guard lock(mutex_);
  std::vector<RankState> states;
  for (int r = 0; r < static_cast<int>(channels_.size()); ++r) {
    const bool member = group_.is_member(r);
    states.push_back(group_.is_lost(r)            ? RankState::kLost
                     : member && !leaving_[r]     ? RankState::kServes
                     : member || group_.halting() ? RankState::kLeaving
                                                  : RankState::kLeft);
  }
  return states;
}

void Frontend::State::DrainAndStop(int64_t timeout_ms) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  const auto drained = [this] {
    return book_.size() == 0 && !book_.has_deliveries() && !delivering_;
  };
  const bool on_io_thread = std::this_thread::get_id() == io_thread_id_;
  if (!on_io_thread) changed_.wait_for(lock, milliseconds(timeout_ms), drained);
  EndAllLocked(FinishReason::kCancelled);
  if (!stopped_) {
    stopped_ = true;
    // A rank that is already gone needs no telling.
    BroadcastLocked(-1, StopFrame{.complete = !AnyLostLocked()}).IgnoreError();
    if (group_.halting()) DismissLocked();
  }
  WakeIo();
  if (on_io_thread) return;
  changed_.wait(lock, drained);
  changed_.wait_for(lock, kStopFlushTime, [this] {
    for (size_t r = 0; r < channels_.size(); ++r) {
      if (!closed_[r] && channels_[r]->HasUnsent()) return failed_;
    }
    return true;
  });
}

FrontendStats Frontend::State::stats() const {
  const std::lock_guard lock(mutex_);
  FrontendStats stats = counts_;
  stats.pending = static_cast<int32_t>(book_.size());
  stats.tokens_generated = book_.tokens_generated();
  for (const RankStatusFrame& status : rank_status_) {
    stats.waiting += status.waiting;
    stats.running += status.running;
  }
  return stats;
}

// ---- Frontend ----------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<Frontend>> Frontend::Create(
    FrontendOptions options, std::vector<std::unique_ptr<ControlChannel>> channels,
    std::function<void(int rank, absl::Status)> on_failure) {
  if (channels.empty() || std::count(channels.begin(), channels.end(), nullptr) > 0) {
    return absl::InvalidArgumentError("front end: one channel per rank is needed");
  }
  if (options.max_pending < 1 || options.request_timeout_ms < 1 || options.context_tokens < 2 ||
      options.vocab_size < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "front end: max_pending ", options.max_pending, " (at least 1), request_timeout_ms ",
        options.request_timeout_ms, " (at least 1), context_tokens ", options.context_tokens,
        " (at least 2), vocab_size ", options.vocab_size, " (at least 1)"));
  }
  const int wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd < 0) return absl::InternalError("front end: no eventfd");
  auto state = std::make_unique<State>(std::move(options), std::move(channels),
                                       std::move(on_failure), wake_fd);
  return std::unique_ptr<Frontend>(new Frontend(std::move(state)));
}

Frontend::Frontend(std::unique_ptr<State> state) : state_(std::move(state)) {}
Frontend::~Frontend() = default;

absl::StatusOr<uint64_t> Frontend::Submit(GenerationRequest request,
                                          std::shared_ptr<TokenSink> sink, int64_t timeout_ms) {
  return state_->Submit(std::move(request), std::move(sink), timeout_ms);
}
void Frontend::Cancel(uint64_t request_id, FinishReason reason) {
  state_->Cancel(request_id, reason);
}
absl::Status Frontend::BroadcastPlan(std::vector<std::byte> plan) {
  return state_->BroadcastPlan(std::move(plan));
}
absl::Status Frontend::AskToVerify(uint64_t id) {
  return state_->AskToVerify(id);
}
absl::Status Frontend::Leave(int rank) {
  return state_->Leave(rank);
}
absl::Status Frontend::Return(int rank) {
  return state_->Return(rank);
}
absl::Status Frontend::BeginLeaving(int rank) {
  return state_->BeginLeaving(rank);
}
std::vector<Frontend::RankState> Frontend::rank_states() const {
  return state_->rank_states();
}
void Frontend::DrainAndStop(int64_t timeout_ms) {
  state_->DrainAndStop(timeout_ms);
}
std::vector<int> Frontend::serving() const {
  std::vector<int> ranks;
  const std::vector<RankState> states = rank_states();
  for (size_t r = 0; r < states.size(); ++r) {
    if (states[r] == RankState::kServes || states[r] == RankState::kLeaving) {
      ranks.push_back(static_cast<int>(r));
    }
  }
  return ranks;
}
bool Frontend::accepting() const {
  return state_->accepting();
}
FrontendStats Frontend::stats() const {
  return state_->stats();
}

}  // namespace ballast
