#include "placement/water_fill.h"

#include <algorithm>
#include <vector>

namespace ballast {
namespace {

// The level that water of amount `demand` reaches over these ranks.
inline Lanes LevelOver(const RankList& ranks, const Lanes& demand,
                                     const Lanes* load) {
  constexpr size_t kFew = 16;
  Lanes few[kFew];
  thread_local std::vector<Lanes> many;
  if (ranks.size() > kFew) many.resize(ranks.size());
  Lanes* sorted = ranks.size() > kFew ? many.data() : few;  // ascending, lane by lane
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
  for (size_t k = 0; k < ranks.size(); ++k) {
    sum += sorted[k];
    level = Smaller(level, sum * (1.0f / static_cast<float>(k + 1)));
  }
  return level;
}

inline void PourInto(const SharedExpert& expert, Lanes* load) {
  const RankList& ranks = *expert.ranks;
  const Lanes demand = *expert.demand;
  if (ranks.size() == 2) {  // most are
    Lanes &a = load[ranks[0]], &b = load[ranks[1]];
    expert.flow[0] = Smaller(Larger((demand + b - a) * 0.5f, Lanes{}), demand);
    expert.flow[1] = demand - expert.flow[0];
    a += expert.flow[0];
    b += expert.flow[1];
    return;
  }
  const Lanes level = LevelOver(ranks, demand, load);
  for (size_t i = 0; i < ranks.size(); ++i) {
    expert.flow[i] = Larger(level - load[ranks[i]], Lanes{});
    load[ranks[i]] += expert.flow[i];
  }
}

// Takes the expert out and pours it again.
inline void PourAgain(const SharedExpert& expert, Lanes* load) {
  const RankList& ranks = *expert.ranks;
  if (ranks.size() == 2) {  // half the difference goes over, as far as there is something to give
    Lanes &a = load[ranks[0]], &b = load[ranks[1]];
    const Lanes demand = *expert.demand, before = expert.flow[0];
    const Lanes flow = Smaller(Larger(before + (b - a) * 0.5f, Lanes{}), demand);
    expert.flow[0] = flow;
    expert.flow[1] = demand - flow;
    a += flow - before;
    b -= flow - before;
    return;
  }
  for (size_t i = 0; i < ranks.size(); ++i) load[ranks[i]] -= expert.flow[i];
  PourInto(expert, load);
}

}  // namespace

void Insert(int32_t rank, RankList* ranks) {
  const auto at = std::lower_bound(ranks->begin(), ranks->end(), rank);
  if (at == ranks->end() || *at != rank) ranks->insert(at, rank);
}

void Remove(int32_t rank, RankList* ranks) {
  ranks->erase(std::lower_bound(ranks->begin(), ranks->end(), rank));
}

void Pour(const SharedExpert& expert, Lanes* load) {
  PourInto(expert, load);
}

void WaterFill(const Basin& basin, int sweeps) {
  for (const SharedExpert& expert : basin.experts) PourInto(expert, basin.load);
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (const SharedExpert& expert : basin.experts) PourAgain(expert, basin.load);
  }
}

void Relevel(std::span<const Basin> basins, int sweeps) {
  size_t most = 0;
  for (const Basin& basin : basins) most = std::max(most, basin.experts.size());
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (size_t i = 0; i < most; ++i) {
      for (const Basin& basin : basins) {
        if (i < basin.experts.size()) PourAgain(basin.experts[i], basin.load);
      }
    }
  }
}

}  // namespace ballast
