// Failures of other systems' planners and splits that must not happen here
// (tests/known_failures.md).
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <vector>

#include "placement/controller.h"
#include "placement/replay.h"
#include "placement/split.h"

namespace ballast {
namespace {

// SOURCE EPLB#22, EPLB PRs #27 and #28, vllm#18343: a spare slot that holds what its rank has
// already. One expert is hotter than all others together, so that every spare slot could use it.
TEST_CASE("no plan of ours puts two copies of an expert on one rank", "[placement][controller]") {
  constexpr int32_t kExperts = 12, kTokens = 1000;
  Topology uneven;
  uneven.slot_offsets = {0, 3, 8, 12, 20};
  uneven.node_of_rank = {0, 0, 1, 1};
  for (const Topology& topology : {Topology::Uniform(4, 5), uneven}) {
    for (const char* policy : {"full", "regret"}) {
      CAPTURE(policy, topology.slot_offsets);
      ControllerOptions options;
      options.policy = policy;
      options.window_tokens = kTokens;
      const auto controller =
          Controller::Create(options, *Placement::Contiguous(1, kExperts, topology, false));
      REQUIRE(controller.ok());
      int64_t moves = 0;
      for (int64_t step = 0; step < 40; ++step) {
        std::vector<int32_t> counts(kExperts, 10);
        counts[step < 20 ? 3 : 7] = kTokens - 10 * (kExperts - 1);
        (*controller)->OnStep(step, StepCounts::Of(TokenKind::kDecode, kTokens, counts));
        Decision why;
        const auto plan = (*controller)->Decide(step, /*force=*/true, &why);
        if (!plan.has_value()) continue;
        moves += static_cast<int64_t>(plan->moves.size());
        (*controller)->OnCommitted(plan->plan_id, step);
        const LayerHosts& hosts = (*controller)->placement().hosts(0);
        REQUIRE(*std::max_element(hosts.host_copies.begin(), hosts.host_copies.end()) == 1);
      }
      REQUIRE(moves >= 3);  // the hot expert is on all ranks by then
      REQUIRE((*controller)->placement().num_replicas(0, 7) == 4);
    }
  }
}

// SOURCE vllm#36267, vllm#32050: a window longer than the time between two plans mixed counts of
// physical experts under two maps.
TEST_CASE("a flip between record and fold keeps logical totals", "[placement][controller]") {
  constexpr int32_t kExperts = 6, kTokens = 60;
  ControllerOptions options;
  options.policy = "eplb";
  options.window_tokens = 100 * kTokens;
  options.min_gain = 0;
  const auto controller = Controller::Create(
      options, *Placement::Contiguous(1, kExperts, Topology::Uniform(3, 3), true));
  REQUIRE(controller.ok());
  const std::vector<int32_t> counts = {30, 10, 8, 6, 4, 2};
  int flips = 0;
  for (int64_t step = 1; step <= 12; ++step) {
    (*controller)->OnStep(step, StepCounts::Of(TokenKind::kDecode, kTokens, counts));
    Decision why;
    const auto plan = (*controller)->Decide(step, /*force=*/true, &why);
    if (plan.has_value()) (*controller)->OnCommitted(plan->plan_id, step), ++flips;
    const auto load = (*controller)->window_load(0);
    for (int32_t e = 0; e < kExperts; ++e) REQUIRE(load[e] == step * counts[e]);
  }
  REQUIRE(flips > 0);
}

// SOURCE vllm#39178: loads were averaged over the layers before the ratio was taken.
TEST_CASE("the imbalance of two layers is the mean of their ratios", "[placement][replay]") {
  // Rank 0 works in layer 0 and rank 1 in layer 1: added up first they would look balanced.
  const StepTrace trace{.num_layers = 2,
                        .num_experts = 4,
                        .step_tokens = 10,
                        .counts = {10, 10, 0, 0, 0, 0, 15, 5},
                        .phase_offsets = {0, 1},
                        .phase_names = {"a"}};
  ReplayOptions options;
  options.topology = Topology::Uniform(2, 2);
  options.policies = {"static"};
  const auto result = Replay(trace, options);
  REQUIRE(result.ok());
  REQUIRE(result->series[0].imbalance == std::vector<float>{2.0f, 2.0f});
  REQUIRE(result->figures[0].mean_imbalance == 2.0);
}

// SOURCE vllm#40810: a hash of the token sent most of small batches to few replicas; sglang#13423:
// ranks without a copy of their own all chose the first.
TEST_CASE("one token on every rank is spread over all replicas", "[placement][split]") {
  constexpr int32_t kRanks = 8;
  // Expert 0 on ranks 1, 3, 5 and 7, and another expert on each of the other ranks.
  const auto placement =
      Placement::Create(1, 5, Topology::Uniform(kRanks, 1), {1, 0, 2, 0, 3, 0, 4, 0}, /*epoch=*/0);
  REQUIRE(placement.ok());
  std::vector<int32_t> counts(kRanks * 5, 0);
  for (int32_t s = 0; s < kRanks; ++s) counts[s * 5] = 1;
  for (const SplitMode mode :
       {SplitMode::kExact, SplitMode::kPrice, SplitMode::kEven, SplitMode::kRoundRobin}) {
    CAPTURE(NameOf(mode));
    Splitter splitter(placement->hosts(0));
    Split split;
    splitter.Run(mode, counts, &split);
    REQUIRE(split.rank_load == std::vector<int32_t>{0, 2, 0, 2, 0, 2, 0, 2});
  }
}

// SOURCE DeepEP#154, #464, TRT-LLM#18799: more ranks than a block has threads, or a mask has bits.
TEST_CASE("splits of more than 64 and 128 ranks add up", "[placement][split][property]") {
  for (const int32_t ranks : {63, 64, 65, 127, 128, 129, 160, 257}) {
    CAPTURE(ranks);
    const auto placement =
        Placement::Contiguous(1, ranks, Topology::Uniform(ranks, 2), /*fill_spare=*/true);
    REQUIRE(placement.ok());
    std::vector<int32_t> counts(static_cast<size_t>(ranks) * ranks, 0);
    for (int32_t s = 0; s < ranks; ++s) counts[s * ranks + (s * 7) % 3] = 2;
    for (const SplitMode mode : kAllSplitModes) {
      CAPTURE(NameOf(mode));
      Splitter splitter(placement->hosts(0));
      Split split;
      splitter.Run(mode, counts, &split);
      int64_t sent = 0, received = 0, load = 0;
      RankPart part;
      for (int32_t r = 0; r < ranks; ++r) {
        splitter.Cut(mode, counts, split, r, &part);
        int64_t own = 0;
        for (const int32_t n : part.send) sent += n;
        for (const int32_t n : part.receive) own += n;
        REQUIRE(own == split.rank_load[r]);
        received += own;
        load += split.rank_load[r];
      }
      REQUIRE(sent == 2 * ranks);
      REQUIRE(received == sent);
      REQUIRE(load == sent);
    }
  }
}

}  // namespace
}  // namespace ballast
