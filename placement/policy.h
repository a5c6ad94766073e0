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
#include "placement/step_counts.h"

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

  // SHAPES counts [E] copies per logical expert of one batch, whose tokens are all of one kind
  // UNITS  weight: the batch in ideal times of a layer and batch, in (0, 1]. Less than 1 where a
  //        step was of both kinds: its part
  virtual void OnBatch(std::span<const int32_t> counts, TokenKind kind, float weight) = 0;

  // The wanted row, or nullopt when the layer should stay as it is. `forced`: the caller wants the
  // best row whatever it costs.
  struct Input {
    std::span<const int64_t> window;  // [E] sums over the windows of both kinds
    bool forced = false;
  };
  virtual std::optional<std::vector<int32_t>> Plan(const Input& input) = 0;

  // The row is now in force.
  virtual void Adopt(std::span<const int32_t> row) = 0;
};

// A way to plan.
class Policy {
 public:
  virtual ~Policy() = default;
  // Whether the placement that this policy starts from has its spare slots filled (as a ring).
  virtual bool fills_spare_slots_at_start() const { return true; }
  // Whether it weighs what a move gains against what it costs. The controller gates the rows of
  // those that do not.
  virtual bool meters_itself() const { return false; }
  // 0: whenever there is reason to; N: every N steps, from the counts of those N steps.
  virtual int32_t interval_steps() const { return 0; }
  // The strictest rules that all its plans keep. A policy that follows no load keeps no coverage,
  // even where its copies happen to cover the experts that are hot now.
  virtual PlacementRules rules_kept() const { return {}; }
  // Whether the policy can plan for such a placement, before it is asked to.
  // ERRORS kInvalidArgument names the policy and what it cannot do
  virtual absl::Status CheckSupport(const Placement&) const { return absl::OkStatus(); }
  virtual std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                         int32_t layer) const = 0;
};

// A name that policies are asked for by: NAME, or NAME:ARGUMENT where it takes one.
struct PolicyFamily {
  std::string name;
  std::string argument;  // what help calls it; empty: none
  // ERRORS kInvalidArgument names the policy, the argument and what is allowed
  absl::StatusOr<std::unique_ptr<Policy>> (*make)(const std::string& argument);
};

// To add a policy, put a file into placement/policies/. NAME.cc defines
//   std::vector<PolicyFamily> PoliciesIn_NAME();
// in namespace ballast, and with the next build all commands know what it returns.

// ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name);
// The names that MakePolicy accepts, file by file, for help texts.
std::vector<std::string> PolicyNames();

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_POLICY_H_
