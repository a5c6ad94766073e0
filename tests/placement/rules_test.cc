#include "placement/rules.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>

#include "placement/controller.h"
#include "placement/traffic_memory.h"
#include "tests/placement/full_plan_check.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;

Topology Ranks(const std::vector<int32_t>& slots, int32_t num_nodes = 1) {
  Topology topology = Topology::Uniform(static_cast<int32_t>(slots.size()), 0, num_nodes);
  std::partial_sum(slots.begin(), slots.end(), topology.slot_offsets.begin() + 1);
  return topology;
}

// Whether some rank outside of `lost` holds the expert.
bool Survives(const Topology& topology, std::span<const int32_t> row, int32_t expert,
              int32_t lost) {
  for (int32_t s = 0; s < topology.num_slots(); ++s) {
    const bool on_lost = s >= topology.slot_offsets[lost] && s < topology.slot_offsets[lost + 1];
    if (row[s] == expert && !on_lost) return true;
  }
  return false;
}

// The first of `hottest` that the loss of some rank leaves without a copy, or kNoExpert.
int32_t FirstLost(const Topology& topology, std::span<const int32_t> row,
                  std::span<const int32_t> hottest) {
  for (int32_t e : hottest) {
    for (int32_t rank = 0; rank < topology.num_ranks(); ++rank) {
      if (!Survives(topology, row, e, rank)) return e;
    }
  }
  return kNoExpert;
}

// The `count` experts with the largest load, ties to the lower id.
template <typename Load>
std::vector<int32_t> Hottest(int32_t num_experts, int32_t count, const Load& load) {
  std::vector<int32_t> order(num_experts);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return load(a) != load(b) ? load(a) > load(b) : a < b; });
  order.resize(count);
  return order;
}

TEST_CASE("as many experts are hot as spare slots can hold", "[placement][rules]") {
  CHECK(NumHotExperts(Topology::Uniform(8, 9), 64) == 8);
  CHECK(NumHotExperts(Topology::Uniform(8, 8), 64) == 0);
  CHECK(NumHotExperts(Topology::Uniform(4, 4), 5) == 5);  // more spare slots than experts
  CHECK(NumHotExperts(Topology::Uniform(1, 9), 4) == 0);  // one rank cannot hold two copies
  CHECK(NumHotExperts(Ranks({7, 1}), 4) == 1);            // three of the seven are of no use
  CHECK(NumHotExperts(Ranks({4, 0, 3}), 5) == 2);
}

TEST_CASE("hot experts take the place of the copies that carry least", "[placement][rules]") {
  // Loads 40 30 20 10 in 3 + 3 slots: the two hottest, 0 and 1, must be on both ranks. Expert 1 is
  // on rank 0 alone; of the copies on rank 1, that of 2 is not needed.
  const Topology topology = Topology::Uniform(2, 3);
  const std::vector<int64_t> load = {40, 30, 20, 10};
  std::vector<int32_t> row = {0, 1, 2, 0, 3, 2};
  CHECK(CoverHotExperts(topology, load, &row) == 1);
  CHECK(row == std::vector<int32_t>{0, 1, 2, 0, 3, 1});
  CHECK(CoverHotExperts(topology, load, &row) == 0);
  // Three hot ones of five in 4 + 4 slots: expert 1 takes the empty slot, then 2 that of a copy.
  row = {0, 1, 2, 3, 0, 4, 3, kNoExpert};
  CHECK(CoverHotExperts(Topology::Uniform(2, 4), std::vector<int64_t>{40, 30, 20, 10, 5}, &row) ==
        2);
  CHECK(row == std::vector<int32_t>{0, 1, 2, 3, 0, 4, 2, 1});
}

TEST_CASE("an expert makes room where all spare slots are on the wrong rank",
          "[placement][rules]") {
  // Expert 0 is hot, alone on rank 0, and the only spare slot is there. Expert 2 (lighter than 3)
  // moves over.
  const Topology topology = Ranks({3, 2});
  std::vector<int32_t> row = {0, 1, kNoExpert, 2, 3};
  CHECK(CoverHotExperts(topology, std::vector<int64_t>{50, 5, 3, 4}, &row) == 2);
  CHECK(row == std::vector<int32_t>{0, 1, 2, 0, 3});
}

