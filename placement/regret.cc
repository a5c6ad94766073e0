#include "placement/regret.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

// SOURCE kLeastGain, kSearchSweeps, kTrust and how theta grows were chosen by several dozen trial
// runs of a prototype on recorded routing (the three ESFT tasks of DeepSeek-V2-Lite, all at once).
// Costs quoted on these files are therefore not held-out figures.
constexpr int kSearchSweeps = 4;      // of the water-fill, while candidates are compared
constexpr int kFinalSweeps = 6;       // when regret is measured
constexpr int kMostEvaluations = 96;  // candidates per change that are looked at closely
constexpr int kMostChanges = 64;      // per level: a limit on everything
constexpr int kMostLevels = 4;        // copies that one plan may bring to a rank
constexpr float kLeastGain = 0.003f;  // of the objective, per copy: below it a change is noise
// Ski rental buys when the rent paid equals the price: theta = 1. A dear copy has to serve for many
// batches, so the traffic has to stay for as long: theta grows from 1 to 2 with rho.
constexpr double kDearRho = 3.0;
// Right after a change of traffic the regret has only begun to show: part of it is taken on trust.
constexpr double kTrust = 0.8;
constexpr int kTrustBatches = 3;
constexpr float kTiny = 1e-6f;

}  // namespace

RegretPlanner::RegretPlanner(const Topology& topology, int32_t num_experts,
                             std::span<const int32_t> row, double rho)
    : num_experts_(num_experts),
      num_ranks_(topology.num_ranks()),
      slot_offsets_(topology.slot_offsets),
      rho_(rho),
      memory_(num_experts, topology.num_ranks()),
      shared_index_(static_cast<size_t>(num_experts), -1),
      fixed_load_(static_cast<size_t>(num_ranks_)),
      load_(static_cast<size_t>(num_ranks_)),
      price_(static_cast<size_t>(num_ranks_)),
      total_price_(static_cast<size_t>(num_ranks_)),
      received_(static_cast<size_t>(num_ranks_)),
      trial_load_(static_cast<size_t>(num_ranks_)) {
  for (int32_t r = 0; r < num_ranks_; ++r) {
    rank_of_slot_.insert(rank_of_slot_.end(), static_cast<size_t>(topology.slots_on(r)), r);
  }
  SetRow(row);
}

void RegretPlanner::SetRow(std::span<const int32_t> row) {
  row_.assign(row.begin(), row.end());
  ranks_of_.assign(static_cast<size_t>(num_experts_), {});
  for (size_t s = 0; s < row_.size(); ++s) {
    if (row_[s] != kNoExpert) Insert(rank_of_slot_[s], &ranks_of_[row_[s]]);
  }
  SortShared();
}

// Finds the experts on several ranks, in the order in which they are poured.
void RegretPlanner::SortShared() {
  shared_.clear();
  std::fill(shared_index_.begin(), shared_index_.end(), -1);
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() > 1) shared_.push_back(e);
  }
  std::stable_sort(shared_.begin(), shared_.end(), [this](int32_t a, int32_t b) {
    return memory_.typical_load(a) > memory_.typical_load(b);
  });
  flow_offsets_.assign(1, 0);
  for (size_t i = 0; i < shared_.size(); ++i) {
    shared_index_[shared_[i]] = static_cast<int32_t>(i);
    flow_offsets_.push_back(flow_offsets_.back() +
                            static_cast<int32_t>(ranks_of_[shared_[i]].size()));
  }
  flows_.resize(static_cast<size_t>(flow_offsets_.back()));
}

// Loads and flows of the placement being worked on, in all scenarios.
void RegretPlanner::FillInForce() {
  std::fill(fixed_load_.begin(), fixed_load_.end(), Lanes{});
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() == 1) fixed_load_[ranks_of_[e][0]] += memory_.scenarios()[e];
  }
  load_ = fixed_load_;
  trial_.clear();
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int32_t e = shared_[i];
    trial_.push_back({&ranks_of_[e], &memory_.scenarios()[e], &flows_[flow_offsets_[i]]});
  }
  WaterFill(trial_, kSearchSweeps, load_);
}

