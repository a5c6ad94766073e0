#include "placement/row_search.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {
namespace {

// SOURCE all six: see regret.cc
constexpr int kFillSweeps = 6;   // of the water-fill of a row
constexpr int kTrialSweeps = 3;  // after a change, from the flows before it
constexpr int kMostEvaluations = 160, kFewestEvaluations = 56;  // candidates per change
constexpr int kEvaluationsTimesRanks = 1280;  // more ranks, costlier evaluations, fewer of them
// Candidates whose estimate is below this part of the least gain are not looked at.
constexpr float kEstimatePart = 0.5f;
constexpr int kMostChanges = 64;  // per level: a limit on everything
constexpr float kTiny = 1e-6f;

}  // namespace

RowSearch::RowSearch(const Topology& topology, int32_t num_experts, const TrafficMemory* memory,
                     bool node_local)
    : num_experts_(num_experts),
      num_ranks_(topology.num_ranks()),
      memory_(memory),
      node_local_(node_local),
      slot_offsets_(topology.slot_offsets),
      node_of_rank_(topology.node_of_rank),
      home_(static_cast<size_t>(num_experts), -1),
      least_hosts_(static_cast<size_t>(num_experts), 1),
      shared_index_(static_cast<size_t>(num_experts), -1),
      load_(static_cast<size_t>(num_ranks_)),
      price_(static_cast<size_t>(num_ranks_)),
      total_price_(static_cast<size_t>(num_ranks_)),
      received_(static_cast<size_t>(num_ranks_)) {
  for (int32_t r = 0; r < num_ranks_; ++r) {
    rank_of_slot_.insert(rank_of_slot_.end(), static_cast<size_t>(topology.slots_on(r)), r);
  }
}

void RowSearch::SetRow(std::span<const int32_t> row) {
  row_.assign(row.begin(), row.end());
  ranks_of_.assign(static_cast<size_t>(num_experts_), {});
  place_.assign(static_cast<size_t>(num_experts_) * num_ranks_, -1);
  for (size_t s = 0; s < row_.size(); ++s) {
    const int32_t e = row_[s];
    if (e == kNoExpert) continue;
    if (home_[e] < 0) home_[e] = node_of_rank_[rank_of_slot_[s]];
    if (IsOn(e, rank_of_slot_[s])) {
      row_[s] = kNoExpert;
    } else {
      AddRank(e, rank_of_slot_[s]);
    }
  }
  SortShared();
}

void RowSearch::SortShared() {
  shared_.clear();
  std::fill(shared_index_.begin(), shared_index_.end(), -1);
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() > 1) shared_.push_back(e);
  }
  std::stable_sort(shared_.begin(), shared_.end(), [this](int32_t a, int32_t b) {
    return memory_->typical_load(a) > memory_->typical_load(b);
  });
  flow_offsets_.assign(1, 0);
  for (size_t i = 0; i < shared_.size(); ++i) {
    shared_index_[shared_[i]] = static_cast<int32_t>(i);
    flow_offsets_.push_back(flow_offsets_.back() +
                            static_cast<int32_t>(ranks_of_[shared_[i]].size()));
  }
  flows_.resize(static_cast<size_t>(flow_offsets_.back()));
}

void RowSearch::AddRank(int32_t expert, int32_t rank) {
  Insert(rank, &ranks_of_[expert]);
  FindPlaces(expert);
}

void RowSearch::DropRank(int32_t expert, int32_t rank) {
  Remove(rank, &ranks_of_[expert]);
  place_[Cell(expert, rank)] = -1;
  FindPlaces(expert);
}

void RowSearch::FindPlaces(int32_t expert) {
  int16_t place = 0;
  for (int32_t r : ranks_of_[expert]) place_[Cell(expert, r)] = place++;
}

void RowSearch::StartCounting() {
  std::fill(received_.begin(), received_.end(), 0);
}

int32_t RowSearch::busiest() const {
  return *std::max_element(received_.begin(), received_.end());
}

bool RowSearch::MayOverwrite(int32_t slot) const {
  const int32_t held = row_[slot];
  return held == kNoExpert || num_hosts(held) > least_hosts_[held];
}

bool RowSearch::MayComeTo(int32_t expert, int32_t rank) const {
  return (!node_local_ || home_[expert] == node_of_rank_[rank]) && !IsOn(expert, rank);
}

