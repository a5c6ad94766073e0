#include "placement/eplb.h"

#include <catch2/catch.hpp>

#include "base/random.h"

namespace ballast {
namespace {

const std::vector<int64_t> kLoad[] = {{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
                                      {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}};

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
