#include "placement/eplb.h"

#include <algorithm>
#include <numeric>

#include "base/status.h"

namespace ballast {
namespace {

// Packs `weight.size()` items into packs of equal cardinality and comparable weight. Returns for
// each item its place, pack * items_per_pack + arrival order in the pack.
std::vector<int32_t> PackBalanced(std::span<const float> weight, int32_t num_packs) {
  const int32_t num_items = static_cast<int32_t>(weight.size());
  const int32_t items_per_pack = num_items / num_packs;
  std::vector<int32_t> order(num_items);
  std::iota(order.begin(), order.end(), 0);
  if (items_per_pack == 1) return order;
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return weight[a] > weight[b]; });
  std::vector<float> pack_weight(num_packs, 0.0f);
  std::vector<int32_t> pack_size(num_packs, 0);
  std::vector<int32_t> place(num_items);
  for (int32_t item : order) {
    int32_t lightest = -1;
    for (int32_t p = 0; p < num_packs; ++p) {
      if (pack_size[p] == items_per_pack) continue;
      if (lightest < 0 || pack_weight[p] < pack_weight[lightest]) lightest = p;
    }
    place[item] = lightest * items_per_pack + pack_size[lightest]++;
    pack_weight[lightest] += weight[item];
  }
  return place;
}

// Gives every expert of a node one copy and each further slot to the expert with the largest load
// per copy. Returns the expert of each copy in the order they were made.
std::vector<int32_t> Replicate(std::span<const float> load, int32_t num_copies,
                               std::vector<int32_t>* num_replicas) {
  const int32_t num_experts = static_cast<int32_t>(load.size());
  std::vector<int32_t> expert_of_copy(num_copies);
  std::iota(expert_of_copy.begin(), expert_of_copy.begin() + num_experts, 0);
  num_replicas->assign(num_experts, 1);
  std::vector<float> load_per_copy(load.begin(), load.end());
  for (int32_t c = num_experts; c < num_copies; ++c) {
    const auto hottest = std::max_element(load_per_copy.begin(), load_per_copy.end());
    const int32_t e = static_cast<int32_t>(hottest - load_per_copy.begin());
    expert_of_copy[c] = e;
    *hottest = load[e] / static_cast<float>(++(*num_replicas)[e]);
  }
  return expert_of_copy;
}

absl::Status CheckShape(int32_t num_experts, const EplbShape& shape) {
  const auto check = [](bool ok, const char* what, int32_t a, int32_t b) {
    return ok ? absl::OkStatus()
              : absl::InvalidArgumentError(absl::StrCat("EPLB: ", what, ": ", a, " and ", b));
  };
  const auto divides = [](int32_t a, int32_t b) { return b > 0 && a > 0 && a % b == 0; };
  BALLAST_RETURN_IF_ERROR(check(divides(num_experts, shape.num_groups),
                                "experts do not divide into groups", num_experts,
                                shape.num_groups));
  BALLAST_RETURN_IF_ERROR(check(divides(shape.num_ranks, shape.num_nodes),
                                "ranks do not divide into nodes", shape.num_ranks,
                                shape.num_nodes));
  BALLAST_RETURN_IF_ERROR(check(divides(shape.num_slots, shape.num_ranks),
                                "slots do not divide into ranks", shape.num_slots,
                                shape.num_ranks));
  return check(shape.num_slots >= num_experts, "fewer slots than experts", shape.num_slots,
               num_experts);
}

}  // namespace

absl::StatusOr<EplbResult> Eplb(std::span<const int64_t> load, const EplbShape& shape) {
  const int32_t num_experts = static_cast<int32_t>(load.size());
  BALLAST_RETURN_IF_ERROR(CheckShape(num_experts, shape));
  const bool hierarchical = shape.num_groups % shape.num_nodes == 0;
  const int32_t num_groups = hierarchical ? shape.num_groups : 1;
  const int32_t num_nodes = hierarchical ? shape.num_nodes : 1;
  const int32_t group_size = num_experts / num_groups;
  const int32_t experts_per_node = num_experts / num_nodes;
  const int32_t slots_per_node = shape.num_slots / num_nodes;

  // Groups to nodes: afterwards by_node lists the experts node by node, whole groups in a row.
  std::vector<float> group_load(num_groups);
  for (int32_t g = 0; g < num_groups; ++g) {
    const auto first = load.begin() + g * group_size;
    group_load[g] = static_cast<float>(std::accumulate(first, first + group_size, int64_t{0}));
  }
  const std::vector<int32_t> place_of_group = PackBalanced(group_load, num_nodes);
  std::vector<int32_t> by_node(num_experts);
  for (int32_t e = 0; e < num_experts; ++e) {
    by_node[place_of_group[e / group_size] * group_size + e % group_size] = e;
  }

  EplbResult result;
  result.expert_of_slot.resize(shape.num_slots);
  result.num_replicas.resize(num_experts);
  for (int32_t node = 0; node < num_nodes; ++node) {
    const std::span<const int32_t> experts =
        std::span<const int32_t>(by_node).subspan(node * experts_per_node, experts_per_node);
    std::vector<float> node_load;
    for (int32_t e : experts) node_load.push_back(static_cast<float>(load[e]));
    std::vector<int32_t> replicas;
    const std::vector<int32_t> copies = Replicate(node_load, slots_per_node, &replicas);
    std::vector<float> copy_load;
    for (int32_t c : copies) copy_load.push_back(node_load[c] / static_cast<float>(replicas[c]));
    const std::vector<int32_t> place = PackBalanced(copy_load, shape.num_ranks / num_nodes);
    for (int32_t c = 0; c < slots_per_node; ++c) {
      result.expert_of_slot[node * slots_per_node + place[c]] = experts[copies[c]];
    }
    for (int32_t i = 0; i < experts_per_node; ++i) result.num_replicas[experts[i]] = replicas[i];
  }
  return result;
}

}  // namespace ballast
