#ifndef BALLAST_PLACEMENT_REPLAY_H_
#define BALLAST_PLACEMENT_REPLAY_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/cluster_model.h"
#include "placement/controller.h"
#include "placement/split.h"
#include "placement/trace.h"

namespace ballast {

// When a plan that was made from a step's counts is in force.
enum class PlanTime {
  kAfterStep,  // from the next step on; its copies are charged there
  kInStep,     // in the step itself, before it is split; its copies are charged there
};

// "after-step", "in-step". ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<PlanTime> ParsePlanTime(const std::string& name);
const char* NameOf(PlanTime when);

struct ReplayOptions {
  Topology topology;
  std::vector<std::string> policies;
  std::vector<SplitMode> splits = {SplitMode::kExact};
  std::vector<double> rhos = {0.3};
  PlanTime when = PlanTime::kAfterStep;
  CostConstants constants = {};              // of the cost split
  std::optional<ClusterModel> cluster = {};  // predicts times where given
  // For the policies that the controller runs; `policy` is set from the policy's name.
  ControllerOptions controller = {};
  // Copies per step, over all layers and ranks, that the controller may make (those not made add up
  // to the slots of a layer, or to one step's where these are more); 0: no limit.
  double copy_budget = 0.0;
  // Nanoseconds of any monotonic clock, for the times of planning and splitting; without one they
  // are 0. Everything else depends on the trace and these options alone.
  std::function<int64_t()> now_ns = {};
  // Called after each step with the steps done and the steps in all.
  std::function<void(int64_t, int64_t)> progress = {};
};

// What one policy did under one split; the figures of ReplayFigures come from it.
struct ReplaySeries {
  std::string policy;
  SplitMode split = SplitMode::kExact;
  std::vector<double> rhos;      // what it holds for: all, unless the policy itself weighs rho
  std::vector<float> imbalance;  // [steps * layers] largest rank load / mean; 1 without copies
  std::vector<float>
      node_imbalance;            // [steps * layers] the largest node load / mean; 1 without copies
  std::vector<int32_t> copies;   // [steps * layers] experts that entered a rank that lacked them
  std::vector<int32_t> busiest;  // [steps * layers] of these, on the rank that got most
  std::vector<double> plan_us;   // [plans] time of one decision / layers
  std::vector<double> split_us;  // [steps * layers]
  // With a cluster, else empty:
  std::vector<double> layer_us;  // [steps * layers] predicted
  std::vector<LayerTime> steps;  // [steps] predicted, the layers added up
  std::vector<double> copy_us;   // [steps] predicted, of the step's copies on free links
};

// What a cluster is predicted to take, in microseconds. A step is the sum of its MoE layers.
struct PredictedFigures {
  double layer_us_mean = 0.0, layer_us_p99 = 0.0;
  double step_us_mean = 0.0, step_us_p99 = 0.0;  // without copies of experts
  double dispatch_us_mean = 0.0, compute_us_mean = 0.0, combine_us_mean = 0.0;  // per step
  double copy_us_mean = 0.0;  // per step, on free links
  // Steps wait for their copies and, where it is in-step, for the planning as timed here.
  double blocking_step_us_mean = 0.0;
  // Copies take a share of the links while steps run. They meet the links in use for the step's
  // share of dispatch and combine: + copy * (dispatch + combine) / step / (1 - share).
  double background_step_us_mean = 0.0;
};

// One line of the final table. total_cost is the mean over layers and steps of
//   imbalance + rho * copies received by the busiest rank
// in units of an ideal layer-step: rho is the time of one copy over that.
struct ReplayFigures {
  std::string policy;
  SplitMode split = SplitMode::kExact;
  double rho = 0.0;
  double mean_imbalance = 0.0, p99_imbalance = 0.0;
  double mean_node_imbalance = 0.0;  // 1 with one node
  double copies_per_layer_step = 0.0, busiest_copies_per_layer_step = 0.0;
  double total_cost = 0.0;
  double plan_us_mean = 0.0, plan_us_p99 = 0.0;    // per layer-step
  double split_us_mean = 0.0, split_us_p99 = 0.0;  // per layer-step
  // What each layer-step waits for here: the split, and the planning where it is in-step.
  double critical_us_mean = 0.0;
  std::optional<PredictedFigures> predicted = {};  // with a cluster
};

struct ReplayResult {
  int64_t num_steps = 0;
  int32_t num_layers = 0;
  std::vector<ReplaySeries> series;    // policy by policy, split by split
  std::vector<ReplayFigures> figures;  // for each of these, rho by rho
};

// The policies of a replay: those of MakePolicy, which the server's own Controller runs, and those
// of the laboratory:
//   oracle           a full plan from the very counts it is judged on; charged in that step
//   oracle-switch    at the first step of each phase a full plan from that phase's totals
std::vector<std::string> ReplayPolicyNames();

// Plays the trace against every policy and split.
//
// Rules. Each policy starts, free of charge, from the contiguous placement with its spare slots as
// a ring (static: empty; node-local: a ring per node). Every plan is renamed for least movement
// (AlignRow) and takes effect at once; a copy is an expert that enters a rank which lacked it.
// Plans of the last step are not charged. The copies of a layer and step are dealt to the source
// ranks in turn, expert by expert: it matters to price, roundrobin and hash only.
//
// ORDER  deterministic but for the times
// ERRORS kInvalidArgument names the policy or the option that cannot be used
absl::StatusOr<ReplayResult> Replay(const StepTrace& trace, const ReplayOptions& options);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_REPLAY_H_