// The largest rank load of each lane of `demand`.
Lanes RegretPlanner::LargestLoads(const std::vector<Lanes>& demand) {
  std::fill(trial_load_.begin(), trial_load_.end(), Lanes{});
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() == 1) trial_load_[ranks_of_[e][0]] += demand[e];
  }
  trial_flows_.resize(flows_.size());
  trial_.clear();
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int32_t e = shared_[i];
    trial_.push_back({&ranks_of_[e], &demand[e], &trial_flows_[flow_offsets_[i]]});
  }
  WaterFill(trial_, kFinalSweeps, trial_load_);
  Lanes largest = trial_load_[0];
  for (const Lanes& load : trial_load_) largest = Larger(largest, load);
  return largest;
}

float RegretPlanner::Objective(std::span<const Lanes> load) const {
  Lanes largest = load[0], power_sum = {};
  for (const Lanes& l : load) {
    largest = Larger(largest, l);
    const Lanes square = l * l, fourth = square * square;
    power_sum += fourth * fourth;
  }
  power_sum *= 1.0f / static_cast<float>(num_ranks_);
  float objective = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    const float power_mean = std::sqrt(std::sqrt(std::sqrt(power_sum[i])));
    objective += memory_.weights()[i] * 0.5f * (largest[i] + power_mean);
  }
  return objective;
}

// The objective after the change.
float RegretPlanner::Evaluate(const Change& change) {
  const int32_t to = rank_of_slot_[change.slot], leaving = row_[change.slot];
  const int32_t from = change.from_slot < 0 ? -1 : rank_of_slot_[change.from_slot];
  RankList ranks = ranks_of_[change.expert], ranks_leaving;
  Insert(to, &ranks);
  if (from >= 0) Remove(from, &ranks);
  const auto& demand = memory_.scenarios();
  trial_load_ = fixed_load_;
  const auto move_fixed = [&](int32_t expert, const RankList& before, const RankList& after) {
    if (before.size() == 1) trial_load_[before[0]] -= demand[expert];
    if (after.size() == 1) trial_load_[after[0]] += demand[expert];
  };
  move_fixed(change.expert, ranks_of_[change.expert], ranks);
  if (leaving != kNoExpert) {
    ranks_leaving = ranks_of_[leaving];
    Remove(to, &ranks_leaving);
    if (from >= 0) Insert(from, &ranks_leaving);
    move_fixed(leaving, ranks_of_[leaving], ranks_leaving);
  }
  trial_.clear();
  // Room for all flows and the ranks that the change adds.
  trial_flows_.resize(flows_.size() + ranks.size() + ranks_leaving.size() + 2);
  Lanes* flow = trial_flows_.data();
  const auto add = [&](int32_t expert, const RankList& on) {
    if (on.size() < 2) return;
    trial_.push_back({&on, &demand[expert], flow});
    flow += on.size();
  };
  if (shared_index_[change.expert] < 0) add(change.expert, ranks);
  for (int32_t e : shared_) {
    add(e, e == change.expert ? ranks : e == leaving ? ranks_leaving : ranks_of_[e]);
  }
  WaterFill(trial_, kSearchSweeps, trial_load_);
  return Objective(trial_load_);
}

void RegretPlanner::Apply(const Change& change) {
  const int32_t to = rank_of_slot_[change.slot], leaving = row_[change.slot];
  if (leaving != kNoExpert) Remove(to, &ranks_of_[leaving]);
  Insert(to, &ranks_of_[change.expert]);
  ++received_[to];
  if (change.from_slot >= 0) {
    const int32_t from = rank_of_slot_[change.from_slot];
    Remove(from, &ranks_of_[change.expert]);
    Insert(from, &ranks_of_[leaving]);
    row_[change.from_slot] = leaving;
    ++received_[from];
  }
  row_[change.slot] = change.expert;
  SortShared();
}

Lanes RegretPlanner::FlowAt(int32_t expert, int32_t rank) const {
  const RankList& ranks = ranks_of_[expert];
  if (ranks.size() == 1) return memory_.scenarios()[expert];
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] == rank) return flows_[flow_offsets_[shared_index_[expert]] + i];
  }
  return Lanes{};
}

