#ifndef BALLAST_RUNTIME_LEADER_H_
#define BALLAST_RUNTIME_LEADER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/leader_worker.h"
#include "runtime/rank_observer.h"
#include "runtime/server_state.h"

namespace ballast {

// What rank 0 has beside every rank's engine: the controller, on a thread of its own
// (leader_loop.h). Steps hand their counts over and go on; plans go out to all ranks through the
// front end.
//
// Another thread watches it. A controller that works on one thing for longer than
// `stall_deadline_ms` is reported (log, metric, note) and given up: a new one takes its place, with
// the placement in force, the departures under way and the load that the old one knew last. The old
// thread is left to itself, reaches nobody any more, and ends should it ever come back. After a few
// such losses there are no more plans: serving goes on with the placement in force. One that hangs
// in a call of this class (a write of the step log, a send) is reported and not given up.
// THREADS OnStep, OnPlanEnded and OnRest from the step thread; the others from any thread.
class Leader : public EngineObserver {
 public:
  struct Options {
    LeaderLoopOptions loop;              // num_job_ranks is filled in
    LeaderLoop::Window window = {};      // what is known of the load before the first step
    std::string step_log;                // a file that gets one JSON line per step; empty: none
    TraceRecorder* recorder = nullptr;   // gets the counts of every step; may be null
    int64_t stall_deadline_ms = 30'000;  // 0: never given up
    // Has a rank of the job leave, once nothing of the placement is on it alone.
    std::function<void(int32_t rank)> leave = {};
    // Has a rank that was to leave stay, since the plans for its departure do not come through.
    std::function<void(int32_t rank)> stay = {};
    // Where the state is kept (server_state.h); an empty path: nowhere.
    std::string model, state_file;
    int64_t state_period_ms = 30'000;
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
  void OnVerified(const Verified& verified) override { rank_observer_.OnVerified(verified); }
  void OnParked() override { rank_observer_.OnParked(); }
  void OnRegrouped(const Regrouping& regrouping, const Placement& in_force) override;

  // The placement in force as JSON: Placement::ToJson plus "replicas", [layer][expert] slots;
  // "ranks", the ranks of the job by rank of the placement; and for each of them "only_on", the
  // [layer, expert] pairs that it alone holds, and "reloads_if_lost", how many these are.
  std::string PlacementJson() const;
  // Moves what only this rank of the job holds to others, in the background, then has it leave
  // (Options::leave), or stay where that is not to be had (LeaderLoop::Vacate). Returns at once.
  void Vacate(int32_t rank);
  // Plans now, whatever there is to gain, and says what came of it:
  //   {"planned":true,"plan_id":n,"copies":n} or {"planned":false,"reason":".."}
  std::string Rebalance();
  // What an operator should know of the controller; empty: it does its work.
  std::string ControllerNote() const;

 private:
  Leader(const Options& options, const Placement& initial, RankObserver rank_observer,
         RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan);
  absl::Status OpenStepLog();
  absl::Status SendPlan(const MigrationPlan& plan);
  void EndDeparture(int32_t rank, const std::function<void(int32_t)>& how);
  void Watch();
  void ReplaceLocked(int64_t busy_ms);
  std::shared_ptr<const ServerState> CurrentState();

  Options options_;
  RankObserver rank_observer_;  // step thread
  RankMetrics* metrics_;
  std::function<absl::Status(std::vector<std::byte>)> send_plan_;
  LeaderHost host_;
  std::FILE* log_ = nullptr;
  mutable std::mutex mutex_;
  // State below is protected by mutex_.
  std::condition_variable wake_;  // of the watching thread
  bool stop_ = false;
  Placement placement_;              // in force
  std::vector<int32_t> ranks_;       // of the job, by rank of placement_
  int64_t last_plan_id_ = 0;         // sent
  int64_t plan_under_way_ = 0;       // sent, and not yet ended; 0: none
  bool plan_has_ended_ = false;      // on the ranks, if not in the worker's books
  std::vector<int32_t> departures_;  // ranks that are being vacated
  std::shared_ptr<LeaderWorker> worker_;
  int32_t replaced_ = 0;  // workers
  std::string note_;
  std::shared_ptr<const ServerState> state_;  // the last one that was made
  std::thread watch_;
  std::unique_ptr<StateKeeper> keeper_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_LEADER_H_
