#include "runtime/frontend.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"

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

// Two kinds of threads meet here: callers, who send and leave notes under the mutex, and the I/O
// thread, which alone receives and alone calls sinks (never under the mutex).
class Frontend::State {
 public:
  State(FrontendOptions options, std::vector<std::unique_ptr<ControlChannel>> channels,
        std::function<void(int, absl::Status)> on_failure, int wake_fd)
      : options_(std::move(options)),
        channels_(std::move(channels)),
        on_failure_(std::move(on_failure)),
        wake_fd_(wake_fd),
        closed_(channels_.size(), false),
        work_(channels_.size(), 0),
        rank_status_(channels_.size()) {
    io_thread_ = std::thread([this] { RunIo(); });
  }

  ~State() {
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

  absl::StatusOr<uint64_t> Submit(GenerationRequest request, std::shared_ptr<TokenSink> sink,
                                  int64_t timeout_ms);
  void Cancel(uint64_t request_id, FinishReason reason);
  absl::Status BroadcastPlan(std::vector<std::byte> plan);
  void DrainAndStop(int64_t timeout_ms);
  bool accepting() const {
    const std::lock_guard lock(mutex_);
    return !draining_ && !failed_;
  }
  FrontendStats stats() const;

 private:
  struct Pending {
    int rank = 0;
    int64_t work_tokens = 0;
    int64_t deadline_ns = 0;
    std::shared_ptr<TokenSink> sink;
  };
  // A call of a sink that the I/O thread owes.
  struct Delivery {
    std::shared_ptr<TokenSink> sink;
    TokenEvent event;
  };

  // Sends `body` to `rank` (-1: to all) and a WakeFrame with the same number to all others.
  absl::Status BroadcastLocked(int rank, decltype(LeaderFrame::body) body);
  void CountLocked(RequestEnd end);
  // Ends a request on our side: the I/O thread will tell its sink. `it` is gone afterwards.
  void EndLocked(std::map<uint64_t, Pending>::iterator it, TokenEvent last);
  void EndAllLocked(FinishReason reason);
  // Ends a request that its rank still works on, and tells the rank.
  void AbandonLocked(std::map<uint64_t, Pending>::iterator it, FinishReason reason);
  void FailLocked(int rank, absl::Status status);
  void WakeIo() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof one);
  }

  void RunIo();
  int PollTimeoutMs() const;
  void Receive(int rank);
  void Handle(int rank, const RankFrame& frame);
  void ExpireDeadlines();
  // Calls the sinks; false when the I/O thread has nothing more to do.
  bool Deliver();

  const FrontendOptions options_;
  const std::vector<std::unique_ptr<ControlChannel>> channels_;
  const std::function<void(int, absl::Status)> on_failure_;
  const int wake_fd_;  // an eventfd that interrupts the I/O thread's poll

  mutable std::mutex mutex_;
  // State below is protected by mutex_ (vectors by rank keep their size).
  std::condition_variable changed_;                   // the I/O thread did something
  std::map<uint64_t, Pending> pending_;               // by request id
  std::set<std::pair<int64_t, uint64_t>> deadlines_;  // (deadline, id) of each pending request
  std::vector<Delivery> deliveries_;                  // in order
  std::vector<bool> closed_;                          // channels that broke, by rank
  std::vector<int64_t> work_;  // tokens that pending requests may need, by rank
  std::vector<RankStatusFrame> rank_status_;
  FrontendStats counts_;
  uint64_t next_id_ = 1;
  uint64_t wake_seq_ = 0;
  bool draining_ = false;
  bool stopped_ = false;  // StopFrame is sent: a channel that closes is no failure any more
  bool failed_ = false;
  bool exiting_ = false;
  int failed_rank_ = -1;
  absl::Status failure_;
  bool delivering_ = false;  // sinks are being called
  std::thread::id io_thread_id_;

  std::thread io_thread_;
};

// ---- callers -----------------------------------------------------------------------------------

absl::Status Frontend::State::BroadcastLocked(int rank, decltype(LeaderFrame::body) body) {
  const bool to_all = rank < 0;
  const std::vector<std::byte> frame = Serialize(LeaderFrame{++wake_seq_, std::move(body)});
  const std::vector<std::byte> wake =
      to_all ? std::vector<std::byte>() : Serialize(LeaderFrame{wake_seq_, WakeFrame{}});
  // Every channel gets its frame even when another one is broken.
  absl::Status first_error;
  for (int r = 0; r < static_cast<int>(channels_.size()); ++r) {
    const absl::Status sent =
        channels_[static_cast<size_t>(r)]->Send(to_all || r == rank ? frame : wake);
    if (sent.ok()) continue;
    if (!stopped_) FailLocked(r, sent);
    first_error.Update(sent);
  }
  WakeIo();
  return first_error;
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
  if (static_cast<int64_t>(pending_.size()) >= options_.max_pending) {
    CountLocked(RequestEnd::kRejected);
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", options_.max_pending, " requests are pending"));
  }
  const uint64_t id = next_id_++;
  request.id = id;
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  Pending pending;
  pending.rank = static_cast<int>(std::min_element(work_.begin(), work_.end()) - work_.begin());
  pending.work_tokens = prompt_tokens + std::min<int64_t>(request.max_tokens,
                                                          options_.context_tokens - prompt_tokens);
  const int64_t timeout = timeout_ms > 0 ? timeout_ms : options_.request_timeout_ms;
  pending.deadline_ns = NowNs() + std::min(timeout, kMaxTimeoutMs) * kNsPerMs;
  pending.sink = std::move(sink);
  const int rank = pending.rank;
  work_[static_cast<size_t>(rank)] += pending.work_tokens;
  deadlines_.emplace(pending.deadline_ns, id);
  pending_.emplace(id, std::move(pending));
  ++counts_.accepted;
  // If this breaks a channel, the sink hears kFailed like all other pending requests.
  BroadcastLocked(rank, SubmitFrame{std::move(request)}).IgnoreError();
  return id;
}

