#include "placement/replica_budget.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <limits>
#include <numeric>
#include <set>

#include "placement/full_plan.h"
#include "placement/split_exact.h"
#include "tests/placement/full_plan_check.h"

namespace ballast {
namespace {

LoadTable Table(const std::vector<std::vector<int64_t>>& layers) {
  LoadTable table{.num_layers = static_cast<int32_t>(layers.size()),
                  .num_experts = static_cast<int32_t>(layers[0].size()),
                  .load = {}};
  for (const auto& layer : layers) table.load.insert(table.load.end(), layer.begin(), layer.end());
  return table;
}

ReplicaBudget Spend(const LoadTable& load, const ReplicaBudgetOptions& options) {
  auto budget = SpendReplicaBudget(load, options);
  INFO(budget.status().message());
  REQUIRE(budget.ok());
  return *std::move(budget);
}

int64_t Sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

TEST_CASE("one hot layer gets the whole budget", "[placement][replica_budget]") {
  // Layer 1: 37 of 40 on one expert. On all four ranks it is 10 each; on two, 38 / 2 = 19.
  const LoadTable load = Table({{10, 10, 10, 10}, {37, 1, 1, 1}, {10, 10, 10, 10}});
  const ReplicaBudget budget = Spend(load, {.num_ranks = 4, .slots_per_rank = 2, .copies = 3});
  CHECK(budget.copies == std::vector<int32_t>{0, 3, 0});
  CHECK(budget.largest_load == std::vector<int64_t>{10, 10, 10});
  CHECK(budget.uniform_largest_load == std::vector<int64_t>{10, 19, 10});
}

TEST_CASE("a copy that pays only together with the next one is found",
          "[placement][replica_budget]") {
  // Two experts of 20: one copy leaves 20, two copies 10. In layer 0 a copy gains one at once.
  const LoadTable load = Table({{12, 9, 9, 10}, {20, 20, 0, 0}});
  const ReplicaBudgetOptions options{.num_ranks = 4, .slots_per_rank = 2, .copies = 1};
  CHECK(Spend(load, options).copies == std::vector<int32_t>{1, 0});
  CHECK(Spend(load, options).largest_load == std::vector<int64_t>{11, 20});
  const ReplicaBudget two = Spend(load, {.num_ranks = 4, .slots_per_rank = 2, .copies = 2});
  CHECK(two.copies == std::vector<int32_t>{0, 2});
  CHECK(two.largest_load == std::vector<int64_t>{12, 10});
}

TEST_CASE("equal layers are served from the lowest and idle copies are spread",
          "[placement][replica_budget]") {
  const LoadTable same = Table({{9, 1}, {9, 1}, {9, 1}});
  const ReplicaBudgetOptions options{.num_ranks = 2, .slots_per_rank = 2, .copies = 2};
  CHECK(Spend(same, options).copies == std::vector<int32_t>{1, 1, 0});
  // Nothing to gain anywhere: five copies over three layers that have room for two each.
  const LoadTable flat = Table({{5, 5}, {5, 5}, {5, 5}});
  const ReplicaBudget idle = Spend(flat, {.num_ranks = 2, .slots_per_rank = 2, .copies = 5});
  CHECK(idle.copies == std::vector<int32_t>{2, 2, 1});
  CHECK(std::count(idle.expert_of_slot.begin(), idle.expert_of_slot.end(), kNoExpert) == 1);
}

// The largest load of the best full plan with at most `copies` copies.
int64_t BestLoad(std::span<const int64_t> load, int32_t num_ranks, int32_t copies) {
  const int32_t num_experts = static_cast<int32_t>(load.size());
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int32_t slots = num_experts; slots <= num_experts + copies; ++slots) {
    Topology topology = Topology::Uniform(num_ranks, 0);
    for (int32_t s = 0; s < slots; ++s) {
      for (int32_t r = s % num_ranks; r < num_ranks; ++r) ++topology.slot_offsets[r + 1];
    }
    auto planner = FullPlanner::Create(topology, num_experts);
    REQUIRE(planner.ok());
    FullPlan plan;
    planner->Plan(load, &plan);
    best = std::min(best, plan.largest_load);
  }
  return best;
}

// The least sum over the layers from `layer` on, by trying every way to spend `copies`.
int64_t BestSum(const LoadTable& load, int32_t num_ranks, int32_t most, int32_t layer,
                int32_t copies) {
  if (layer == load.num_layers) return 0;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int32_t c = 0; c <= std::min(most, copies); ++c) {
    best = std::min(best, BestLoad(load.layer(layer), num_ranks, c) +
                              BestSum(load, num_ranks, most, layer + 1, copies - c));
  }
  return best;
}