// Loads and flows of the row in all scenarios.
void RowSearch::Fill() {
  measured_.experts.clear();
  std::fill(load_.begin(), load_.end(), Lanes{});
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() == 1) load_[ranks_of_[e][0]] += memory_->scenarios()[e];
  }
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int32_t e = shared_[i];
    measured_.experts.push_back(
        {&ranks_of_[e], &memory_->scenarios()[e], &flows_[flow_offsets_[i]]});
  }
  WaterFill({measured_.experts, load_.data()}, kFillSweeps);
}

Lanes RowSearch::LargestLoads(const std::vector<Lanes>& demand) {
  Trial& t = measured_;
  t.experts.clear();
  t.load.assign(static_cast<size_t>(num_ranks_), Lanes{});
  t.flows.resize(flows_.size());
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (ranks_of_[e].size() == 1) t.load[ranks_of_[e][0]] += demand[e];
  }
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int32_t e = shared_[i];
    t.experts.push_back({&ranks_of_[e], &demand[e], &t.flows[flow_offsets_[i]]});
  }
  WaterFill({t.experts, t.load.data()}, kFillSweeps);
  Lanes largest = t.load[0];
  for (const Lanes& load : t.load) largest = Larger(largest, load);
  return largest;
}

float RowSearch::Objective(std::span<const Lanes> load) const {
  Lanes largest = load[0], power_sum = {};
  for (const Lanes& l : load) {
    largest = Larger(largest, l);
    const Lanes square = l * l, fourth = square * square;
    power_sum += fourth * fourth;
  }
  const Lanes mean = power_sum * (1.0f / static_cast<float>(num_ranks_));
  const Lanes power_mean = SquareRoot(SquareRoot(SquareRoot(mean)));
  return 0.5f * Sum(memory_->weights() * (largest + power_mean));
}

// What the rank takes of the expert. REQUIRES it is there
inline const Lanes& RowSearch::FlowAt(int32_t expert, int32_t rank) const {
  if (shared_index_[expert] < 0) return memory_->scenarios()[expert];
  return flows_[flow_offsets_[shared_index_[expert]] + place_[Cell(expert, rank)]];
}

// What one more unit of load on a rank costs, about: steep near the largest load, as the objective.
void RowSearch::PriceRanks() {
  Lanes largest = Splat(kTiny), sum = Splat(kTiny);
  for (const Lanes& load : load_) largest = Larger(largest, load);
  for (int32_t r = 0; r < num_ranks_; ++r) {
    const Lanes x = load_[r] / largest, x2 = x * x, x4 = x2 * x2, x8 = x4 * x4;
    price_[r] = x8 * x8 + 0.25f * x4;
    sum += price_[r];
  }
  for (int32_t r = 0; r < num_ranks_; ++r) {
    price_[r] *= memory_->weights() / sum;
    total_price_[r] = Sum(price_[r]);
  }
}

void RowSearch::CollectCandidates(int32_t level, float least_estimate) {
  candidates_.clear();
  for (int32_t to = 0; to < num_ranks_; ++to) {
    if (received_[to] >= level || IsDear(to)) continue;
    for (int32_t slot = slot_offsets_[to]; slot < slot_offsets_[to + 1]; ++slot) {
      if (MayOverwrite(slot)) {
        CollectCopies(slot, least_estimate);
      } else {
        CollectExchanges(slot, level, least_estimate);
      }
    }
  }
}

inline RowSearch::Slope RowSearch::SlopeBetween(int32_t from, int32_t to,
                                                const Lanes& difference) const {
  const Lanes safe =
      difference > 0.0f ? Larger(difference, Splat(kTiny)) : Smaller(difference, Splat(-kTiny));
  return {price_[from] - price_[to], difference, 1.0f / safe};
}

inline Lanes RowSearch::Slope::GainOf(const Lanes& moved) const {
  const Lanes linear = moved * dearer;
  return moved * difference > 0.0f ? linear * (1.0f - moved * inverse) : linear;
}

