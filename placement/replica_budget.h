#ifndef BALLAST_PLACEMENT_REPLICA_BUDGET_H_
#define BALLAST_PLACEMENT_REPLICA_BUDGET_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/trace.h"

namespace ballast {

struct ReplicaBudgetOptions {
  int32_t num_ranks = 1;
  int32_t slots_per_rank = 1;  // most of a rank in one layer
  int64_t copies = 0;          // to spend: replicas beyond the first of an expert, over all layers
};

// Copies per layer, and a full plan of each layer with that many.
struct ReplicaBudget {
  std::vector<int32_t> copies;                // [L], sum is the budget
  std::vector<int64_t> largest_load;          // [L] largest rank load under the exact split
  std::vector<int64_t> uniform_largest_load;  // [L] the same with equally many copies per layer
  std::vector<int32_t> expert_of_slot;        // [L * S], S = num_ranks * slots_per_rank
};

// Spends one memory budget where it pays: layers whose load is skewed get more copies, others less.
//
//   min  sum over layers l of F_l(c_l)
//   with c_l >= 0, sum of c_l = copies, E + c_l at most the slots and at most E on each rank
//
// F_l(c) is the largest rank load of the best full plan of layer l with at most E + c slots, spread
// evenly over the ranks. It never rises with c, but a copy may gain nothing until it is joined by
// another, so the sum is minimised exactly, over all ways to spend the budget. Copies that no layer
// gains from go to the layers with the fewest. Loads of layers are compared as they are given.
//
// The slots of all layers are dealt to the ranks in one round, so that in a layer, and over all
// layers together, no rank holds two slots more than another. A rank's slots that its layer does
// not use are empty.
//
// ERRORS  kInvalidArgument names the option, its value and what is allowed
// ORDER   ties: the lower layer gets the copies
absl::StatusOr<ReplicaBudget> SpendReplicaBudget(const LoadTable& load,
                                                 const ReplicaBudgetOptions& options);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_REPLICA_BUDGET_H_
