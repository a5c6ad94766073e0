#include "placement/regret.h"

#include <algorithm>
#include <numeric>

namespace ballast {
namespace {

// SOURCE the constants here, in row_search.cc and in traffic_memory.cc were chosen on recorded
// routing (three ESFT tasks of DeepSeek-V2-Lite): in other orders than recorded, with steps cut at
// other places and experts renumbered at random, where costs are flat around them, but with the
// recorded order in view as well. There they are less flat: half of kTheta costs 0.08 more at rho
// 3, twice kLambda 0.009 more at rho 0.3.
constexpr float kLeastGain = 0.0005f;  // of the objective, per copy: below it a change is noise
constexpr int kMostLevels = 4;         // copies that one plan may bring to a rank
constexpr double kTheta = 1.5;
constexpr float kLambda = 3.0f;
constexpr int kChangeBatches = 2;  // of a kind, after its change, in which lambda applies
// Counts that are in use in the very step that is planned weigh more in the search.
constexpr float kInStepWeight = 7.0f;

int32_t NumCovered(const PolicyContext& context) {
  if (context.rules.coverage == 0) return 0;
  return NumHotExperts(context.initial.topology(), context.initial.num_experts());
}

}  // namespace

RegretPlanner::RegretPlanner(const PolicyContext& context, std::span<const int32_t> row)
    : rho_(context.rho),
      num_covered_(NumCovered(context)),
      memory_(context.initial.num_experts(), context.initial.topology().num_ranks(),
              context.in_step ? kInStepWeight : 1.0f),
      search_(context.initial.topology(), context.initial.num_experts(), &memory_,
              context.rules.node_local) {
  search_.SetRow(row);
}

float RegretPlanner::Regret(const Lanes& before, const Lanes& after) const {
  PerKind<float> sums = {};
  PerKind<int> batches = {};
  float largest = 0.0f;
  for (int age = 0; age < memory_.num_batches(); ++age) {
    const int lane = memory_.lane_of(age);
    const TokenKind kind = memory_.kind_of(lane);
    sums[kind] += memory_.batch_weight(lane) * (before[lane] - after[lane]);
    ++batches[kind];
    float sum = 0.0f;
    for (const TokenKind k : kTokenKinds) {
      const int since = memory_.batches_since_change(k);
      const bool of_change = since <= kChangeBatches && batches[k] <= since && batches[k] > 0;
      sum += sums[k] * (1.0f + (of_change ? kLambda / static_cast<float>(batches[k]) : 0.0f));
    }
    largest = std::max(largest, sum);
  }
  return largest;
}

// Gives the hottest experts their second rank, hottest first. Returns whether the row changed.
bool RegretPlanner::Cover() {
  if (num_covered_ == 0) return false;
  std::vector<int32_t> hottest(memory_.scenarios().size());
  std::iota(hottest.begin(), hottest.end(), 0);
  std::stable_sort(hottest.begin(), hottest.end(), [this](int32_t a, int32_t b) {
    return memory_.lasting_load(a) > memory_.lasting_load(b);
  });
  for (size_t i = 0; i < hottest.size(); ++i) {
    search_.SetLeastHosts(hottest[i], static_cast<int32_t>(i) < num_covered_ ? 2 : 1);
  }
  bool changed = false;
  for (int32_t i = 0; i < num_covered_; ++i) {
    if (search_.num_hosts(hottest[i]) < 2) changed |= search_.AddHost(hottest[i]);
  }
  return changed;
}

void RegretPlanner::OnBatch(std::span<const int32_t> counts, TokenKind kind, float weight) {
  memory_.Add(counts, kind, weight);
  search_.SortShared();
  const int lane = memory_.lane_of(0);
  history_in_force_[lane] = search_.LargestLoads(memory_.history())[lane];
}

std::optional<std::vector<int32_t>> RegretPlanner::Plan(const Input& input) {
  if (memory_.num_batches() == 0) return std::nullopt;
  const double threshold = input.forced ? 0.0 : kTheta * rho_;
  const std::vector<int32_t> in_force = search_.row();
  search_.StartCounting();
  const bool covered = Cover();
  // Not even perfection would pay for one copy.
  if (!input.forced && !covered && Regret(history_in_force_, Splat(1.0f)) < threshold) {
    return std::nullopt;
  }
  std::vector<int32_t> accepted = search_.row();
  Lanes accepted_loads = covered ? search_.LargestLoads(memory_.history()) : history_in_force_;
  int32_t accepted_busiest = search_.busiest();
  for (int32_t level = std::max(1, accepted_busiest); level <= kMostLevels; ++level) {
    if (search_.Improve(level, input.forced ? 0.0f : kLeastGain) == 0) break;
    const Lanes loads = search_.LargestLoads(memory_.history());
    const float regret = Regret(accepted_loads, loads);
    const int32_t busiest = search_.busiest();
    if (!input.forced && regret < threshold * (busiest - accepted_busiest)) break;
    accepted = search_.row();
    accepted_loads = loads;
    accepted_busiest = busiest;
    if (regret < 2.0 * threshold) break;
  }
  search_.SetRow(in_force);
  if (accepted == in_force) return std::nullopt;
  return accepted;
}

void RegretPlanner::Adopt(std::span<const int32_t> row) {
  search_.SetRow(row);
  history_in_force_ = search_.LargestLoads(memory_.history());
}

}  // namespace ballast
