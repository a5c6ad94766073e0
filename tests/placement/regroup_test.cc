#include "placement/regroup.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

#include "base/random.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;

std::vector<GroupMember> Stay(const std::vector<int32_t>& ranks) {
  std::vector<GroupMember> members;
  for (const int32_t r : ranks) members.push_back({.old_rank = r});
  return members;
}

std::vector<int32_t> RowOf(const Placement& placement, int32_t layer) {
  const auto row = placement.expert_of_slot(layer);
  return {row.begin(), row.end()};
}

TEST_CASE("what only the lost rank held comes to slots that can be spared",
          "[placement][regroup]") {
  // Rank 1 goes. Of its experts, 2 is on rank 0 too; 3 is nowhere else.
  const auto current = Placement::Create(2, 5, Topology::Uniform(3, 3),
                                         {0, 1, 2, 2, 3, kNoExpert, 4, 0, 0,   // 0 on ranks 0 and 2
                                          0, 1, 2, 3, 3, 3, 4, kNoExpert, 2},  // an empty slot
                                         7);
  REQUIRE(current.ok());
  const auto regrouped = Regroup(*current, Stay({0, 2}), 9);
  REQUIRE(regrouped.ok());
  const Placement& after = regrouped->placement;
  CHECK(after.epoch() == 9);
  CHECK(after.topology() == Topology::Uniform(2, 3));
  // Layer 0: 0 has three slots, the most on either rank; rank 0 is the lowest.
  CHECK(RowOf(after, 0) == std::vector<int32_t>{3, 1, 2, 4, 0, 0});
  // Layer 1: rank 1 (2 before) has reloaded less, and an empty slot.
  CHECK(RowOf(after, 1) == std::vector<int32_t>{0, 1, 2, 4, 3, 2});
  CHECK(regrouped->reloads == std::vector<Reload>{{0, 3, 0}, {1, 3, 1}});
  CHECK(regrouped->more_slots_per_rank == 0);
}

TEST_CASE("ranks get more slots where those left are fewer than the experts",
          "[placement][regroup]") {
  const auto current = Placement::Contiguous(1, 8, Topology::Uniform(4, 2), false);
  REQUIRE(current.ok());
  const auto regrouped = Regroup(*current, Stay({0, 3}), 1);
  REQUIRE(regrouped.ok());
  CHECK(regrouped->more_slots_per_rank == 2);
  CHECK(RowOf(regrouped->placement, 0) == std::vector<int32_t>{0, 1, 2, 4, 6, 7, 3, 5});
  CHECK(regrouped->reloads == std::vector<Reload>{{0, 2, 0}, {0, 3, 1}, {0, 4, 0}, {0, 5, 1}});
}

TEST_CASE("a rank that comes has empty slots", "[placement][regroup]") {
  Topology two_nodes = Topology::Uniform(4, 2, 2);
  const auto current = Placement::Contiguous(1, 8, two_nodes, false);
  REQUIRE(current.ok());
  const std::vector<GroupMember> members = {
      {.old_rank = 2}, {.old_rank = 3}, {.old_rank = 0}, {.slots = 3, .node = 5}, {.old_rank = 1}};
  const auto regrouped = Regroup(*current, members, 2);
  REQUIRE(regrouped.ok());
  CHECK(RowOf(regrouped->placement, 0) ==
        std::vector<int32_t>{4, 5, 6, 7, 0, 1, kNoExpert, kNoExpert, kNoExpert, 2, 3});
  CHECK(regrouped->placement.topology().node_of_rank == std::vector<int32_t>{1, 1, 0, 2, 0});
  CHECK(regrouped->reloads.empty());
}