// What one more unit of load on a rank costs, about: steep near the largest load, as the objective.
void RegretPlanner::PriceRanks() {
  Lanes largest = Splat(kTiny), sum = Splat(kTiny);
  for (const Lanes& load : load_) largest = Larger(largest, load);
  for (int32_t r = 0; r < num_ranks_; ++r) {
    const Lanes x = load_[r] / largest, x2 = x * x, x4 = x2 * x2, x8 = x4 * x4;
    price_[r] = x8 * x8 + 0.25f * x4;
    sum += price_[r];
  }
  for (int32_t r = 0; r < num_ranks_; ++r) {
    price_[r] *= memory_.weights() / sum;
    total_price_[r] = Sum(price_[r]);
  }
}

void RegretPlanner::CollectCandidates(int32_t level) {
  candidates_.clear();
  for (int32_t to = 0; to < num_ranks_; ++to) {
    if (received_[to] >= level) continue;
    for (int32_t slot = slot_offsets_[to]; slot < slot_offsets_[to + 1]; ++slot) {
      if (row_[slot] == kNoExpert || ranks_of_[row_[slot]].size() > 1) {
        CollectCopies(slot);
      } else {
        CollectExchanges(slot, level);
      }
    }
  }
}

// Copies of experts from dearer ranks into a slot that may be overwritten.
void RegretPlanner::CollectCopies(int32_t slot) {
  const int32_t to = rank_of_slot_[slot], leaving = row_[slot];
  Lanes freed = {};
  float loss = 0.0f;
  if (leaving != kNoExpert) {  // its flow goes to the cheapest other rank that has it
    freed = FlowAt(leaving, to);
    Lanes cheapest = Splat(1e9f);
    for (int32_t r : ranks_of_[leaving]) {
      if (r != to) cheapest = Smaller(cheapest, price_[r]);
    }
    loss = Sum(freed * (cheapest - price_[to]));
  }
  const Lanes load = load_[to] - freed;
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (e == leaving || Contains(ranks_of_[e], to)) continue;
    Lanes gain = {};
    bool any = false;
    for (int32_t r : ranks_of_[e]) {
      if (total_price_[r] <= total_price_[to]) continue;
      any = true;
      const Lanes difference = Larger(load_[r] - load, Splat(kTiny));
      const Lanes moved = Smaller(FlowAt(e, r), difference * 0.5f);
      gain = Larger(gain, moved * (price_[r] - price_[to]) * (1.0f - moved / difference));
    }
    if (!any) continue;
    const float estimate = Sum(gain) - loss;
    if (estimate > 0.0f) candidates_.push_back({e, slot, -1, estimate});
  }
}

// Exchanges of the only copy of an expert for an expert of a dearer rank.
void RegretPlanner::CollectExchanges(int32_t slot, int32_t level) {
  const int32_t to = rank_of_slot_[slot], leaving = row_[slot];
  const Lanes& load_leaving = memory_.scenarios()[leaving];
  for (int32_t from = 0; from < num_ranks_; ++from) {
    if (from == to || received_[from] >= level || total_price_[from] <= total_price_[to]) continue;
    const Lanes difference = load_[from] - load_[to], dearer = price_[from] - price_[to];
    const Lanes safe =
        difference > 0.0f ? Larger(difference, Splat(kTiny)) : Smaller(difference, Splat(-kTiny));
    for (int32_t other = slot_offsets_[from]; other < slot_offsets_[from + 1]; ++other) {
      const int32_t e = row_[other];
      if (e == kNoExpert || Contains(ranks_of_[e], to)) continue;
      const Lanes moved = FlowAt(e, from) - load_leaving;
      const Lanes linear = moved * dearer;
      const Lanes gain = moved * difference > 0.0f ? linear * (1.0f - moved / safe) : linear;
      const float estimate = Sum(gain);
      if (estimate > 0.0f) candidates_.push_back({e, slot, other, 0.5f * estimate});
    }
  }
}

