// What travels on the control channels between the leader's front end and the ranks.
#ifndef BALLAST_RUNTIME_CONTROL_FRAMES_H_
#define BALLAST_RUNTIME_CONTROL_FRAMES_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/generation.h"

namespace ballast {

// Leader to rank. Every frame carries `wake_seq`, which rises by one with each *broadcast*:
// whatever the leader has to say to one rank, all others get a frame with the same number
// (WakeFrame if nothing else). Ranks compare the number in the step header, so that none falls
// asleep while another has been told to work.
struct SubmitFrame {
  GenerationRequest request;
};
struct CancelFrame {
  uint64_t request_id = 0;
};
struct WakeFrame {};
struct PlanFrame {
  std::vector<std::byte> plan;  // a serialized MigrationPlan, for all ranks
};
// Finish nothing more; leave the step loop.
struct StopFrame {
  bool complete = true;  // no rank was lost: all can end MPI together
};

// Other ranks than before will serve (group_leader.h): abandon the step, and report.
struct HaltFrame {
  int64_t generation = 0;       // of the group that is coming
  bool want_placement = false;  // for ranks that come: they do not have it
};
// The new group is complete. What it makes of the placement, each member works out itself
// (placement/regroup.h).
struct ResumeFrame {
  struct Member {
    int32_t rank = 0;       // of the job
    int32_t old_rank = -1;  // in the group before; -1: it comes
    int32_t slots = 0;      // of a rank that comes
    int32_t node = 0;
    bool operator==(const Member&) const = default;
  };
  int64_t generation = 0;
  // Ascending; a rank that is not among them waits until it is told to halt, or ends if it has been
  // told to stop.
  std::vector<Member> members;
  int64_t commit_plan_id = 0;        // the staged plan that counts; 0: none
  int64_t step = 0;                  // the last one that any of them began
  int64_t epoch = 0;                 // of the placement that all have before they regroup
  std::vector<std::byte> placement;  // that placement as JSON, for ranks that come; else empty
};

// Read all parameters again, check the placement, and report (runtime/verification.h).
struct VerifyFrame {
  uint64_t id = 0;  // of this check
};

struct LeaderFrame {
  uint64_t wake_seq = 0;
  std::variant<SubmitFrame, CancelFrame, WakeFrame, PlanFrame, StopFrame, HaltFrame, ResumeFrame,
               VerifyFrame>
      body;
};

// Rank to leader.
struct EventsFrame {
  std::vector<TokenEvent> events;  // everything one step produced
};
struct RankStatusFrame {
  int32_t running = 0, waiting = 0;
  int64_t kv_bytes_used = 0;
};
// What the gates of a rank chose in one step, while the leader records ids: the fields of
// TraceRecorder::IdsPart.
struct RoutingFrame {
  uint32_t recording = 0;
  int64_t step_begin = 0, step_end = 0, first = 0;
  std::vector<std::byte> ids;
};
// Where a rank stands that was told to halt.
struct HaltedFrame {
  int64_t generation = 0;
  int64_t step = 0;            // the last one it began
  int64_t epoch = 0;           // of its placement in force
  int64_t staged_plan_id = 0;  // the plan it has staged and voted for; 0: none
  // If they were asked for: the placement in force, and after the staged plan, as JSON.
  std::vector<std::byte> placement, staged_placement;
};
// A rank cannot go on, and why: it waits to be told to halt.
struct TroubleFrame {
  int64_t generation = 0;
  // Ranks of the job that it waited for in vain; none: a new generation of the same ranks will do.
  std::vector<int32_t> missing;
};
// One copy of an expert as it is in a rank's memory, and as it was packed.
struct VerifiedCopy {
  int32_t layer = 0, expert = 0;
  uint64_t found = 0, expected = 0;  // checksums
  bool operator==(const VerifiedCopy&) const = default;
};
// What a rank found when it was told to verify.
struct VerifiedFrame {
  uint64_t id = 0;
  int64_t step = 0;              // the last one it began
  int64_t epoch = 0;             // of its placement in force
  uint64_t fingerprint = 0;      // of that placement
  std::vector<std::byte> fault;  // what is wrong with its tables, as text; empty: nothing
  std::vector<VerifiedCopy> copies;
};
struct RankFrame {
  std::variant<EventsFrame, RankStatusFrame, RoutingFrame, HaltedFrame, TroubleFrame, VerifiedFrame>
      body;
};

std::vector<std::byte> Serialize(const LeaderFrame& frame);
std::vector<std::byte> Serialize(const RankFrame& frame);
// ERRORS kInvalidArgument on malformed bytes; never reads outside them
absl::StatusOr<LeaderFrame> ParseLeaderFrame(std::span<const std::byte> bytes);
absl::StatusOr<RankFrame> ParseRankFrame(std::span<const std::byte> bytes);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_CONTROL_FRAMES_H_
