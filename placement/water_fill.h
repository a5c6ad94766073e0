#ifndef BALLAST_PLACEMENT_WATER_FILL_H_
#define BALLAST_PLACEMENT_WATER_FILL_H_

#include <cstdint>
#include <span>

#include "absl/container/inlined_vector.h"
#include "placement/lanes.h"

namespace ballast {

// The ranks that host an expert, ascending.
using RankList = absl::InlinedVector<int32_t, 8>;
void Insert(int32_t rank, RankList* ranks);  // no effect if it is there
void Remove(int32_t rank, RankList* ranks);  // REQUIRES it is there

// An expert to be divided over several ranks, and what came of it.
struct SharedExpert {
  const RankList* ranks;
  const Lanes* demand;
  Lanes* flow;  // [ranks->size()] the part that each rank takes
};

// Experts that share ranks, and the loads of these ranks.
struct Basin {
  std::span<const SharedExpert> experts;
  Lanes* load;  // [R]
};

// Divides one expert over its ranks so that these come level, in all scenarios at once, in
// fractions; what the other experts do stays as it is.
//
//   demand f over ranks with loads l:  flow_i = max(0, level - l_i),
//   level = min over k of (f + the k lowest loads) / k
//
// SHAPES load [R]: in, without the expert; out, with it
void Pour(const SharedExpert& expert, Lanes* load);

// Pours the experts one after the other, then takes each out and pours it again `sweeps` times.
// More sweeps come closer to the best division (where no rank set could be relieved).
// SHAPES basin.load in, what cannot be divided; out, all
void WaterFill(const Basin& basin, int sweeps);

// Sweeps on from flows that are already part of the loads, in several basins at once: they have
// nothing to do with each other, so the processor works on all while each waits for itself.
void Relevel(std::span<const Basin> basins, int sweeps);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_WATER_FILL_H_