// Improves the placement being worked on until no rank may receive more than `level` copies or
// no change gains `least_gain` per copy. Returns the copies made.
int32_t RegretPlanner::Search(int32_t level, float least_gain) {
  int32_t copies = 0;
  for (int i = 0; i < kMostChanges; ++i) {
    FillInForce();
    const float now = Objective(load_);
    PriceRanks();
    CollectCandidates(level);
    const size_t count = std::min<size_t>(kMostEvaluations, candidates_.size());
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(count),
                      candidates_.end(), [](const Change& a, const Change& b) {
                        return a.estimate != b.estimate ? a.estimate > b.estimate
                               : a.slot != b.slot       ? a.slot < b.slot
                               : a.expert != b.expert   ? a.expert < b.expert
                                                        : a.from_slot < b.from_slot;
                      });
    const Change* best = nullptr;
    float best_gain = least_gain;
    for (size_t c = 0; c < count; ++c) {
      const float gain =
          (now - Evaluate(candidates_[c])) / static_cast<float>(candidates_[c].copies());
      if (gain > best_gain) {
        best_gain = gain;
        best = &candidates_[c];
      }
    }
    if (best == nullptr) break;
    copies += best->copies();
    Apply(*best);
  }
  return copies;
}

// The largest sum over the last n batches, any n, of before - after.
float RegretPlanner::LargestSuffix(const Lanes& before, const Lanes& after) const {
  float sum = 0.0f, largest = 0.0f;
  for (int age = 0; age < memory_.num_batches(); ++age) {
    const int lane = memory_.lane_of(age);
    sum += before[lane] - after[lane];
    largest = std::max(largest, sum);
  }
  return largest;
}

double RegretPlanner::Threshold() const {
  const double theta = 1.0 + rho_ / (rho_ + kDearRho);
  return rho_ * theta * (memory_.batches_since_change() <= kTrustBatches ? kTrust : 1.0);
}

void RegretPlanner::OnBatch(std::span<const int32_t> counts) {
  memory_.Add(counts);
  SortShared();
  const int lane = memory_.lane_of(0);
  history_in_force_[lane] = LargestLoads(memory_.history())[lane];
}

std::optional<std::vector<int32_t>> RegretPlanner::Plan(const Input& input) {
  if (memory_.num_batches() == 0) return std::nullopt;
  const double threshold = input.forced ? 0.0 : Threshold();
  // Not even perfection would pay for one copy.
  if (!input.forced && LargestSuffix(history_in_force_, Splat(1.0f)) < threshold) {
    return std::nullopt;
  }
  const std::vector<int32_t> in_force = row_;
  std::vector<int32_t> accepted = row_;
  Lanes accepted_loads = history_in_force_;
  int32_t accepted_busiest = 0;
  std::fill(received_.begin(), received_.end(), 0);
  for (int32_t level = 1; level <= kMostLevels; ++level) {
    if (Search(level, input.forced ? 0.0f : kLeastGain) == 0) break;
    const Lanes loads = LargestLoads(memory_.history());
    const float regret = LargestSuffix(accepted_loads, loads);
    const int32_t busiest = *std::max_element(received_.begin(), received_.end());
    if (!input.forced && regret < threshold * (busiest - accepted_busiest)) break;
    accepted = row_;
    accepted_loads = loads;
    accepted_busiest = busiest;
    if (regret < 2.0 * threshold) break;
  }
  SetRow(in_force);
  if (accepted == in_force) return std::nullopt;
  return accepted;
}

void RegretPlanner::Adopt(std::span<const int32_t> row) {
  SetRow(row);
  history_in_force_ = LargestLoads(memory_.history());
}

namespace {

class RegretPolicy : public Policy {
 public:
  const char* name() const override { return "regret"; }
  bool meters_itself() const override { return true; }
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    return std::make_unique<RegretPlanner>(context.initial.topology(),
                                           context.initial.num_experts(),
                                           context.initial.expert_of_slot(layer), context.rho);
  }
};

}  // namespace

std::unique_ptr<Policy> MakeRegretPolicy() {
  return std::make_unique<RegretPolicy>();
}

}  // namespace ballast