void Frontend::State::Cancel(uint64_t request_id, FinishReason reason) {
  BALLAST_CHECK(reason != FinishReason::kNone);
  const std::lock_guard lock(mutex_);
  const auto it = pending_.find(request_id);
  if (it != pending_.end()) AbandonLocked(it, reason);
}

absl::Status Frontend::State::BroadcastPlan(std::vector<std::byte> plan) {
  const std::lock_guard lock(mutex_);
  if (failed_ || stopped_) return absl::UnavailableError("the ranks are stopped or lost");
  return BroadcastLocked(-1, PlanFrame{std::move(plan)});
}

void Frontend::State::DrainAndStop(int64_t timeout_ms) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  const auto drained = [this] { return pending_.empty() && deliveries_.empty() && !delivering_; };
  const bool on_io_thread = std::this_thread::get_id() == io_thread_id_;
  if (!on_io_thread) changed_.wait_for(lock, milliseconds(timeout_ms), drained);
  EndAllLocked(FinishReason::kCancelled);
  if (!stopped_) {
    stopped_ = true;
    // A rank that is already gone needs no telling.
    BroadcastLocked(-1, StopFrame{}).IgnoreError();
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
  stats.pending = static_cast<int32_t>(pending_.size());
  for (const RankStatusFrame& status : rank_status_) {
    stats.waiting += status.waiting;
    stats.running += status.running;
  }
  return stats;
}

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

void Frontend::State::EndLocked(std::map<uint64_t, Pending>::iterator it, TokenEvent last) {
  CountLocked(EndOf(last.finish));
  Pending& pending = it->second;
  work_[static_cast<size_t>(pending.rank)] -= pending.work_tokens;
  deadlines_.erase({pending.deadline_ns, it->first});
  deliveries_.push_back({std::move(pending.sink), last});
  pending_.erase(it);
}

void Frontend::State::EndAllLocked(FinishReason reason) {
  while (!pending_.empty()) {
    EndLocked(pending_.begin(), {pending_.begin()->first, -1, reason});
  }
}

void Frontend::State::AbandonLocked(std::map<uint64_t, Pending>::iterator it, FinishReason reason) {
  const uint64_t id = it->first;
  const int rank = it->second.rank;
  EndLocked(it, {id, -1, reason});
  BroadcastLocked(rank, CancelFrame{id}).IgnoreError();  // a broken channel fails the rest
}

void Frontend::State::FailLocked(int rank, absl::Status status) {
  if (failed_) return;
  failed_ = true;
  failed_rank_ = rank;
  failure_ = std::move(status);
  EndAllLocked(FinishReason::kFailed);
  WakeIo();
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
    for (size_t r = 0; r < num_ranks; ++r) {
      const bool unsent = channels_[r]->HasUnsent();
      const int fd = closed_[r] ? -1 : channels_[r]->fd();  // only this thread sets closed_
      entries[r] = {fd, static_cast<short>(POLLIN | (unsent ? POLLOUT : 0)), 0};
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
    ExpireDeadlines();
  }
}

int Frontend::State::PollTimeoutMs() const {
  const std::lock_guard lock(mutex_);
  if (deadlines_.empty()) return -1;
  const int64_t left = deadlines_.begin()->first - NowNs();
  return static_cast<int>(std::clamp<int64_t>((left + kNsPerMs - 1) / kNsPerMs, 0, 60'000));
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
      closed_[static_cast<size_t>(rank)] = true;
      if (!stopped_) FailLocked(rank, status);
      return;
    }
  }
}

void Frontend::State::Handle(int rank, const RankFrame& frame) {
  if (const auto* routing = std::get_if<RoutingFrame>(&frame.body)) {
    if (options_.on_routing) options_.on_routing(rank, *routing);
    return;
  }
  const std::lock_guard lock(mutex_);
  if (const auto* status = std::get_if<RankStatusFrame>(&frame.body)) {
    rank_status_[static_cast<size_t>(rank)] = *status;
    return;
  }
  for (const TokenEvent& event : std::get<EventsFrame>(frame.body).events) {
    const auto it = pending_.find(event.request_id);
    // What was cancelled here may still be under way there; a rank speaks for its own requests
    // only.
    if (it == pending_.end() || it->second.rank != rank) continue;
    if (event.token >= 0) ++counts_.tokens_generated;
    if (event.finish == FinishReason::kNone) {
      deliveries_.push_back({it->second.sink, event});
    } else {
      EndLocked(it, event);
    }
  }
}

void Frontend::State::ExpireDeadlines() {
  const std::lock_guard lock(mutex_);
  const int64_t now = NowNs();
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    AbandonLocked(pending_.find(deadlines_.begin()->second), FinishReason::kDeadline);
  }
}

bool Frontend::State::Deliver() {
  std::unique_lock lock(mutex_);
  while (!deliveries_.empty()) {
    std::vector<Delivery> batch;
    batch.swap(deliveries_);
    delivering_ = true;
    lock.unlock();
    for (const Delivery& delivery : batch) delivery.sink->OnEvent(delivery.event);
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
void Frontend::DrainAndStop(int64_t timeout_ms) {
  state_->DrainAndStop(timeout_ms);
}
bool Frontend::accepting() const {
  return state_->accepting();
}
FrontendStats Frontend::stats() const {
  return state_->stats();
}

}  // namespace ballast