// Slots in use, valid rows, and loads as the exact split has them.
void CheckRows(const LoadTable& load, const ReplicaBudgetOptions& options,
               const ReplicaBudget& budget) {
  const Topology topology = Topology::Uniform(options.num_ranks, options.slots_per_rank);
  const auto placement = Placement::Create(load.num_layers, load.num_experts, topology,
                                           budget.expert_of_slot, /*epoch=*/0);
  INFO(placement.status().message());
  REQUIRE(placement.ok());
  std::vector<int32_t> in_all(options.num_ranks, 0);
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    const auto row = placement->expert_of_slot(layer);
    std::vector<int32_t> used(options.num_ranks, 0);
    for (int32_t r = 0; r < options.num_ranks; ++r) {
      std::set<int32_t> held;
      for (int32_t s = topology.slot_offsets[r]; s < topology.slot_offsets[r + 1]; ++s) {
        if (row[s] == kNoExpert) continue;
        REQUIRE(held.insert(row[s]).second);
        ++used[r];
      }
      in_all[r] += used[r];
    }
    const auto [least, most] = std::minmax_element(used.begin(), used.end());
    REQUIRE(*most - *least <= 1);
    REQUIRE(std::accumulate(used.begin(), used.end(), 0) ==
            load.num_experts + budget.copies[layer]);
    const std::vector<int32_t> demand(load.layer(layer).begin(), load.layer(layer).end());
    Split split;
    ExactSplitter(placement->hosts(layer)).Run(demand, &split);
    REQUIRE(split.largest_load <= budget.largest_load[layer]);
  }
  const auto [least, most] = std::minmax_element(in_all.begin(), in_all.end());
  REQUIRE(*most - *least <= 1);
}

TEST_CASE("a budget is spent in full and evenly and never worse than in equal parts",
          "[placement][replica_budget][property]") {
  Random random(20261101);
  int better = 0;
  for (int round = 0; round < 300; ++round) {
    const int32_t num_ranks = 1 + static_cast<int32_t>(random.Below(6));
    const int32_t num_experts = 1 + static_cast<int32_t>(random.Below(12));
    const int32_t slots_per_rank =
        (num_experts + num_ranks - 1) / num_ranks + static_cast<int32_t>(random.Below(4));
    std::vector<std::vector<int64_t>> layers;
    for (uint32_t layer = 0; layer <= random.Below(5); ++layer) {
      layers.push_back(testing::RandomLoad(&random, num_experts, random.Below(5000)));
    }
    const LoadTable load = Table(layers);
    const int32_t most = num_ranks * std::min(slots_per_rank, num_experts) - num_experts;
    const ReplicaBudgetOptions options{
        .num_ranks = num_ranks,
        .slots_per_rank = slots_per_rank,
        .copies =
            static_cast<int64_t>(random.Below(static_cast<uint32_t>(most * load.num_layers + 1)))};
    INFO("round " << round << ", " << num_experts << " experts on " << num_ranks << " x "
                  << slots_per_rank << ", " << options.copies << " copies");
    const ReplicaBudget budget = Spend(load, options);
    REQUIRE(std::accumulate(budget.copies.begin(), budget.copies.end(), int64_t{0}) ==
            options.copies);
    REQUIRE(Sum(budget.largest_load) <= Sum(budget.uniform_largest_load));
    better += Sum(budget.largest_load) < Sum(budget.uniform_largest_load) ? 1 : 0;
    CheckRows(load, options, budget);
  }
  CHECK(better > 50);
}

TEST_CASE("no other way to spend a small budget is better",
          "[placement][replica_budget][property]") {
  Random random(5);
  for (int round = 0; round < 60; ++round) {
    const int32_t num_ranks = 2 + static_cast<int32_t>(random.Below(2));
    const int32_t num_experts = 2 + static_cast<int32_t>(random.Below(3));
    const int32_t slots_per_rank = (num_experts + num_ranks - 1) / num_ranks + 1;
    const LoadTable load = Table({testing::RandomLoad(&random, num_experts, 100),
                                  testing::RandomLoad(&random, num_experts, 100),
                                  testing::RandomLoad(&random, num_experts, 100)});
    const int32_t most = num_ranks * std::min(slots_per_rank, num_experts) - num_experts;
    const int32_t copies = static_cast<int32_t>(random.Below(static_cast<uint32_t>(3 * most + 1)));
    const ReplicaBudget budget =
        Spend(load, {.num_ranks = num_ranks, .slots_per_rank = slots_per_rank, .copies = copies});
    INFO("round " << round << ", " << copies << " copies");
    REQUIRE(Sum(budget.largest_load) == BestSum(load, num_ranks, most, 0, copies));
    for (int32_t layer = 0; layer < 3; ++layer) {
      REQUIRE(budget.largest_load[layer] ==
              BestLoad(load.layer(layer), num_ranks, budget.copies[layer]));
      REQUIRE(budget.uniform_largest_load[layer] ==
              BestLoad(load.layer(layer), num_ranks, copies / 3 + (layer < copies % 3 ? 1 : 0)));
    }
  }
}

TEST_CASE("a budget that cannot be spent is refused with what is allowed",
          "[placement][replica_budget][errors]") {
  const LoadTable load = Table({{1, 2, 3}, {4, 5, 6}});
  const auto refused = [&](const ReplicaBudgetOptions& options) {
    const auto budget = SpendReplicaBudget(load, options);
    REQUIRE_FALSE(budget.ok());
    return std::string(budget.status().message());
  };
  using Catch::Matchers::Contains;
  CHECK_THAT(refused({.num_ranks = 2, .slots_per_rank = 2, .copies = 3}),
             Contains("is 3") && Contains("0 to 2"));
  CHECK_THAT(refused({.num_ranks = 2, .slots_per_rank = 9, .copies = 7}), Contains("0 to 6"));
  CHECK_THAT(refused({.num_ranks = 2, .slots_per_rank = 2, .copies = -1}), Contains("is -1"));
  CHECK_THAT(refused({.num_ranks = 2, .slots_per_rank = 1, .copies = 0}), Contains("is 2"));
  CHECK_THAT(refused({.num_ranks = 0, .slots_per_rank = 1, .copies = 0}), Contains("is 0"));
}

}  // namespace
}  // namespace ballast
