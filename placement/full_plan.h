#ifndef BALLAST_PLACEMENT_FULL_PLAN_H_
#define BALLAST_PLACEMENT_FULL_PLAN_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"

namespace ballast {

// A placement of one layer for a known load, with a split that shows what it is worth.
//
// Whoever doubts it can check it in one pass: the quotas of an expert's slots add up to its load,
// no rank's quotas exceed largest_load, and no placement at all does better than lower_bound.
struct FullPlan {
  std::vector<int32_t> expert_of_slot;  // [num_slots] or kNoExpert
  std::vector<int64_t> quota;           // [num_slots] copies of its expert that the slot takes
  int64_t largest_load = 0;             // largest sum of quotas of a rank
  int64_t lower_bound = 0;              // LoadLowerBound
  bool by_windows = false;              // the construction applied: largest_load = ceil(mean)
};

// The smallest largest rank load that any placement on these ranks could reach, as far as counting
// slots tells: an expert on c ranks sheds at most c times it.
//
//   min T : T >= ceil(sum w / R),  sum over e of max(1, ceil(w[e] / T)) <= slots,
//           ceil(w[e] / T) <= R
//
// R counts the ranks that have slots.
// REQUIRES loads are >= 0 and add up to at most 2^60; num_slots >= E
int64_t LoadLowerBound(const Topology& topology, std::span<const int64_t> load);

// Plans one layer from nothing but its load: perfect balance where every rank has a spare slot.
//
// Windows. With N experts on R ranks and k = ceil(N / R), if every rank has at least k + 1 slots:
// sort the experts by load; a rank takes the k consecutive ones whose sum comes closest to its
// share from below, and tops up from the next heavier one, whose rest goes back into the list.
// Shares are floor or ceil of the mean, so the largest rank load is ceil(mean) exactly, with at
// most N + R - 1 copies and no expert twice on a rank.
//
// Otherwise (fewer spare slots than ranks, or too small a rank) the best of three under the exact
// split: windows where only the ranks with a spare slot top up, in two forms, and a greedy of
// copies to the largest load per copy, packed on the lightest rank. The placement that is best of
// these is not always the best there is; lower_bound says how far it can be.
//
// Spare slots left over hold further copies: of the expert with the largest load per copy that the
// rank lacks, or, where the loads are nearly alike, of the next rank's experts (a ring). A slot
// stays empty only when its rank holds every expert.
//
// ORDER   ties by the lower expert id, then the lower rank: same load, same plan
// THREADS one thread at a time; owns its scratch
// SOURCE  induction on the ranks: in a sorted list the window sums rise from at most the mean to at
//         least the mean, so a window below it is followed by one above it
class FullPlanner {
 public:
  // ERRORS kInvalidArgument: no expert, or more experts than slots
  static absl::StatusOr<FullPlanner> Create(Topology topology, int32_t num_experts);

  // SHAPES   load [E]
  // REQUIRES loads are >= 0 and add up to at most 2^60
  void Plan(std::span<const int64_t> load, FullPlan* plan);

 private:
  struct Item {
    int64_t load;
    int32_t expert;
  };
  FullPlanner(Topology topology, int32_t num_experts);

  void SortItems(std::span<const int64_t> load);
  void PlanByWindows(int64_t total, FullPlan* plan);
  void PlanWithFewSpare(std::span<const int64_t> load, FullPlan* plan);
  void PackWindows(bool nearest, std::vector<int32_t>* row);
  void PackGreedily(std::span<const int64_t> load, std::vector<int32_t>* row) const;
  void SplitRow(std::span<const int64_t> load, FullPlan* plan) const;
  int32_t LastWindowUpTo(int64_t share, int32_t width, int32_t start, int64_t* sum) const;
  void TakeWindow(int32_t first, int32_t width, int64_t rest);
  void FillSpare(std::span<const int64_t> load, std::vector<int32_t>* row);

  Topology topology_;
  int32_t num_experts_;
  int32_t num_used_ranks_;         // ranks that have slots
  int32_t window_ = 0;             // k, or 0 where the construction does not apply
  std::vector<Item> items_;        // what is left to place, by rising (load, expert)
  std::vector<int32_t> copies_;    // [E]
  std::vector<uint64_t> on_rank_;  // [R * words] bit e: the rank holds expert e
  std::vector<double> per_copy_;   // [E] load per copy
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_FULL_PLAN_H_
