#ifndef BALLAST_RUNTIME_LEADER_LOOP_H_
#define BALLAST_RUNTIME_LEADER_LOOP_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "monitor/metrics.h"
#include "monitor/trace_recorder.h"
#include "placement/controller.h"
#include "runtime/engine.h"

namespace ballast {

// What a LeaderLoop acts on. The functions must not block for long.
struct LeaderHost {
  RankMetrics* metrics = nullptr;
  TraceRecorder* recorder = nullptr;                       // may be null
  std::function<void(const std::string& line)> log_step;   // empty: nobody wants the line
  std::function<absl::Status(const MigrationPlan&)> send;  // to every rank
  // The end of a plan, or a regrouping, has been taken in: another plan may be sent.
  std::function<void()> on_settled;
  std::function<void(int32_t rank)> leave;  // has a rank of the job leave; or empty
  std::function<void(int32_t rank)> stay;   // calls its departure off; or empty
};

// Ties a loop to its host until it is cut. THREADS any
class Tether {
 public:
  explicit Tether(LeaderHost* host) : host_(host) {}
  // Calls `fn` with the host. False where it was cut.
  template <typename Fn>
  bool Do(const Fn& fn) {
    const std::lock_guard lock(mutex_);
    if (host_ == nullptr) return false;
    fn(*host_);
    return true;
  }
  // From then on the loop reaches nobody. False: it is in the middle of a call, and is not cut.
  bool TryCut() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock.owns_lock()) host_ = nullptr;
    return lock.owns_lock();
  }

 private:
  std::mutex mutex_;
  LeaderHost* host_;
};

struct LeaderLoopOptions {
  using MakeController =
      std::function<absl::StatusOr<std::unique_ptr<Controller>>(ControllerOptions, Placement)>;

  ControllerOptions controller;
  MakeController make_controller = Controller::Create;
  int32_t num_job_ranks = 0;
  int32_t hot_experts = 8;  // per layer, in the metrics; 0: none
  int64_t hot_experts_every_tokens = 4096;
  // Bytes per second, over all ranks, that plans may copy, but for departures; 0: no limit. What is
  // not used adds up to one second's, or to the slots of a layer where these are more.
  double copy_bytes_per_second = 0.0;
  int64_t copy_bytes = 1;                   // of one copy
  std::function<int64_t()> now_ns = NowNs;  // any monotonic clock
};

// What the leader does about what happens, one thing after the other: feeds the controller, sends
// its plans, has ranks leave.
// THREADS one at a time
class LeaderLoop {
 public:
  // What a loop begins with, and could hand on.
  struct Window {
    int64_t num_tokens = 0;
    std::vector<int64_t> load;  // [num_layers * E]; empty: nothing is known
  };
  struct Start {
    Placement placement;         // in force
    std::vector<int32_t> ranks;  // of the job, by rank of the placement
    int64_t last_plan_id = 0;
    std::vector<int32_t> departures = {};  // ranks of the job that are to be vacated
    Window window = {};
  };
  LeaderLoop(const LeaderLoopOptions& options, Start start, std::shared_ptr<Tether> tether);

  // Makes the controller; one of the following, first of all. Policies are at work in it already.
  // ERRORS kInvalidArgument: the controller's options
  absl::Status Begin();
  // Where the options do not fit the placement there will be no plans, which is logged.
  void BeginAnyhow();
  // A step took place. `may_plan`: there is time for it now.
  void OnStep(const StepRecord& record, bool may_plan);
  void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force);
  void OnRegrouped(const Regrouping& how, const Placement& in_force);
  // Plans now, whatever there is to gain: Leader::Rebalance.
  std::string Rebalance();
  // Moves what only this rank of the job holds to others, by plans, then has it leave. If these
  // plans are aborted three times in a row the departure is called off: it would lose last copies,
  // which the checkpoint may not give back.
  void Vacate(int32_t rank) { vacating_.push_back({.rank = rank}); }
  // To be called after each of the above, and first of all.
  void AdvanceVacating();

  Window window() const;

 private:
  struct Vacating {
    int32_t rank = 0;     // of the job
    int64_t plan_id = 0;  // the last plan for it
    int32_t aborts = 0;   // of its plans, in a row
  };

  absl::Status MakeController(ControllerOptions options, const Placement& placement,
                              int64_t last_plan_id);
  void BeginAnew(const Placement& placement, const Window& known, int64_t last_plan_id);
  void Feed(const Window& window);
  void PublishLastCopies(const Placement& placement);
  void PublishHotExperts();
  void WriteStep(const StepRecord& record);
  void GrantCopies();
  RebalanceTrigger TriggerOf(bool force) const;
  std::optional<MigrationPlan> Plan(bool force, Decision* why);
  bool Send(const MigrationPlan& plan);
  void CallOff(int32_t rank);

  const LeaderLoopOptions options_;
  const std::shared_ptr<Tether> tether_;
  const Start start_;
  std::unique_ptr<Controller> controller_;
  std::vector<int32_t> counts_;  // [2, layers, E] of a step: prefill, decode
  int64_t step_ = 0;
  int64_t tokens_since_hot_ = 0;
  std::vector<int32_t> ranks_;     // of the job, by rank of the controller's placement
  std::deque<Vacating> vacating_;  // one after the other; no other plans meanwhile
  // A plan for a departure could not be sent: not again before a plan has ended or ranks regrouped.
  bool vacating_waits_ = false;
  int64_t granted_ns_ = 0;                                   // until when copies were granted
  RebalanceTrigger trigger_ = RebalanceTrigger::kThreshold;  // of the plan in flight
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_LEADER_LOOP_H_