TEST_CASE("covering any row leaves a valid row that covers the hot experts",
          "[placement][rules][property]") {
  Random random(20261102);
  int covered = 0;
  for (int round = 0; round < 3000; ++round) {
    const Topology topology = testing::RandomTopology(&random, 9);
    const Placement before = testing::RandomPlacement(&random, topology, 1);
    const int32_t num_experts = before.num_experts();
    const auto load = testing::RandomLoad(&random, num_experts, random.Below(1000));
    std::vector<int32_t> row(before.expert_of_slot(0).begin(), before.expert_of_slot(0).end());
    const int32_t changed = CoverHotExperts(topology, load, &row);
    INFO("round " << round << ", " << num_experts << " experts");
    REQUIRE(Placement::Create(1, num_experts, topology, row, 0).ok());
    const auto hottest = Hottest(num_experts, NumHotExperts(topology, num_experts),
                                 [&](int32_t e) { return load[e]; });
    REQUIRE(FirstLost(topology, row, hottest) == kNoExpert);
    int32_t different = 0;
    for (size_t s = 0; s < row.size(); ++s) different += row[s] != before.expert_of_slot(0)[s];
    REQUIRE(different <= changed);
    covered += changed > 0 ? 1 : 0;
  }
  CHECK(covered > 1000);
}

// Traffic whose hot experts move on every fifteen steps. [layers * experts]
std::vector<int32_t> Traffic(int64_t step, int32_t num_layers, int32_t num_experts,
                             Random* random) {
  std::vector<int32_t> counts;
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    for (int32_t e = 0; e < num_experts; ++e) {
      const int32_t place = static_cast<int32_t>((e + 5 * layer + 7 * (step / 15)) % num_experts);
      counts.push_back(static_cast<int32_t>(random->Below(400 / (place + 1) + 3)));
    }
  }
  return counts;
}

// Drives a controller with coverage as a replay does, and a memory of the test's own beside it.
void RequireCoverage(const Topology& topology, int32_t num_experts, bool fill_spare = true) {
  constexpr int32_t kLayers = 2;
  auto initial = Placement::Contiguous(kLayers, num_experts, topology, fill_spare);
  REQUIRE(initial.ok());
  ControllerOptions options{.policy = "regret", .rho = 0.3, .rules = {.coverage = 1}};
  options.min_steps_between = 0;
  auto controller = Controller::Create(options, *initial);
  REQUIRE(controller.ok());
  std::vector<TrafficMemory> memories(kLayers, {num_experts, topology.num_ranks(), 1.0f});
  const int32_t num_hot = NumHotExperts(topology, num_experts);
  REQUIRE(num_hot > 0);
  Random random(31);
  int plans = 0;
  for (int64_t step = 0; step < 150; ++step) {
    const auto counts = Traffic(step, kLayers, num_experts, &random);
    (*controller)->OnStep(step, StepCounts::Of(TokenKind::kPrefill, 256, counts));
    Decision why;
    const auto plan = (*controller)->Decide(step + 1, false, &why);
    if (plan.has_value()) {
      ++plans;
      (*controller)->OnCommitted(plan->plan_id, step + 1);
    }
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      TrafficMemory& memory = memories[layer];
      memory.Add(std::span(counts).subspan(layer * num_experts, num_experts), TokenKind::kPrefill);
      const auto hottest =
          Hottest(num_experts, num_hot, [&](int32_t e) { return memory.lasting_load(e); });
      INFO("step " << step << " layer " << layer);
      REQUIRE(FirstLost(topology, (*controller)->placement().expert_of_slot(layer), hottest) ==
              kNoExpert);
    }
  }
  CHECK(plans > 5);
}

