#ifndef BALLAST_PLACEMENT_EPLB_H_
#define BALLAST_PLACEMENT_EPLB_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// Slots are spread evenly over the ranks, ranks over the nodes, experts over the groups.
struct EplbShape {
  int32_t num_slots;
  int32_t num_groups;
  int32_t num_nodes;
  int32_t num_ranks;
};

struct EplbResult {
  std::vector<int32_t> expert_of_slot;  // [num_slots]
  std::vector<int32_t> num_replicas;    // [E]
};

// The Expert Parallelism Load Balancer that everybody knows, exactly: groups to nodes, copies
// inside each node to the expert with the largest load per copy, copies to the node's ranks. With
// num_groups % num_nodes == 0 it is hierarchical; otherwise it treats the machine as one node and
// the experts as one group ("global"). It may put two copies of one expert on one rank.
//
// SHAPES load [E]
// ERRORS kInvalidArgument when E % num_groups, num_ranks % num_nodes or num_slots % num_ranks is
//        not 0, or num_slots < E
// ORDER  in single precision, as the original: the largest load per copy first, ties to the lowest
//        index; the lightest pack first, ties to the lowest index
// SOURCE github.com/deepseek-ai/EPLB, eplb.py, rebalance_experts
absl::StatusOr<EplbResult> Eplb(std::span<const int64_t> load, const EplbShape& shape);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_EPLB_H_
