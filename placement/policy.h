#ifndef BALLAST_PLACEMENT_POLICY_H_
#define BALLAST_PLACEMENT_POLICY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"
#include "placement/rules.h"

namespace ballast {

// What every layer of a model has in common for a policy.
struct PolicyContext {
  Placement initial;       // the placement in force at the start
  int32_t num_groups = 1;  // expert groups of the model (1: none)
  double rho = 0.1;        // transfer of one copy, in ideal times of a layer and batch
  bool in_step = false;    // plans serve the very batch whose counts made them
  PlacementRules rules = {};
};

// Plans one layer. Sees every batch, and says which logical expert each slot should hold.
//
// Call order: (OnBatch (Plan (Adopt)?)?)*. Same calls, same bytes out: no clock, no I/O.
class LayerPlanner {
 public:
  virtual ~LayerPlanner() = default;

  // SHAPES counts [E] copies per logical expert of one batch   window [E] sums over the window
  virtual void OnBatch(std::span<const int32_t> counts) = 0;

  // The wanted row, or nullopt when the layer should stay as it is. `forced`: the caller wants the
  // best row whatever it costs.
  struct Input {
    std::span<const int64_t> window;
    bool forced = false;
  };
  virtual std::optional<std::vector<int32_t>> Plan(const Input& input) = 0;

  // The row is now in force.
  virtual void Adopt(std::span<const int32_t> row) = 0;
};

// A way to plan, by name.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual const char* name() const = 0;
  // Whether the placement that this policy starts from has its spare slots filled (as a ring).
  virtual bool fills_spare_slots_at_start() const { return true; }
  // Whether it weighs what a move gains against what it costs. The controller gates the rows of
  // those that do not.
  virtual bool meters_itself() const { return false; }
  // The strictest rules that all its plans keep. A policy that follows no load keeps no coverage,
  // even where its copies happen to cover the experts that are hot now.
  virtual PlacementRules rules_kept() const { return {}; }
  // Whether the policy can plan for such a placement, before it is asked to.
  // ERRORS kInvalidArgument names the policy and what it cannot do
  virtual absl::Status CheckSupport(const Placement&) const { return absl::OkStatus(); }
  virtual std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                         int32_t layer) const = 0;
};

// "static", "never", "eplb", "regret". ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name);
std::unique_ptr<Policy> MakeRegretPolicy();  // regret.cc
// Names that MakePolicy accepts, for help texts.
std::vector<std::string> PolicyNames();

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_POLICY_H_
