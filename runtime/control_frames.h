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
struct StopFrame {};  // finish nothing more; leave the step loop

struct LeaderFrame {
  uint64_t wake_seq = 0;
  std::variant<SubmitFrame, CancelFrame, WakeFrame, PlanFrame, StopFrame> body;
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
struct RankFrame {
  std::variant<EventsFrame, RankStatusFrame, RoutingFrame> body;
};

std::vector<std::byte> Serialize(const LeaderFrame& frame);
std::vector<std::byte> Serialize(const RankFrame& frame);
// ERRORS kInvalidArgument on malformed bytes; never reads outside them
absl::StatusOr<LeaderFrame> ParseLeaderFrame(std::span<const std::byte> bytes);
absl::StatusOr<RankFrame> ParseRankFrame(std::span<const std::byte> bytes);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_CONTROL_FRAMES_H_
