#include "placement/policy.h"

#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "placement/eplb.h"
#include "placement/migration_plan.h"

namespace ballast {
namespace {

// Leaves every layer as it started.
class StayPolicy : public Policy {
 public:
  StayPolicy(const char* name, bool fills_spare) : name_(name), fills_spare_(fills_spare) {}

  const char* name() const override { return name_; }
  bool fills_spare_slots_at_start() const override { return fills_spare_; }
  std::optional<std::vector<int32_t>> PlanLayer(const LayerPlanInput&) const override {
    return std::nullopt;
  }

 private:
  const char* name_;
  bool fills_spare_;
};

// A fresh EPLB placement for the window's load, renamed so that few copies move.
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

  std::optional<std::vector<int32_t>> PlanLayer(const LayerPlanInput& input) const override {
    if (!CheckSupport(*input.current).ok()) return std::nullopt;
    const Topology& topology = input.current->topology();
    const int32_t num_experts = input.current->num_experts();
    EplbShape shape{.num_slots = topology.num_slots(),
                    .num_groups = 1,
                    .num_nodes = 1,
                    .num_ranks = topology.num_ranks()};
    if (input.num_groups > 0 && num_experts % input.num_groups == 0 && NodesAreBlocks(topology) &&
        input.num_groups % topology.num_nodes() == 0) {
      shape.num_groups = input.num_groups;
      shape.num_nodes = topology.num_nodes();
    }
    absl::StatusOr<EplbResult> planned = Eplb(input.load, shape);
    BALLAST_CHECK(planned.ok());  // a placement exists, so its shape has room for all experts
    return AlignRow(topology, input.current->expert_of_slot(input.layer),
                    std::move(planned->expert_of_slot));
  }

 private:
  // Whether the nodes are equal blocks of consecutive ranks, as the hierarchical form numbers them.
  static bool NodesAreBlocks(const Topology& topology) {
    const int32_t num_nodes = topology.num_nodes();
    if (topology.num_ranks() % num_nodes != 0) return false;
    for (int32_t r = 0; r < topology.num_ranks(); ++r) {
      if (topology.node_of_rank[r] != r / (topology.num_ranks() / num_nodes)) return false;
    }
    return true;
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name) {
  std::unique_ptr<Policy> policy;
  if (name == "static") policy = std::make_unique<StayPolicy>("static", /*fills_spare=*/false);
  if (name == "never") policy = std::make_unique<StayPolicy>("never", /*fills_spare=*/true);
  if (name == "eplb") policy = std::make_unique<EplbPolicy>();
  if (policy != nullptr) return policy;
  std::string choices;
  for (const std::string& known : PolicyNames()) {
    absl::StrAppend(&choices, choices.empty() ? "" : ", ", known);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown policy '", name, "'; the choices are ", choices));
}

std::vector<std::string> PolicyNames() {
  return {"static", "never", "eplb"};
}

}  // namespace ballast