TEST_CASE("groups that cannot be are refused", "[placement][regroup][errors]") {
  const auto current = Placement::Contiguous(1, 4, Topology::Uniform(2, 2), false);
  REQUIRE(current.ok());
  const auto message = [&](std::vector<GroupMember> members) {
    const auto result = Regroup(*current, members, 1);
    REQUIRE(absl::IsInvalidArgument(result.status()));
    return std::string(result.status().message());
  };
  CHECK_THAT(message({}), Contains("no rank of the placement in force stays"));
  CHECK_THAT(message({{.slots = 4}}), Contains("no rank of the placement in force stays"));
  CHECK_THAT(message(Stay({0, 2})), Contains("was rank 2; allowed: 0 to 1"));
  CHECK_THAT(message(Stay({1, 1})), Contains("rank 1 is named twice"));
  CHECK_THAT(message({{.old_rank = 0}, {.slots = -1}}), Contains("-1 slots"));
}

TEST_CASE("any ranks may be lost from any placement", "[placement][regroup]") {
  Random random(3);
  for (int trial = 0; trial < 2000; ++trial) {
    const int32_t ranks = 2 + static_cast<int32_t>(random.Below(7));
    const int32_t experts = 1 + static_cast<int32_t>(random.Below(20));
    const int32_t layers = 1 + static_cast<int32_t>(random.Below(3));
    Topology topology;
    topology.slot_offsets = {0};
    for (int32_t r = 0; r < ranks; ++r) {
      topology.slot_offsets.push_back(topology.slot_offsets.back() +
                                      static_cast<int32_t>(random.Below(8)));
      topology.node_of_rank.push_back(0);
    }
    if (topology.num_slots() < experts) continue;
    std::vector<int32_t> slots;
    for (int32_t layer = 0; layer < layers; ++layer) {
      std::vector<int32_t> row;
      for (int32_t s = 0; s < topology.num_slots(); ++s) {
        row.push_back(s < experts ? s : static_cast<int32_t>(random.Below(experts + 1)) - 1);
      }
      for (size_t i = row.size(); i > 1; --i) std::swap(row[i - 1], row[random.Below(i)]);
      slots.insert(slots.end(), row.begin(), row.end());
    }
    const auto current = Placement::Create(layers, experts, topology, slots, 1);
    REQUIRE(current.ok());
    std::vector<int32_t> left;
    for (int32_t r = 0; r < ranks; ++r) {
      if (random.Below(3) > 0) left.push_back(r);
    }
    if (left.empty()) left.push_back(0);
    const auto regrouped = Regroup(*current, Stay(left), 2);
    REQUIRE(regrouped.ok());  // so every expert has a slot
    const Placement& after = regrouped->placement;
    std::set<std::tuple<int32_t, int32_t, int32_t>> reloads;
    for (const Reload& r : regrouped->reloads) reloads.insert({r.layer, r.expert, r.rank});
    REQUIRE(reloads.size() == regrouped->reloads.size());
    for (int32_t layer = 0; layer < layers; ++layer) {
      for (int32_t e = 0; e < experts; ++e) {
        const bool survived = std::any_of(left.begin(), left.end(),
                                          [&](int32_t r) { return current->Hosts(layer, e, r); });
        bool reloaded = false;
        for (size_t r = 0; r < left.size(); ++r) {
          const int32_t rank = static_cast<int32_t>(r);
          const bool loads = reloads.contains({layer, e, rank});
          reloaded |= loads;
          // What a rank holds afterwards it held before, or reads.
          if (after.Hosts(layer, e, rank)) REQUIRE(loads != current->Hosts(layer, e, left[r]));
        }
        REQUIRE(reloaded != survived);
      }
    }
    const int32_t lacking = experts - after.topology().num_slots() +
                            regrouped->more_slots_per_rank * static_cast<int32_t>(left.size());
    REQUIRE((regrouped->more_slots_per_rank > 0) == (lacking > 0));
  }
}

TEST_CASE("what the loss of a rank would cost is counted", "[placement][regroup]") {
  const auto current =
      Placement::Create(2, 3, Topology::Uniform(2, 2), {0, 1, 1, 2, 0, 0, 1, 2}, 1);
  REQUIRE(current.ok());
  CHECK(ReloadsIfLost(*current) == std::vector<int32_t>{2, 3});
  // It is what a regrouping then brings back.
  const auto regrouped = Regroup(*current, Stay({0}), 2);
  REQUIRE(regrouped.ok());
  CHECK(regrouped->reloads.size() == 3);
}

}  // namespace
}  // namespace ballast