// Copies of experts from dearer ranks into a slot that may be overwritten.
void RowSearch::CollectCopies(int32_t slot, float least_estimate) {
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
  slopes_.clear();
  for (int32_t r = 0; r < num_ranks_; ++r) {
    slopes_.push_back(SlopeBetween(r, to, Larger(load_[r] - load_[to] + freed, Splat(kTiny))));
  }
  for (int32_t e = 0; e < num_experts_; ++e) {
    if (e == leaving || !MayComeTo(e, to)) continue;
    Lanes gain = {};
    float estimate = 0.0f;
    for (int32_t r : ranks_of_[e]) {
      if (!IsDear(r)) continue;
      const Slope& slope = slopes_[r];
      gain = Larger(gain, slope.GainOf(Smaller(FlowAt(e, r), slope.difference * 0.5f)));
      if (leaving != kNoExpert && IsOn(leaving, r)) {  // or what leaves takes the place of e there
        const Slope before = SlopeBetween(r, to, load_[r] - load_[to]);
        const Lanes net = Smaller(FlowAt(e, r) - freed, before.difference * 0.5f);
        estimate = std::max(estimate, Sum(before.GainOf(net)));
      }
    }
    estimate = std::max(estimate, Sum(gain) - loss);
    if (estimate > least_estimate) candidates_.push_back({e, slot, -1, estimate});
  }
}

// Exchanges of an expert that must stay for an expert of a dearer rank.
void RowSearch::CollectExchanges(int32_t slot, int32_t level, float least_estimate) {
  const int32_t to = rank_of_slot_[slot], leaving = row_[slot];
  const Lanes& load_leaving = FlowAt(leaving, to);
  for (int32_t from = 0; from < num_ranks_; ++from) {
    if (received_[from] >= level || !IsDear(from) || !MayComeTo(leaving, from)) continue;
    const Slope slope = SlopeBetween(from, to, load_[from] - load_[to]);
    for (int32_t other = slot_offsets_[from]; other < slot_offsets_[from + 1]; ++other) {
      const int32_t e = row_[other];
      if (e == kNoExpert || !MayComeTo(e, to)) continue;
      const float estimate = 0.5f * Sum(slope.GainOf(FlowAt(e, from) - load_leaving));
      if (estimate > least_estimate) candidates_.push_back({e, slot, other, estimate});
    }
  }
}

// The loads after the change, but for the sweeps.
void RowSearch::SetUp(const Change& change, Trial* trial) const {
  const int32_t to = rank_of_slot_[change.slot], leaving = row_[change.slot];
  const int32_t from = change.from_slot < 0 ? -1 : rank_of_slot_[change.from_slot];
  const std::vector<Lanes>& demand = memory_->scenarios();
  trial->ranks = ranks_of_[change.expert];
  Insert(to, &trial->ranks);
  if (from >= 0) Remove(from, &trial->ranks);
  trial->ranks_leaving.clear();
  if (leaving != kNoExpert) {
    trial->ranks_leaving = ranks_of_[leaving];
    Remove(to, &trial->ranks_leaving);
    if (from >= 0) Insert(from, &trial->ranks_leaving);
  }
  trial->load.assign(load_.begin(), load_.end());
  for (int32_t e : {change.expert, leaving}) {
    if (e == kNoExpert) continue;
    for (int32_t r : ranks_of_[e]) trial->load[r] -= FlowAt(e, r);
  }
  trial->experts.clear();
  trial->flows.resize(flows_.size() + trial->ranks.size() + trial->ranks_leaving.size() + 2);
  Lanes* flow = trial->flows.data();
  const auto pour = [&](int32_t e, const RankList& on) {
    const SharedExpert expert = {&on, &demand[e], flow};
    Pour(expert, trial->load.data());
    if (on.size() > 1) trial->experts.push_back(expert);
    flow += on.size();
  };
  pour(change.expert, trial->ranks);
  if (leaving != kNoExpert) pour(leaving, trial->ranks_leaving);
  for (size_t i = 0; i < shared_.size(); ++i) {
    const int32_t e = shared_[i];
    if (e == change.expert || e == leaving) continue;
    const auto known = flows_.begin() + flow_offsets_[i];
    std::copy(known, flows_.begin() + flow_offsets_[i + 1], flow);
    trial->experts.push_back({&ranks_of_[e], &demand[e], flow});
    flow += ranks_of_[e].size();
  }
}