TEST_CASE("with coverage no loss of a rank ever takes a hot expert away",
          "[placement][rules][coverage]") {
  RequireCoverage(Topology::Uniform(8, 9), 64);
  RequireCoverage(Topology::Uniform(2, 3), 5);
  RequireCoverage(Topology::Uniform(4, 4), 12);
}

TEST_CASE("coverage is kept on ranks of different sizes", "[placement][rules][coverage]") {
  RequireCoverage(Ranks({6, 4, 4, 4}), 16);  // both spare slots begin on rank 0
  RequireCoverage(Ranks({4, 7, 4, 5}), 16);
  RequireCoverage(Ranks({9, 3}), 6);
  // Only rank 0 has empty slots: what is hot there needs room elsewhere.
  RequireCoverage(Ranks({6, 4, 4, 4}), 16, /*fill_spare=*/false);
  RequireCoverage(Ranks({3, 2}), 4, /*fill_spare=*/false);
}

TEST_CASE("rules that a policy or a topology cannot keep are refused by name",
          "[placement][rules][errors]") {
  const auto refused = [](const std::string& policy, const PlacementRules& rules,
                          const Topology& topology) {
    const auto initial = Placement::Contiguous(1, 8, topology, /*fill_spare=*/false);
    REQUIRE(initial.ok());
    const auto controller = Controller::Create({.policy = policy, .rules = rules}, *initial);
    REQUIRE_FALSE(controller.ok());
    return std::string(controller.status().message());
  };
  const Topology spare = Topology::Uniform(4, 3, 2);
  for (const char* policy : {"static", "never", "eplb"}) {
    CHECK_THAT(refused(policy, {.coverage = 1}, spare),
               Contains(absl::StrCat("policy ", policy)) && Contains("coverage 1"));
  }
  CHECK_THAT(refused("eplb", {.node_local = true}, spare),
             Contains("policy eplb") && Contains("node-local"));
  CHECK_THAT(refused("regret", {.coverage = 2}, spare), Contains("coverage is 2"));
  CHECK_THAT(refused("regret", {.coverage = 1}, Topology::Uniform(4, 2)),
             Contains("spare slot") && Contains("8 slots on 4 ranks"));
  CHECK_THAT(refused("regret", {.coverage = 1, .node_local = true}, spare),
             Contains("cannot both be kept"));
  // What each can keep it is given.
  const auto initial = Placement::Contiguous(1, 8, spare, /*fill_spare=*/true, true);
  REQUIRE(initial.ok());
  CHECK(Controller::Create({.policy = "never", .rules = {.node_local = true}}, *initial).ok());
  CHECK(Controller::Create({.policy = "regret", .rules = {.node_local = true}}, *initial).ok());
  CHECK(Controller::Create({.policy = "regret", .rules = {.coverage = 1}}, *initial).ok());
}

TEST_CASE("rings within nodes keep every copy at home", "[placement][rules]") {
  Topology topology = Topology::Uniform(6, 6, 2);
  const auto across = Placement::Contiguous(1, 24, topology, /*fill_spare=*/true);
  const auto within = Placement::Contiguous(1, 24, topology, /*fill_spare=*/true, true);
  REQUIRE(across.ok());
  REQUIRE(within.ok());
  int32_t strangers = 0;
  for (int32_t s = 0; s < topology.num_slots(); ++s) {
    const int32_t node = topology.node_of_rank[topology.rank_of_slot(s)];
    CHECK(within->expert_of_slot(0)[s] / 12 == node);
    strangers += across->expert_of_slot(0)[s] / 12 != node;
  }
  CHECK(strangers > 0);
  // Rank 0 holds 0 to 3, then the first expert of rank 2 and the second of rank 1, round its node.
  CHECK(std::vector<int32_t>(within->expert_of_slot(0).begin(),
                             within->expert_of_slot(0).begin() + 6) ==
        std::vector<int32_t>{0, 1, 2, 3, 8, 5});
}

}  // namespace
}  // namespace ballast
