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
    std::string step_log;         // a file that gets one JSON line per step; empty: none
    int32_t hot_experts = 8;      // per layer, in the metrics; 0: none
    int64_t hot_experts_every_tokens = 4096;
    TraceRecorder* recorder = nullptr;  // gets the counts of every step; may be null
    // Bytes per second, over all ranks, that plans may copy; 0: no limit. What is not used adds up
    // to one second's, or to the slots of a layer where these are more.
    double copy_bytes_per_second = 0.0;
    int64_t copy_bytes = 1;                     // of one copy
    std::function<int64_t()> now_ns = NowNs;    // any monotonic clock
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

  // The placement in force as JSON: Placement::ToJson plus "replicas", [layer][expert] slots.
  std::string PlacementJson() const;
  // Plans now, whatever there is to gain, and says what came of it:
  //   {"planned":true,"plan_id":n,"copies":n} or {"planned":false,"reason":".."}
  std::string Rebalance();

 private:
  struct PlanEnded {
    Rebalancer::Outcome outcome;
    Placement in_force;
  };
  struct Forced {
    std::promise<std::string> answer;
  };
  using Event = std::variant<StepRecord, PlanEnded, Forced>;

  Leader(const Options& options, const Placement& initial, RankObserver rank_observer,
         RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan);
  void Push(Event event);
  void Loop();
  void Handle(const StepRecord& record);
  void Handle(const PlanEnded& ended);
  void Handle(Forced& forced);
  void GrantCopies();
  RebalanceTrigger TriggerOf(bool force) const;
  std::optional<MigrationPlan> Plan(bool force, Decision* why);
  void WriteStep(const StepRecord& record);
  void PublishHotExperts();

  const Options options_;
  RankObserver rank_observer_;                  // step thread
  RankMetrics* metrics_;
  std::function<absl::Status(std::vector<std::byte>)> send_plan_;
  // State of the controller's thread.
  std::unique_ptr<Controller> controller_;
  std::vector<int32_t> counts_;  // [2, layers, E] of a step: prefill, decode
  int64_t step_ = 0;
  bool may_plan_ = true;
  int64_t tokens_since_hot_ = 0;
  int64_t granted_ns_ = 0;  // until when copies were granted
  RebalanceTrigger trigger_ = RebalanceTrigger::kThreshold;  // of the plan in flight
  std::FILE* log_ = nullptr;
  // State below is protected by mutex_.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Event> events_;
  bool stop_ = false;
  Placement placement_;                         // in force, for PlacementJson
  std::thread thread_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_LEADER_H_
