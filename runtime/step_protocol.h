#ifndef BALLAST_RUNTIME_STEP_PROTOCOL_H_
#define BALLAST_RUNTIME_STEP_PROTOCOL_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/rebalancer.h"

namespace ballast {

// How the step loop is left: with all ranks of the job, which can end MPI together, or without
// some.
enum class StopKind : uint8_t { kNone, kComplete, kIncomplete };

// What every member tells all others at the opening of a step.
struct StepHeader {
  int64_t step;
  uint64_t wake_seq;  // of the last frame read
  int64_t vote_plan_id;
  int64_t last_plan_id;     // the newest plan that has reached the member
  int64_t command_plan_id;  // leader
  int64_t last_cpu_us;      // of the step before, outside waits
  uint64_t choice_hash;     // of that step: which replicas the member chose (moe_layer.h)
  uint32_t record_ids;      // leader: the recording that wants this step's ids; 0: none
  int32_t num_tokens;
  int32_t num_prefill;  // of these
  Vote vote;
  Command command;  // leader
  StopKind stop;    // leader
  uint8_t busy;
};

// What members derive from their headers: because all have the same headers, all derive the same.
// One per generation of the group; member 0 is the leader. Pure: no clock, no I/O.
// Call order: (Begin Open)*.
class StepProtocol {
 public:
  // `last_step`: the first step opened is the next one. `drain_deadline_ns`: how long the messages
  // of a plan that was given up may be under way.
  StepProtocol(int32_t member, int64_t last_step, Rebalancer* rebalancer,
               int64_t drain_deadline_ns = std::numeric_limits<int64_t>::max())
      : member_(member),
        step_(last_step),
        drain_deadline_ns_(drain_deadline_ns),
        rebalancer_(rebalancer) {}

  struct Wish {
    int32_t num_tokens = 0, num_prefill = 0;
    uint64_t wake_seq = 0;
    int64_t last_cpu_us = 0;
    uint64_t choice_hash = 0;
    uint32_t record_ids = 0;          // leader
    StopKind stop = StopKind::kNone;  // leader
  };
  StepHeader Begin(const Wish& wish);

  struct Opening {
    StopKind stop = StopKind::kNone;  // else all leave the step loop
    bool run = false;                 // somebody has tokens: every member joins every layer
    bool same_wake = false;           // all have read the same frames
    bool busy = false;                // members have transfers under way, or a command is
    int32_t num_dissenters = 0;       // members that chose other replicas in the step before
    // A plan that came to its end with this header: put in force now, or given up by all.
    std::optional<Rebalancer::Outcome> ended;
  };
  // Does what the leader says. SHAPES headers [members]
  // ERRORS kInternal: a member opens another step; this one chose other replicas in the step
  //        before than most (at a tie: than the leader); told to flip what is not staged
  //        kDeadlineExceeded, on the leader: messages of a plan that was given up do not come. The
  //        group can only be renewed, whose messages are other ones
  absl::StatusOr<Opening> Open(std::span<const StepHeader> headers, int64_t now_ns);

  int64_t step() const { return step_; }

 private:
  const int32_t member_;
  int64_t step_;
  const int64_t drain_deadline_ns_;
  Rebalancer* const rebalancer_;
  PlanCommand next_command_;                    // leader: for the next header
  std::optional<Rebalancer::Outcome> aborted_;  // messages of it are under way
  int64_t aborted_ns_ = 0;                      // since when
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_STEP_PROTOCOL_H_
