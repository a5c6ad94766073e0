#ifndef BALLAST_RUNTIME_GROUP_MEMBER_H_
#define BALLAST_RUNTIME_GROUP_MEMBER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/regroup.h"
#include "runtime/control_frames.h"
#include "runtime/rebalancer.h"

namespace ballast {

// A rank's half of a regrouping (the leader's: group_leader.h). Pure: no clock, no I/O.

// The ranks that serve together, from one regrouping to the next.
struct Group {
  int64_t generation = 0;
  int32_t member = -1;         // which of them this rank is; -1: none, it waits to be called back
  std::vector<int32_t> ranks;  // of the job, ascending
};

// Where the rank stands, as an answer to the order to halt. `step`: the last one it began.
HaltedFrame ReportTo(const HaltFrame& halt, int64_t step, const Rebalancer& rebalancer);

// The group of a ResumeFrame as rank `rank` of the job sees it.
Group GroupOf(const ResumeFrame& resume, int32_t rank);

// Brings the rebalancer of a member into the new group: takes the placement that came with the
// frame where this rank comes, puts the plan in force that counts, regroups. The caller then brings
// its store and its transport into line. REQUIRES group = GroupOf(resume, ..), of which this rank
// is a member ERRORS   kInvalidArgument: the placement that came along; kInternal:
// Rebalancer::Regroup's
absl::StatusOr<Regrouped> Follow(const ResumeFrame& resume, const Group& group,
                                 Rebalancer* rebalancer);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_GROUP_MEMBER_H_
