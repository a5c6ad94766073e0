#ifndef BALLAST_RUNTIME_RANK_OBSERVER_H_
#define BALLAST_RUNTIME_RANK_OBSERVER_H_

#include <cstdint>
#include <vector>

#include "monitor/load_window.h"
#include "monitor/metrics.h"
#include "runtime/engine.h"

namespace ballast {

// Turns what the engine reports into the metrics of its rank.
class RankObserver : public EngineObserver {
 public:
  RankObserver(int32_t rank, int32_t num_ranks, int32_t num_layers, RankMetrics* metrics);

  void OnStep(const StepRecord& record) override;
  void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) override;
  void OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) override;
  void OnVerified(const Verified& verified) override;
  void OnParked() override;
  void OnRegrouped(const Regrouping& regrouping, const Placement& in_force) override;

 private:
  int32_t rank_;  // in the group
  RankMetrics* metrics_;
  LoadWindow window_;
  std::vector<int64_t> layer_copies_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_RANK_OBSERVER_H_
