#ifndef BALLAST_RUNTIME_LEADER_WORKER_H_
#define BALLAST_RUNTIME_LEADER_WORKER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>

#include "runtime/leader_loop.h"

namespace ballast {

// A LeaderLoop on a thread of its own, with what waits for it. Held by the leader and by the
// thread, which may outlive the leader if it never comes back. THREADS any
class LeaderWorker {
 public:
  struct PlanEnded {
    Rebalancer::Outcome outcome;
    Placement in_force;
  };
  struct RanksChanged {
    Regrouping how;
    Placement in_force;
  };
  struct Forced {
    std::promise<std::string> answer;
  };
  struct Vacating {
    int32_t rank = 0;
  };
  using Event = std::variant<StepRecord, PlanEnded, RanksChanged, Forced, Vacating>;

  // ERRORS kInvalidArgument: the controller's options
  static absl::StatusOr<std::shared_ptr<LeaderWorker>> Start(const LeaderLoopOptions& options,
                                                             LeaderLoop::Start start,
                                                             LeaderHost* host);
  // Takes the place of another one: never fails, and nothing of a policy runs on this thread.
  static std::shared_ptr<LeaderWorker> StartAnyhow(const LeaderLoopOptions& options,
                                                   LeaderLoop::Start start, LeaderHost* host);

  // Steps beyond those that may wait are left out.
  void Push(Event event);
  // Has it end once nothing waits any more, and waits for that (`timeout_ms` 0: as long as it
  // takes). False: it is still at work. REQUIRES not given up
  bool Finish(int64_t timeout_ms);
  // It reaches nobody from then on, and ends by itself if it ever can. What waited for it; nothing
  // where it is in the middle of a call to its host, and cannot be given up just now.
  std::optional<std::deque<Event>> GiveUp();

  // How long it has been at one thing; 0: it waits.
  int64_t busy_ns() const;
  // The load as it was a second ago at most; at the end of the thread, at its end.
  std::shared_ptr<const LeaderLoop::Window> window() const;

 private:
  LeaderWorker(const LeaderLoopOptions& options, LeaderLoop::Start start, LeaderHost* host);
  void Run(std::shared_ptr<LeaderWorker> self);
  void Loop();
  void PublishWindow();
  void Handle(const StepRecord& record) { loop_.OnStep(record, may_plan_); }
  void Handle(const PlanEnded& e) { loop_.OnPlanEnded(e.outcome, e.in_force); }
  void Handle(const RanksChanged& e) { loop_.OnRegrouped(e.how, e.in_force); }
  void Handle(Forced& forced) { forced.answer.set_value(loop_.Rebalance()); }
  void Handle(const Vacating& vacating) { loop_.Vacate(vacating.rank); }

  const std::shared_ptr<Tether> tether_;
  LeaderLoop loop_;       // the thread's, once it runs
  bool begun_ = false;    // the same
  bool may_plan_ = true;  // the same
  std::atomic<int64_t> busy_since_ns_ = 0;
  mutable std::mutex mutex_;
  // State below is protected by mutex_.
  std::condition_variable wake_;
  std::deque<Event> events_;
  int32_t waiting_steps_ = 0;  // among them
  bool stop_ = false;
  bool ended_ = false;
  std::shared_ptr<const LeaderLoop::Window> window_;
  std::thread thread_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_LEADER_WORKER_H_
