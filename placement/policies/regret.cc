// The incremental planner (regret.h) as a policy.
#include "placement/regret.h"

#include "placement/policy.h"

namespace ballast {
namespace {

class RegretPolicy : public Policy {
 public:
  bool meters_itself() const override { return true; }
  PlacementRules rules_kept() const override { return {.coverage = 1, .node_local = true}; }
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    return std::make_unique<RegretPlanner>(context, context.initial.expert_of_slot(layer));
  }
};

absl::StatusOr<std::unique_ptr<Policy>> Make(const std::string&) {
  return std::make_unique<RegretPolicy>();
}

}  // namespace

std::vector<PolicyFamily> PoliciesIn_regret() {
  return {{"regret", "", Make}};
}

}  // namespace ballast
