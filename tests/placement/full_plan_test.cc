#include "placement/full_plan.h"

#include <catch2/catch.hpp>

#include "tests/placement/full_plan_check.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::BrokenPromise;
using testing::RandomLoad;

FullPlan PlanFor(const Topology& topology, const std::vector<int64_t>& load) {
  auto planner = FullPlanner::Create(topology, static_cast<int32_t>(load.size()));
  REQUIRE(planner.ok());
  FullPlan plan;
  planner->Plan(load, &plan);
  return plan;
}

TEST_CASE("a full plan balances a small load by hand", "[placement][full_plan]") {
  // Sorted: 1 2 3 10 (experts 1 2 3 0), 8 per rank. The last pair up to 8 is 2 3, topped up with 3
  // of expert 0; the rest of it goes with expert 1.
  const Topology topology = Topology::Uniform(2, 3);
  const FullPlan plan = PlanFor(topology, {10, 1, 2, 3});
  REQUIRE(plan.by_windows);
  REQUIRE(plan.largest_load == 8);
  REQUIRE(plan.lower_bound == 8);
  REQUIRE(plan.expert_of_slot == std::vector<int32_t>{2, 3, 0, 1, 0, 3});
  REQUIRE(plan.quota == std::vector<int64_t>{2, 3, 3, 1, 7, 0});
}

TEST_CASE("one spare slot per rank balances any load to the token",
          "[placement][full_plan][property]") {
  REQUIRE(testing::CheckWindows(/*seed=*/20260801, /*rounds=*/10000) == "");
}

TEST_CASE("a hundred times steeper loads than any model has are balanced too",
          "[placement][full_plan]") {
  std::vector<int64_t> load(256, 0);
  load[77] = 1'000'003;
  const Topology topology = Topology::Uniform(32, 9);
  const FullPlan plan = PlanFor(topology, load);
  REQUIRE(BrokenPromise(topology, load, plan) == "");
  REQUIRE(plan.largest_load == 31251);
  load[78] = int64_t{1} << 59;  // beyond the splitter's range: the quotas alone are the proof
  const FullPlan huge = PlanFor(topology, load);
  REQUIRE(huge.largest_load == ((int64_t{1} << 59) + 1'000'003 + 31) / 32);
}

TEST_CASE("a full plan with few spare slots is sound and not worse than its lower bound allows",
          "[placement][full_plan][property]") {
  Random random(7);
  for (int round = 0; round < 2000; ++round) {
    const Topology topology = testing::RandomTopology(&random, 9);
    const int32_t num_experts = 1 + static_cast<int32_t>(random.Below(topology.num_slots()));
    const std::vector<int64_t> load = RandomLoad(&random, num_experts, random.Below(1 << 16));
    const FullPlan plan = PlanFor(topology, load);
    INFO("round " << round << ", " << num_experts << " experts in " << topology.num_slots());
    REQUIRE(BrokenPromise(topology, load, plan) == "");
    REQUIRE(plan.lower_bound == LoadLowerBound(topology, load));
  }
}

TEST_CASE("fewer spare slots than ranks still bring most of the balance",
          "[placement][full_plan]") {
  const Topology tight = Topology::Uniform(8, 8);
  Topology some = tight;  // four of the eight ranks have a spare slot
  for (int32_t r = 0; r < 8; ++r) some.slot_offsets[r + 1] += std::min(r + 1, 4);
  Random random(3);
  int64_t sum_with = 0;
  int64_t sum_without = 0;
  for (int round = 0; round < 100; ++round) {
    const std::vector<int64_t> load = RandomLoad(&random, 64, 100'000);
    const FullPlan without = PlanFor(tight, load);
    const FullPlan with = PlanFor(some, load);
    REQUIRE_FALSE(with.by_windows);
    REQUIRE(BrokenPromise(some, load, with) == "");
    sum_with += with.largest_load;
    sum_without += without.largest_load;
  }
  REQUIRE(2 * sum_with < sum_without + 100 * 12'500);  // less than half the excess over the mean
}

TEST_CASE("the lower bound counts the slots that hot experts need", "[placement][full_plan]") {
  const Topology topology = Topology::Uniform(4, 2);
  // 100 on one expert and three idle ones: four spare slots, so the hot one can be on all ranks.
  REQUIRE(LoadLowerBound(topology, std::vector<int64_t>{100, 0, 0, 0}) == 25);
  // Seven experts leave one spare slot: the hot one is on two ranks at most.
  REQUIRE(LoadLowerBound(topology, std::vector<int64_t>{100, 0, 0, 0, 0, 0, 0}) == 50);
  REQUIRE(LoadLowerBound(topology, std::vector<int64_t>{0, 0, 0}) == 0);
}

TEST_CASE("a full plan fills spare slots as a ring where loads are alike",
          "[placement][full_plan]") {
  const std::vector<int64_t> alike(8, 100);
  const Topology topology = Topology::Uniform(4, 3);
  const FullPlan plan = PlanFor(topology, alike);
  REQUIRE(plan.largest_load == 200);
  const auto placement = Placement::Create(1, 8, topology, plan.expert_of_slot, 0);
  REQUIRE(placement.ok());
  for (int32_t r = 0; r < 4; ++r) {
    const int32_t guest = plan.expert_of_slot[3 * r + 2];
    REQUIRE(placement->Hosts(0, guest, (r + 1) % 4));
  }
}

TEST_CASE("a full plan is the same on every run and for a used planner", "[placement][full_plan]") {
  const Topology topology = Topology::Uniform(8, 9);
  auto used = FullPlanner::Create(topology, 64);
  REQUIRE(used.ok());
  Random random(11);
  for (int round = 0; round < 50; ++round) {
    const std::vector<int64_t> load = RandomLoad(&random, 64, 10'000);
    FullPlan again;
    used->Plan(load, &again);
    const FullPlan fresh = PlanFor(topology, load);
    REQUIRE(again.expert_of_slot == fresh.expert_of_slot);
    REQUIRE(again.quota == fresh.quota);
  }
}

TEST_CASE("a full planner refuses more experts than slots", "[placement][full_plan][errors]") {
  const Topology topology = Topology::Uniform(2, 2);
  REQUIRE(FullPlanner::Create(topology, 5).status().code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(FullPlanner::Create(topology, 0).status().code() == absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace ballast
