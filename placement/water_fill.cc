#include "placement/water_fill.h"

#include <algorithm>

namespace ballast {
namespace {

// The level that water of amount `demand` reaches over these ranks.
Lanes LevelOver(const RankList& ranks, const Lanes& demand, std::span<const Lanes> load) {
  thread_local std::vector<Lanes> sorted;  // ascending, lane by lane
  sorted.resize(ranks.size());
  for (size_t i = 0; i < ranks.size(); ++i) {
    Lanes x = load[ranks[i]];
    for (size_t j = 0; j < i; ++j) {
      const Lanes low = Smaller(sorted[j], x);
      x = Larger(sorted[j], x);
      sorted[j] = low;
    }
    sorted[i] = x;
  }
  Lanes sum = demand, level = Splat(1e30f);
  for (size_t k = 0; k < sorted.size(); ++k) {
    sum += sorted[k];
    level = Smaller(level, sum * (1.0f / static_cast<float>(k + 1)));
  }
  return level;
}

void Pour(const SharedExpert& expert, std::span<Lanes> load) {
  const RankList& ranks = *expert.ranks;
  if (ranks.size() == 2) {  // most are
    Lanes &a = load[ranks[0]], &b = load[ranks[1]];
    const Lanes demand = *expert.demand;
    expert.flow[0] = Smaller(Larger((demand + b - a) * 0.5f, Lanes{}), demand);
    expert.flow[1] = demand - expert.flow[0];
    a += expert.flow[0];
    b += expert.flow[1];
    return;
  }
  const Lanes level = LevelOver(ranks, *expert.demand, load);
  for (size_t i = 0; i < ranks.size(); ++i) {
    expert.flow[i] = Larger(level - load[ranks[i]], Lanes{});
    load[ranks[i]] += expert.flow[i];
  }
}

}  // namespace

bool Contains(const RankList& ranks, int32_t rank) {
  return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

void Insert(int32_t rank, RankList* ranks) {
  const auto at = std::lower_bound(ranks->begin(), ranks->end(), rank);
  if (at == ranks->end() || *at != rank) ranks->insert(at, rank);
}

void Remove(int32_t rank, RankList* ranks) {
  ranks->erase(std::lower_bound(ranks->begin(), ranks->end(), rank));
}

void WaterFill(std::span<const SharedExpert> experts, int sweeps, std::span<Lanes> load) {
  for (const SharedExpert& expert : experts) Pour(expert, load);
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (const SharedExpert& expert : experts) {
      for (size_t i = 0; i < expert.ranks->size(); ++i) load[(*expert.ranks)[i]] -= expert.flow[i];
      Pour(expert, load);
    }
  }
}

}  // namespace ballast
