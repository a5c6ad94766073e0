#include "placement/policy.h"

#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "placement/eplb.h"
#include "placement/migration_plan.h"

namespace ballast {
namespace {

// Leaves every layer as it started.
class StayPlanner : public LayerPlanner {
 public:
  void OnBatch(std::span<const int32_t>) override {}
  std::optional<std::vector<int32_t>> Plan(const Input&) override { return std::nullopt; }
  void Adopt(std::span<const int32_t>) override {}
};

class StayPolicy : public Policy {
 public:
  StayPolicy(const char* name, bool fills_spare) : name_(name), fills_spare_(fills_spare) {}

  const char* name() const override { return name_; }
  bool fills_spare_slots_at_start() const override { return fills_spare_; }
  PlacementRules rules_kept() const override { return {.coverage = 0, .node_local = true}; }
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext&, int32_t) const override {
    return std::make_unique<StayPlanner>();
  }

 private:
  const char* name_;
  bool fills_spare_;
};

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

  void OnBatch(std::span<const int32_t>) override {}
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
  const char* name() const override { return "eplb"; }

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
};

}  // namespace

absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name) {
  std::unique_ptr<Policy> policy;
  if (name == "static") policy = std::make_unique<StayPolicy>("static", /*fills_spare=*/false);
  if (name == "never") policy = std::make_unique<StayPolicy>("never", /*fills_spare=*/true);
  if (name == "eplb") policy = std::make_unique<EplbPolicy>();
  if (name == "regret") policy = MakeRegretPolicy();
  if (policy != nullptr) return policy;
  std::string choices;
  for (const std::string& known : PolicyNames()) {
    absl::StrAppend(&choices, choices.empty() ? "" : ", ", known);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown policy '", name, "'; the choices are ", choices));
}

std::vector<std::string> PolicyNames() {
  return {"static", "never", "eplb", "regret"};
}

}  // namespace ballast
