#ifndef BALLAST_PLACEMENT_RULES_H_
#define BALLAST_PLACEMENT_RULES_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "placement/placement.h"

namespace ballast {

// What a placement must keep to, beyond being valid.
struct PlacementRules {
  int32_t coverage = 0;     // 1: the loss of any one rank leaves every hot expert a copy
  bool node_local = false;  // copies stay on the node where the expert is at home
};

// How many experts of a layer are hot: the ones with the largest load, as many as there are spare
// slots, so that each of them can be on two ranks.
//
//   min(E, sum over ranks of min(slots, E) - E)
//
// A rank has no use for more slots than there are experts. 0: there is no spare slot.
int32_t NumHotExperts(const Topology& topology, int32_t num_experts);

// Whether a policy whose plans keep the rules `kept` can do what `wanted` asks on these ranks.
// ERRORS kInvalidArgument: the policy keeps less, named; a rule out of range; coverage without a
//        spare slot, or together with node_local on several nodes: all hot experts may be at home
//        on one node, whose spare slots are too few.
absl::Status CheckRules(const std::string& policy, const PlacementRules& kept,
                        const PlacementRules& wanted, const Topology& topology,
                        int32_t num_experts);

// Puts every hot expert of `load` that is on one rank alone on a second one, hottest first. It
// takes the slot whose copy carries least under the exact split among those that are not needed:
// empty ones, second copies on one rank, copies beyond the first (of a hot expert: the second).
// Where these are all on its own rank, an expert of another rank moves there and leaves its slot.
// Returns the slots that changed.
//
// SHAPES   load [E]  row [num_slots], valid
// REQUIRES loads are >= 0 and add up to at most 2^60
// ORDER    ties by the lower expert id, then the lower slot
int32_t CoverHotExperts(const Topology& topology, std::span<const int64_t> load,
                        std::vector<int32_t>* row);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_RULES_H_
