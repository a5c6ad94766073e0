#ifndef BALLAST_PLACEMENT_REGROUP_H_
#define BALLAST_PLACEMENT_REGROUP_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"

namespace ballast {

// A rank of a group that takes over from another one.
struct GroupMember {
  int32_t old_rank = -1;  // its rank in the placement in force; -1: it comes with empty slots
  int32_t slots = 0;      // of a rank that comes; one that stays keeps its own
  // Any number, the same for all of one node; kSameNode, for all or for none: as in the placement.
  int32_t node = kSameNode;

  static constexpr int32_t kSameNode = -1;

  bool operator==(const GroupMember&) const = default;
};

// An expert that no member holds: the rank must read it from the checkpoint.
struct Reload {
  int32_t layer;
  int32_t expert;
  int32_t rank;  // in the new placement

  bool operator==(const Reload&) const = default;
};

struct Regrouped {
  Placement placement;
  std::vector<Reload> reloads;      // by layer, then by expert
  int32_t more_slots_per_rank = 0;  // that were added to make room
};

// The placement when other ranks than before go on: those of `members`, numbered in their order.
//
// Copies on members stay where they are. An expert that was only on ranks that left comes to an
// empty slot, or over a copy that its layer can spare: the expert has another rank, or a second
// slot on this one. The rank that reloads least so far takes it, and the copy of the expert with
// the most slots is given up; where the slots of all members together are fewer than the experts,
// every rank gets as many more as it takes. The epoch is `epoch`.
//
// ORDER    ties by the lowest rank, expert and slot; experts that were lost in order of their ids
// REQUIRES at least one member stays; old ranks are in range and none is named twice
// ERRORS   kInvalidArgument: the above, named
absl::StatusOr<Regrouped> Regroup(const Placement& current, std::span<const GroupMember> members,
                                  int64_t epoch);

// How many (layer, expert) pairs have each rank as their only host: what a reload would have to
// bring back if it were lost now. SHAPES result [R]
std::vector<int32_t> ReloadsIfLost(const Placement& placement);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_REGROUP_H_
