#include "runtime/leader_worker.h"

#include <chrono>
#include <utility>

#include "base/clock.h"
#include "base/status.h"

namespace ballast {
namespace {

// Steps that may wait for the controller; more are left out of its statistics.
constexpr int32_t kMostWaitingSteps = 256;
constexpr std::chrono::seconds kPublishPeriod(1);

}  // namespace

LeaderWorker::LeaderWorker(const LeaderLoopOptions& options, LeaderLoop::Start start,
                           LeaderHost* host)
    : tether_(std::make_shared<Tether>(host)),
      loop_(options, start, tether_),
      window_(std::make_shared<LeaderLoop::Window>(std::move(start.window))) {}

absl::StatusOr<std::shared_ptr<LeaderWorker>> LeaderWorker::Start(const LeaderLoopOptions& options,
                                                                  LeaderLoop::Start start,
                                                                  LeaderHost* host) {
  std::shared_ptr<LeaderWorker> worker(new LeaderWorker(options, std::move(start), host));
  BALLAST_RETURN_IF_ERROR(worker->loop_.Begin());
  worker->begun_ = true;
  worker->PublishWindow();
  worker->Run(worker);
  return worker;
}

std::shared_ptr<LeaderWorker> LeaderWorker::StartAnyhow(const LeaderLoopOptions& options,
                                                        LeaderLoop::Start start, LeaderHost* host) {
  std::shared_ptr<LeaderWorker> worker(new LeaderWorker(options, std::move(start), host));
  worker->Run(worker);
  return worker;
}

void LeaderWorker::Run(std::shared_ptr<LeaderWorker> self) {
  thread_ = std::thread([self = std::move(self)] { self->Loop(); });
}

void LeaderWorker::Push(Event event) {
  {
    const std::lock_guard lock(mutex_);
    const bool step = std::holds_alternative<StepRecord>(event);
    if (step && waiting_steps_ == kMostWaitingSteps) return;
    waiting_steps_ += step;
    events_.push_back(std::move(event));
  }
  wake_.notify_all();
}

bool LeaderWorker::Finish(int64_t timeout_ms) {
  std::unique_lock lock(mutex_);
  stop_ = true;
  wake_.notify_all();
  if (timeout_ms > 0 &&
      !wake_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return ended_; })) {
    return false;
  }
  lock.unlock();
  thread_.join();
  return true;
}

std::optional<std::deque<LeaderWorker::Event>> LeaderWorker::GiveUp() {
  if (!tether_->TryCut()) return std::nullopt;
  const std::lock_guard lock(mutex_);
  stop_ = true;
  thread_.detach();
  return std::exchange(events_, {});
}

int64_t LeaderWorker::busy_ns() const {
  const int64_t since = busy_since_ns_;
  return since == 0 ? 0 : NowNs() - since;
}

std::shared_ptr<const LeaderLoop::Window> LeaderWorker::window() const {
  const std::lock_guard lock(mutex_);
  return window_;
}

void LeaderWorker::PublishWindow() {
  auto window = std::make_shared<const LeaderLoop::Window>(loop_.window());
  const std::lock_guard lock(mutex_);
  window_ = std::move(window);
}

void LeaderWorker::Loop() {
  busy_since_ns_ = NowNs();
  if (!begun_) loop_.BeginAnyhow();
  loop_.AdvanceVacating();
  bool news = true;  // that are not published
  auto publish_at = std::chrono::steady_clock::now();
  while (true) {
    if (news && std::chrono::steady_clock::now() >= publish_at) {
      PublishWindow();
      news = false;
      publish_at = std::chrono::steady_clock::now() + kPublishPeriod;
    }
    busy_since_ns_ = 0;
    std::unique_lock lock(mutex_);
    const auto something = [this] { return stop_ || !events_.empty(); };
    if (!news) {
      wake_.wait(lock, something);
    } else if (!wake_.wait_until(lock, publish_at, something)) {
      continue;
    }
    if (events_.empty()) break;
    Event event = std::move(events_.front());
    events_.pop_front();
    waiting_steps_ -= std::holds_alternative<StepRecord>(event);
    // Planning can take longer than a step: the counts of waiting steps come first.
    may_plan_ = events_.empty();
    busy_since_ns_ = NowNs();
    lock.unlock();
    std::visit([this](auto& e) { Handle(e); }, event);
    loop_.AdvanceVacating();
    news = true;
  }
  PublishWindow();
  const std::lock_guard lock(mutex_);
  ended_ = true;
  wake_.notify_all();
}

}  // namespace ballast
