#include "placement/eplb.h"

#include <catch2/catch.hpp>
#include <set>
#include <utility>

#include "base/random.h"

namespace ballast {
namespace {

const std::vector<int64_t> kLoad[] = {{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
                                      {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}};

// ---- The published algorithm once more, as relabellings of whole arrays
// --------------------------

using Ids = std::vector<int32_t>;
using Weights = std::vector<float>;

template <typename T>
std::vector<T> Gather(const std::vector<T>& from, const Ids& at) {
  std::vector<T> out;
  for (int32_t i : at) out.push_back(from.at(i));
  return out;
}

Ids InverseOf(const Ids& permutation) {
  Ids inverse(permutation.size(), -1);
  for (size_t i = 0; i < permutation.size(); ++i) {
    inverse.at(permutation[i]) = static_cast<int32_t>(i);
  }
  return inverse;
}

// Where each item ends up when packs of equal size are laid side by side: heaviest item first, each
// into the lightest pack that has room; ties to the lower index.
Ids Packed(const Weights& weight, int32_t num_packs) {
  const int32_t room = static_cast<int32_t>(weight.size()) / num_packs;
  std::vector<Ids> packs(num_packs);
  Weights pack_weight(num_packs, 0.0f);
  std::set<std::pair<float, int32_t>> heaviest_first;
  for (size_t i = 0; i < weight.size(); ++i) {
    heaviest_first.insert({-weight[i], static_cast<int32_t>(i)});
  }
  for (const auto& [minus_weight, item] : heaviest_first) {
    std::set<std::pair<float, int32_t>> lightest_first;
    for (int32_t p = 0; p < num_packs; ++p) {
      if (static_cast<int32_t>(packs[p].size()) < room) lightest_first.insert({pack_weight[p], p});
    }
    // Packs of one item are not packed at all: every item stays where it is.
    const int32_t pack = room == 1 ? item : lightest_first.begin()->second;
    packs[pack].push_back(item);
    pack_weight[pack] -= minus_weight;
  }
  Ids side_by_side;
  for (const Ids& pack : packs) side_by_side.insert(side_by_side.end(), pack.begin(), pack.end());
  return InverseOf(side_by_side);
}

// One layer. Where groups do not divide into nodes: one node, one group.
EplbResult OracleEplb(const std::vector<int64_t>& load, EplbShape shape) {
  if (shape.num_groups % shape.num_nodes != 0) shape.num_groups = shape.num_nodes = 1;
  const int32_t num_experts = static_cast<int32_t>(load.size());
  const int32_t group_size = num_experts / shape.num_groups;
  const int32_t node_experts = num_experts / shape.num_nodes;
  const int32_t node_slots = shape.num_slots / shape.num_nodes;
  const Weights weight(load.begin(), load.end());

  Weights group_weight(shape.num_groups, 0.0f);
  for (int32_t e = 0; e < num_experts; ++e) group_weight[e / group_size] += weight[e];
  const Ids new_group = Packed(group_weight, shape.num_nodes);
  Ids label(num_experts);  // of each expert, counted node by node
  for (int32_t e = 0; e < num_experts; ++e) {
    label[e] = new_group[e / group_size] * group_size + e % group_size;
  }
  const Ids expert_of_label = InverseOf(label);
  const Weights labelled = Gather(weight, expert_of_label);

  Ids label_of_slot, count_of_label(num_experts, 1);
  for (int32_t node = 0; node < shape.num_nodes; ++node) {
    const int32_t first = node * node_experts;
    Ids copies;  // as they are made, by label
    for (int32_t i = 0; i < node_experts; ++i) copies.push_back(first + i);
    const auto per_copy = [&](int32_t l) {
      return labelled[l] / static_cast<float>(count_of_label[l]);
    };
    while (static_cast<int32_t>(copies.size()) < node_slots) {
      int32_t hottest = first;
      for (int32_t l = first; l < first + node_experts; ++l) {
        if (per_copy(l) > per_copy(hottest)) hottest = l;
      }
      ++count_of_label[hottest];
      copies.push_back(hottest);
    }
    Weights copy_weight;
    for (int32_t l : copies) copy_weight.push_back(per_copy(l));
    const Ids by_slot =
        Gather(copies, InverseOf(Packed(copy_weight, shape.num_ranks / shape.num_nodes)));
    label_of_slot.insert(label_of_slot.end(), by_slot.begin(), by_slot.end());
  }
  return {.expert_of_slot = Gather(expert_of_label, label_of_slot),
          .num_replicas = Gather(count_of_label, label)};
}

TEST_CASE("EPLB gives the placement that its authors publish", "[placement][eplb][golden]") {
  const std::vector<int32_t> slots[] = {{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1},
                                        {7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}};
  const std::vector<int32_t> replicas[] = {{1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1},
                                           {1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1}};
  for (int layer = 0; layer < 2; ++layer) {
    const auto result =
        Eplb(kLoad[layer], {.num_slots = 16, .num_groups = 4, .num_nodes = 2, .num_ranks = 8});
    REQUIRE(result.ok());
    REQUIRE(result->expert_of_slot == slots[layer]);
    REQUIRE(result->num_replicas == replicas[layer]);
  }
}

TEST_CASE("the oracle gives the published placement too", "[placement][eplb][golden]") {
  const EplbShape shape = {.num_slots = 16, .num_groups = 4, .num_nodes = 2, .num_ranks = 8};
  REQUIRE(OracleEplb(kLoad[0], shape).expert_of_slot ==
          Ids{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1});
  REQUIRE(OracleEplb(kLoad[1], shape).num_replicas == Ids{1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1});
}

TEST_CASE("EPLB equals an independent implementation on random loads",
          "[placement][eplb][property]") {
  Random random(20260811);
  int hierarchical = 0;
  for (int i = 0; i < 1000; ++i) {
    const int32_t nodes = 1 + random.Below(4);
    const int32_t groups =
        random.Below(3) == 0 ? 1 + random.Below(6) : nodes * (1 + random.Below(4));
    const int32_t experts = groups * (1 + random.Below(12));
    const int32_t ranks = nodes * (1 + random.Below(6));
    const int32_t slots = ranks * ((experts + ranks - 1) / ranks + random.Below(4));
    const EplbShape shape = {slots, groups, nodes, ranks};
    // Many ties, some ties, none; a third of the loads zero; all zero. Sums stay below 2^24, where
    // single precision counts exactly whatever the order.
    const uint32_t kind = random.Below(8);
    std::vector<int64_t> load(experts, 0);
    for (int64_t& l : load) {
      if (kind == 0 || (kind < 4 && random.Below(3) == 0)) continue;
      l = random.Below(kind % 3 == 0 ? 4 : kind % 3 == 1 ? 50 : 50000);
    }
    const auto got = Eplb(load, shape);
    const EplbResult want = OracleEplb(load, shape);
    CAPTURE(i, experts, groups, nodes, ranks, slots, load);
    REQUIRE(got.ok());
    REQUIRE(got->expert_of_slot == want.expert_of_slot);
    REQUIRE(got->num_replicas == want.num_replicas);
    hierarchical += nodes > 1 && groups % nodes == 0;
  }
  REQUIRE(hierarchical > 300);
  REQUIRE(hierarchical < 900);
}

TEST_CASE("EPLB breaks ties by the lowest index", "[placement][eplb]") {
  // All loads are zero: every extra copy goes to expert 0, and copies go to ranks in turn.
  const std::vector<int64_t> zeros(4, 0);
  const auto result =
      Eplb(zeros, {.num_slots = 6, .num_groups = 1, .num_nodes = 1, .num_ranks = 2});
  REQUIRE(result.ok());
  REQUIRE(result->num_replicas == std::vector<int32_t>{3, 1, 1, 1});
  REQUIRE(result->expert_of_slot == std::vector<int32_t>{0, 1, 2, 3, 0, 0});
  // One slot per rank: copies stay in the order in which they were made.
  const std::vector<int64_t> rising = {1, 2, 3};
  const auto identity =
      Eplb(rising, {.num_slots = 4, .num_groups = 1, .num_nodes = 1, .num_ranks = 4});
  REQUIRE(identity.ok());
  REQUIRE(identity->expert_of_slot == std::vector<int32_t>{0, 1, 2, 2});
}

TEST_CASE("EPLB with groups that do not divide into nodes is global", "[placement][eplb]") {
  const auto odd =
      Eplb(kLoad[0], {.num_slots = 16, .num_groups = 3, .num_nodes = 2, .num_ranks = 8});
  const auto global =
      Eplb(kLoad[0], {.num_slots = 16, .num_groups = 1, .num_nodes = 1, .num_ranks = 8});
  REQUIRE(odd.ok());
  REQUIRE(odd->expert_of_slot == global->expert_of_slot);
}

TEST_CASE("EPLB refuses shapes that do not divide", "[placement][eplb][errors]") {
  for (const EplbShape& shape :
       {EplbShape{16, 5, 1, 8}, EplbShape{16, 4, 3, 8}, EplbShape{17, 4, 2, 8},
        EplbShape{8, 4, 2, 8}, EplbShape{0, 0, 0, 0}, EplbShape{16, 4, 0, 8}}) {
    REQUIRE(Eplb(kLoad[0], shape).status().code() == absl::StatusCode::kInvalidArgument);
  }
}

TEST_CASE("EPLB places every expert as often as it says", "[placement][eplb][property]") {
  Random random(1);
  for (int i = 0; i < 300; ++i) {
    const int32_t nodes = 1 + random.Below(3);
    const int32_t groups = nodes * (1 + random.Below(3));
    const int32_t experts = groups * (1 + random.Below(4));
    const int32_t ranks = nodes * (1 + random.Below(4));
    const int32_t slots = ranks * ((experts + ranks - 1) / ranks + random.Below(3));
    std::vector<int64_t> load(experts);
    for (int64_t& l : load) l = random.Below(1000);
    const auto result = Eplb(load, {slots, groups, nodes, ranks});
    REQUIRE(result.ok());
    std::vector<int32_t> seen(experts, 0);
    for (int32_t e : result->expert_of_slot) ++seen.at(e);
    REQUIRE(seen == result->num_replicas);
  }
}

}  // namespace
}  // namespace ballast
