// Full plans (full_plan.h) as a policy: a new placement for the window's load when that would pay.
#include "placement/full_plan.h"

#include <utility>

#include "base/check.h"
#include "placement/migration_plan.h"
#include "placement/policy.h"

namespace ballast {
namespace {

// A full plan for the window's load, renamed so that few copies move.
class FullLayerPlanner : public LayerPlanner {
 public:
  FullLayerPlanner(const PolicyContext& context, int32_t layer, FullPlanner planner)
      : topology_(context.initial.topology()), planner_(std::move(planner)) {
    Adopt(context.initial.expert_of_slot(layer));
  }

  void OnBatch(std::span<const int32_t>, TokenKind, float) override {}
  std::optional<std::vector<int32_t>> Plan(const Input& input) override {
    planner_.Plan(input.window, &plan_);
    return AlignRow(topology_, row_, plan_.expert_of_slot);
  }
  void Adopt(std::span<const int32_t> row) override { row_.assign(row.begin(), row.end()); }

 private:
  const Topology topology_;
  FullPlanner planner_;
  FullPlan plan_;
  std::vector<int32_t> row_;  // in force
};

class FullPolicy : public Policy {
 public:
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    absl::StatusOr<FullPlanner> planner =
        FullPlanner::Create(context.initial.topology(), context.initial.num_experts());
    BALLAST_CHECK(planner.ok());  // a placement exists, so its shape has room for all experts
    return std::make_unique<FullLayerPlanner>(context, layer, *std::move(planner));
  }
};

absl::StatusOr<std::unique_ptr<Policy>> Make(const std::string&) {
  return std::make_unique<FullPolicy>();
}

}  // namespace

std::vector<PolicyFamily> PoliciesIn_full() {
  return {{"full", "", Make}};
}

}  // namespace ballast
