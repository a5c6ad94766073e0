#ifndef BALLAST_PLACEMENT_WATER_FILL_H_
#define BALLAST_PLACEMENT_WATER_FILL_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/inlined_vector.h"

namespace ballast {

// Sixteen numbers that are computed on together: one per scenario of the load.
inline constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes Splat(float x) {
  return Lanes{} + x;
}
inline Lanes Smaller(const Lanes& a, const Lanes& b) {
  return a < b ? a : b;
}
inline Lanes Larger(const Lanes& a, const Lanes& b) {
  return a > b ? a : b;
}
inline float Sum(const Lanes& a) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += a[i];
  return sum;
}

// The ranks that host an expert, ascending.
using RankList = absl::InlinedVector<int32_t, 8>;
bool Contains(const RankList& ranks, int32_t rank);
void Insert(int32_t rank, RankList* ranks);  // no effect if it is there
void Remove(int32_t rank, RankList* ranks);  // REQUIRES it is there

// An expert to be divided over several ranks, and what came of it.
struct SharedExpert {
  const RankList* ranks;
  const Lanes* demand;
  Lanes* flow;  // [ranks->size()] out: the part that each rank takes
};

// Divides experts over their ranks so that the rank loads come level, in all scenarios at once, in
// fractions: pours one after the other, then takes each out and pours it again `sweeps` times. More
// sweeps come closer to the best division (where no rank set could be relieved).
//
//   an expert with demand f over ranks with loads l:  flow_i = max(0, level - l_i),
//   level = min over k of (f + the k lowest loads) / k
//
// SHAPES load [R]: in, what cannot be divided; out, all
void WaterFill(std::span<const SharedExpert> experts, int sweeps, std::span<Lanes> load);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_WATER_FILL_H_