// The candidate whose evaluation gains most per copy, and more than `least_gain`; or null.
const RowSearch::Change* RowSearch::BestCandidate(float least_gain) {
  const size_t most =
      std::clamp(kEvaluationsTimesRanks / num_ranks_, kFewestEvaluations, kMostEvaluations);
  const size_t count = std::min(most, candidates_.size());
  if (count < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(count),
                     candidates_.end(), [](const Change& a, const Change& b) {
                       return a.estimate != b.estimate ? a.estimate > b.estimate : a.Before(b);
                     });
  }
  const float now = Objective(load_);
  const Change* best = nullptr;
  float best_gain = least_gain;
  for (size_t first = 0; first < count; first += kTrials) {
    const size_t trials = std::min(kTrials, count - first);
    std::array<Basin, kTrials> basins;
    for (size_t i = 0; i < trials; ++i) {
      SetUp(candidates_[first + i], &trials_[i]);
      basins[i] = {trials_[i].experts, trials_[i].load.data()};
    }
    Relevel(std::span(basins).first(trials), kTrialSweeps);
    for (size_t i = 0; i < trials; ++i) {
      const Change& change = candidates_[first + i];
      const float gain = (now - Objective(trials_[i].load)) / static_cast<float>(change.copies());
      if (gain > best_gain || (best != nullptr && gain == best_gain && change.Before(*best))) {
        best_gain = gain;
        best = &change;
      }
    }
  }
  return best;
}

void RowSearch::Apply(const Change& change) {
  const int32_t to = rank_of_slot_[change.slot], leaving = row_[change.slot];
  if (leaving != kNoExpert) DropRank(leaving, to);
  AddRank(change.expert, to);
  ++received_[to];
  if (change.from_slot >= 0) {
    const int32_t from = rank_of_slot_[change.from_slot];
    DropRank(change.expert, from);
    AddRank(leaving, from);
    row_[change.from_slot] = leaving;
    ++received_[from];
  }
  row_[change.slot] = change.expert;
  SortShared();
}

int32_t RowSearch::ImproveOnce(int32_t level, float least_gain) {
  Fill();
  PriceRanks();
  CollectCandidates(level, kEstimatePart * least_gain);
  const Change* best = BestCandidate(least_gain);
  if (best == nullptr) return 0;
  const int32_t copies = best->copies();
  Apply(*best);
  return copies;
}

int32_t RowSearch::Improve(int32_t level, float least_gain) {
  int32_t copies = 0;
  for (int i = 0; i < kMostChanges; ++i) {
    const int32_t more = ImproveOnce(level, least_gain);
    if (more == 0) break;
    copies += more;
  }
  return copies;
}

float RowSearch::ObjectiveOf() {
  Fill();
  return Objective(load_);
}

bool RowSearch::AddHost(int32_t expert) {
  Fill();
  candidates_.clear();
  for (int32_t slot = 0; slot < static_cast<int32_t>(row_.size()); ++slot) {
    const int32_t to = rank_of_slot_[slot], leaving = row_[slot];
    if (!MayComeTo(expert, to) || !MayOverwrite(slot)) continue;
    // Where most flow would have to leave comes last.
    const float freed = leaving == kNoExpert ? 0.0f : Sum(memory_->weights() * FlowAt(leaving, to));
    candidates_.push_back({expert, slot, -1, -freed});
  }
  const Change* best = BestCandidate(-1e30f);
  if (best == nullptr) return AddHostByMoving(expert);
  Apply(*best);
  return true;
}

// Moves the smallest expert that it can from another rank to one of the expert's own.
bool RowSearch::AddHostByMoving(int32_t expert) {
  int32_t to = -1, from = -1;
  const int32_t num_slots = static_cast<int32_t>(row_.size());
  for (int32_t other = 0; other < num_slots; ++other) {
    const int32_t moved = row_[other];
    if (moved == kNoExpert || !MayComeTo(expert, rank_of_slot_[other])) continue;
    if (from >= 0 && memory_->typical_load(moved) >= memory_->typical_load(row_[from])) continue;
    for (int32_t slot = 0; slot < num_slots; ++slot) {
      if (!MayOverwrite(slot) || !MayComeTo(moved, rank_of_slot_[slot])) continue;
      to = slot;
      from = other;
      break;
    }
  }
  if (from < 0) return false;
  Apply({row_[from], to, -1, 0.0f});
  Apply({expert, from, -1, 0.0f});
  return true;
}

}  // namespace ballast
