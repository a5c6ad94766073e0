#ifndef BALLAST_RUNTIME_LEADER_H_
#define BALLAST_RUNTIME_LEADER_H_

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "monitor/trace_recorder.h"
#include "placement/controller.h"
#include "runtime/engine.h"
#include "runtime/rank_observer.h"

namespace ballast {

// What rank 0 has beside every rank's engine: the controller, on a thread of its own. Steps hand
// their counts over and go on; plans go out to all ranks through the front end.
// THREADS OnStep, OnPlanEnded and OnRest from the step thread; the others from any thread.
class Leader : public EngineObserver {
 public:
  struct Options {
    ControllerOptions controller;
    std::string step_log;     // a file that gets one JSON line per step; empty: none
    int32_t hot_experts = 8;  // per layer, in the metrics; 0: none
    int64_t hot_experts_every_tokens = 4096;
    TraceRecorder* recorder = nullptr;  // gets the counts of every step; may be null
    // Bytes per second, over all ranks, that plans may copy; 0: no limit. What is not used adds up
    // to one second's, or to the slots of a layer where these are more.
    double copy_bytes_per_second = 0.0;
    int64_t copy_bytes = 1;                   // of one copy
    std::function<int64_t()> now_ns = NowNs;  // any monotonic clock
    // Has a rank of the job leave, once nothing of the placement is on it alone.
    std::function<void(int32_t rank)> leave = {};
  };
  // `send_plan` gives a serialized plan to every rank. `metrics` belongs to rank 0.
  // ERRORS kInvalidArgument: the controller's options; the step log cannot be written
  static absl::StatusOr<std::unique_ptr<Leader>> Create(
      const Options& options, const Placement& initial, RankObserver rank_observer,
      RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan);
  ~Leader();

  void OnStep(const StepRecord& record) override;
  void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) override;
  void OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) override {
    rank_observer_.OnRest(running, waiting, kv_bytes_used);
  }

  void OnRegrouped(const Regrouping& regrouping, const Placement& in_force) override;

  // The placement in force as JSON: Placement::ToJson plus "replicas", [layer][expert] slots;
  // "ranks", the ranks of the job by rank of the placement; and "reloads_if_lost", for each of them
  // how many (layer, expert) pairs it alone holds.
  std::string PlacementJson() const;
  // Moves what only this rank of the job holds to others, in the background, then has it leave
  // (Options::leave). Returns at once.
  void Vacate(int32_t rank);
  // Plans now, whatever there is to gain, and says what came of it:
  //   {"planned":true,"plan_id":n,"copies":n} or {"planned":false,"reason":".."}
  std::string Rebalance();

 private:
  struct PlanEnded {
    Rebalancer::Outcome outcome;
    Placement in_force;
  };
  struct Regrouped {
    Regrouping how;
    Placement in_force;
  };
  struct Forced {
    std::promise<std::string> answer;
  };
  struct Vacating {
    int32_t rank = 0;    // of the job
    int32_t aborts = 0;  // of its plans
  };
  using Event = std::variant<StepRecord, PlanEnded, Regrouped, Forced, Vacating>;

  Leader(const Options& options, const Placement& initial, RankObserver rank_observer,
         RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan);
  void Push(Event event);
  void Loop();
  void Handle(const StepRecord& record);
  void Handle(const PlanEnded& ended);
  void Handle(const Regrouped& regrouped);
  void Handle(Forced& forced);
  void Handle(const Vacating& vacating) { vacating_.push_back(vacating); }
  void AdvanceVacating();
  void PublishLastCopies(const Placement& placement);
  bool Send(const MigrationPlan& plan);
  absl::Status MakeController(ControllerOptions options, const Placement& placement,
                              int64_t last_plan_id);
  void GrantCopies();
  RebalanceTrigger TriggerOf(bool force) const;
  std::optional<MigrationPlan> Plan(bool force, Decision* why);
  void WriteStep(const StepRecord& record);
  void PublishHotExperts();

  const Options options_;
  RankObserver rank_observer_;  // step thread
  RankMetrics* metrics_;
  std::function<absl::Status(std::vector<std::byte>)> send_plan_;
  const size_t num_job_ranks_;
  // State of the controller's thread.
  std::unique_ptr<Controller> controller_;
  std::vector<int32_t> counts_;  // [2, layers, E] of a step: prefill, decode
  int64_t step_ = 0;
  bool may_plan_ = true;
  int64_t tokens_since_hot_ = 0;
  std::vector<int32_t> ranks_in_force_;  // of the job, by rank of the controller's placement
  std::deque<Vacating> vacating_;        // one after the other; no other plans meanwhile
  int64_t granted_ns_ = 0;               // until when copies were granted
  RebalanceTrigger trigger_ = RebalanceTrigger::kThreshold;  // of the plan in flight
  std::FILE* log_ = nullptr;
  // State below is protected by mutex_.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Event> events_;
  bool stop_ = false;
  Placement placement_;         // in force, for PlacementJson
  std::vector<int32_t> ranks_;  // of the job, by rank of placement_
  std::thread thread_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_LEADER_H_
