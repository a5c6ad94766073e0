// The Expert Parallelism Load Balancer as a policy: the baseline that everybody knows.
//   eplb             when the window's imbalance would fall enough
//   eplb-interval:N  every N steps, from those N steps
#include "placement/eplb.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "placement/migration_plan.h"
#include "placement/policy.h"

namespace ballast {
namespace {

// Whether the nodes are equal blocks of consecutive ranks, as EPLB's hierarchical form numbers
// them.
bool NodesAreBlocks(const Topology& topology) {
  const int32_t num_nodes = topology.num_nodes();
  if (topology.num_ranks() % num_nodes != 0) return false;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    if (topology.node_of_rank[r] != r / (topology.num_ranks() / num_nodes)) return false;
  }
  return true;
}

// A fresh EPLB placement for the window's load, renamed so that few copies move.
class EplbPlanner : public LayerPlanner {
 public:
  EplbPlanner(const PolicyContext& context, int32_t layer)
      : topology_(context.initial.topology()),
        shape_{.num_slots = topology_.num_slots(),
               .num_groups = 1,
               .num_nodes = 1,
               .num_ranks = topology_.num_ranks()} {
    Adopt(context.initial.expert_of_slot(layer));
    if (context.num_groups > 0 && context.initial.num_experts() % context.num_groups == 0 &&
        NodesAreBlocks(topology_) && context.num_groups % topology_.num_nodes() == 0) {
      shape_.num_groups = context.num_groups;
      shape_.num_nodes = topology_.num_nodes();
    }
  }

  void OnBatch(std::span<const int32_t>, TokenKind, float) override {}
  std::optional<std::vector<int32_t>> Plan(const Input& input) override {
    absl::StatusOr<EplbResult> planned = Eplb(input.window, shape_);
    BALLAST_CHECK(planned.ok());  // a placement exists, so its shape has room for all experts
    return AlignRow(topology_, row_, std::move(planned->expert_of_slot));
  }
  void Adopt(std::span<const int32_t> row) override { row_.assign(row.begin(), row.end()); }

 private:
  const Topology topology_;
  EplbShape shape_;
  std::vector<int32_t> row_;  // in force
};

class EplbPolicy : public Policy {
 public:
  // `interval_steps` 0: plans when the controller finds that it would pay.
  explicit EplbPolicy(int32_t interval_steps) : interval_steps_(interval_steps) {}

  int32_t interval_steps() const override { return interval_steps_; }

  absl::Status CheckSupport(const Placement& placement) const override {
    const Topology& topology = placement.topology();
    for (int32_t r = 1; r < topology.num_ranks(); ++r) {
      if (topology.slots_on(r) != topology.slots_on(0)) {
        return absl::InvalidArgumentError(
            absl::StrCat("policy eplb needs ranks with equally many slots; rank 0 has ",
                         topology.slots_on(0), " and rank ", r, " has ", topology.slots_on(r)));
      }
    }
    return absl::OkStatus();
  }

  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    return std::make_unique<EplbPlanner>(context, layer);
  }

 private:
  int32_t interval_steps_;
};

absl::StatusOr<std::unique_ptr<Policy>> Make(const std::string&) {
  return std::make_unique<EplbPolicy>(0);
}

absl::StatusOr<std::unique_ptr<Policy>> MakeInterval(const std::string& argument) {
  constexpr int32_t kLongest = 1 << 20;
  int32_t interval = 0;
  if (!absl::SimpleAtoi(argument, &interval) || interval < 1 || interval > kLongest) {
    return absl::InvalidArgumentError(absl::StrCat("policy 'eplb-interval:", argument,
                                                   "': the interval is '", argument,
                                                   "', allowed: 1 to ", kLongest));
  }
  return std::make_unique<EplbPolicy>(interval);
}

}  // namespace

std::vector<PolicyFamily> PoliciesIn_eplb() {
  return {{"eplb", "", Make}, {"eplb-interval", "N", MakeInterval}};
}

}  // namespace ballast
