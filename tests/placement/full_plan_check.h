// What a full plan promises, checked by other code than the planner's.
#ifndef BALLAST_TESTS_PLACEMENT_FULL_PLAN_CHECK_H_
#define BALLAST_TESTS_PLACEMENT_FULL_PLAN_CHECK_H_

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "placement/full_plan.h"
#include "placement/split_exact.h"

namespace ballast::testing {

// "" when the plan keeps its promises for `load`, else what it breaks.
inline std::string BrokenPromise(const Topology& topology, const std::vector<int64_t>& load,
                                 const FullPlan& plan) {
  const int32_t num_experts = static_cast<int32_t>(load.size());
  const auto placement = Placement::Create(1, num_experts, topology, plan.expert_of_slot, 0);
  if (!placement.ok()) return std::string(placement.status().message());
  std::vector<int64_t> served(num_experts, 0);
  int64_t largest = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    int64_t rank_load = 0;
    std::vector<int32_t> held;
    for (int32_t s = topology.slot_offsets[r]; s < topology.slot_offsets[r + 1]; ++s) {
      const int32_t e = plan.expert_of_slot[s];
      if (e == kNoExpert) {
        if (plan.quota[s] != 0) return "an empty slot has a quota";
        continue;
      }
      if (std::find(held.begin(), held.end(), e) != held.end()) {
        return absl::StrCat("rank ", r, " holds expert ", e, " twice");
      }
      if (plan.quota[s] < 0) return absl::StrCat("slot ", s, " has a negative quota");
      held.push_back(e);
      served[e] += plan.quota[s];
      rank_load += plan.quota[s];
    }
    const int32_t empty = topology.slots_on(r) - static_cast<int32_t>(held.size());
    if (empty > 0 && static_cast<int32_t>(held.size()) < num_experts) {
      return absl::StrCat("rank ", r, " has ", empty, " empty slots");
    }
    largest = std::max(largest, rank_load);
  }
  if (served != load) return "the quotas do not add up to the load";
  if (largest != plan.largest_load) return "largest_load is not the largest";
  if (plan.largest_load < plan.lower_bound) return "largest_load is below lower_bound";
  // The exact split, which knows nothing of the quotas, does not find more or less.
  const std::vector<int32_t> demand(load.begin(), load.end());
  Split split;
  ExactSplitter(placement->hosts(0)).Run(demand, &split);
  if (split.largest_load != plan.largest_load) {
    return absl::StrCat("largest_load is ", plan.largest_load, "; the exact split has ",
                        split.largest_load);
  }
  return "";
}

// Loads of one of six kinds: Zipf 0.8, 1.2, 1.6 (in random order), lognormal, uniform, mostly none.
inline std::vector<int64_t> RandomLoad(Random* random, int32_t num_experts, int64_t tokens) {
  const uint32_t kind = random->Below(6);
  std::vector<double> share(num_experts);
  for (int32_t i = 0; i < num_experts; ++i) {
    const double normal = std::sqrt(-2.0 * std::log(1.0 - random->Uniform())) *
                          std::cos(6.283185307179586 * random->Uniform());
    share[i] = kind < 3    ? std::pow(i + 1.0, -0.8 - 0.4 * kind)
               : kind == 3 ? std::exp(1.5 * normal)
               : kind == 4 ? 0.5 + random->Uniform()
                           : (random->Below(4) == 0 ? random->Uniform() : 0.0);
  }
  for (int32_t i = num_experts - 1; i > 0; --i) std::swap(share[i], share[random->Below(i + 1)]);
  const double sum = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<int64_t> load(num_experts, 0);
  for (int32_t e = 0; e < num_experts && sum > 0.0; ++e) {
    load[e] = static_cast<int64_t>(share[e] / sum * static_cast<double>(tokens));
  }
  return load;
}

// Checks `rounds` random instances with a spare slot on every rank (or all but one), of 1 to 64
// ranks. Returns the first broken promise with its instance, or "".
inline std::string CheckWindows(uint64_t seed, int64_t rounds) {
  Random random(seed);
  for (int64_t round = 0; round < rounds; ++round) {
    const int32_t num_ranks =
        1 + static_cast<int32_t>(random.Below(random.Below(4) == 0 ? 64 : 12));
    const int32_t num_experts =
        1 + static_cast<int32_t>(random.Below(random.Below(4) == 0 ? 384 : 48));
    const int32_t width = (num_experts + num_ranks - 1) / num_ranks;
    const uint32_t tight = random.Below(2 * num_ranks);  // this rank has no spare slot
    Topology topology;
    topology.node_of_rank.assign(num_ranks, 0);
    topology.slot_offsets.push_back(0);
    for (int32_t r = 0; r < num_ranks; ++r) {
      const int32_t spare =
          static_cast<uint32_t>(r) == tight
              ? 0
              : 1 + static_cast<int32_t>(random.Below(8) == 0 ? random.Below(4) : 0);
      topology.slot_offsets.push_back(topology.slot_offsets.back() + width + spare);
    }
    if (topology.num_slots() < num_experts) continue;
    const int64_t tokens = random.Below(8) == 0 ? random.Below(100) : random.Below(1 << 20);
    const std::vector<int64_t> load = RandomLoad(&random, num_experts, tokens);
    auto planner = FullPlanner::Create(topology, num_experts);
    if (!planner.ok()) return std::string(planner.status().message());
    FullPlan plan;
    planner->Plan(load, &plan);
    const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
    std::string broken = BrokenPromise(topology, load, plan);
    if (broken.empty() && !plan.by_windows) broken = "the windows were not used";
    if (broken.empty() && plan.largest_load != (total + num_ranks - 1) / num_ranks) {
      broken = absl::StrCat("largest load ", plan.largest_load, " of ", total, " copies");
    }
    if (!broken.empty()) {
      return absl::StrCat("seed ", seed, " round ", round, " (", num_experts, " experts, ",
                          num_ranks, " ranks): ", broken);
    }
  }
  return "";
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_PLACEMENT_FULL_PLAN_CHECK_H_
