#ifndef BALLAST_RUNTIME_FRONTEND_H_
#define BALLAST_RUNTIME_FRONTEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/control_channel.h"
#include "runtime/control_frames.h"
#include "runtime/generation.h"
#include "runtime/group_leader.h"
#include "runtime/request_book.h"

namespace ballast {

struct FrontendOptions {
  int32_t max_pending = 1024;            // requests admitted and not finished; more are refused
  int64_t request_timeout_ms = 300'000;  // default deadline of a request
  int32_t context_tokens = 0;            // prompt + generated at most
  int32_t vocab_size = 0;
  // Told of each end, under the front end's lock: must not block or call back. Empty: nobody.
  std::function<void(RequestEnd)> on_end = {};
  // Told what the gates of a rank chose, from the I/O thread: must not block. Empty: nobody.
  std::function<void(int rank, const RoutingFrame&)> on_routing = {};
  // Told what a rank found when it was asked to verify, from the I/O thread: must not block.
  std::function<void(int rank, VerifiedFrame)> on_verified = {};
  // Go on without ranks that are lost, but for rank 0. False: any loss ends the service.
  bool survive_losses = false;
  // A rank other than 0 that has said nothing for so long, once it has begun to, is lost (ranks say
  // something every kAlivePeriodMs); 0: only a broken channel tells. Time in which this process
  // itself stood still does not count.
  int64_t silence_ms = 0;
  GroupLeader::Options group = {};
  // What each rank brings when it comes back (group_leader.h). Empty: nothing, one node.
  std::vector<int32_t> slots = {}, node = {};
  // Told, under the front end's lock, of each rank that is lost while the others go on, and of
  // requests that went on at another rank.
  std::function<void(int rank, const absl::Status&)> on_lost = {};
  std::function<void(int64_t requests)> on_moved = {};
};

inline constexpr int64_t kAlivePeriodMs = 200;

struct FrontendStats {
  int64_t accepted = 0, finished = 0, cancelled = 0, rejected = 0, failed = 0, deadline = 0;
  int32_t pending = 0, waiting = 0, running = 0;
  int64_t tokens_generated = 0;
  int64_t moved = 0;  // requests that went on at another rank
};

// The leader's side of the control channels: gives requests to ranks (request_book.h), carries
// tokens back, enforces deadlines, and tells all ranks to wake (control_frames.h). When a rank is
// lost it has the others regroup (group_leader.h) and gives them the requests of the lost one.
// THREADS every public function from any thread. One I/O thread of its own.
class Frontend {
 public:
  // `channels[r]` leads to rank r. `on_failure` is called once, from the I/O thread, when a rank is
  // lost and the others cannot go on; every pending request has then been finished with kFailed.
  static absl::StatusOr<std::unique_ptr<Frontend>> Create(
      FrontendOptions options, std::vector<std::unique_ptr<ControlChannel>> channels,
      std::function<void(int rank, absl::Status)> on_failure);
  // Ends what is pending with kCancelled. REQUIRES no other call is under way.
  ~Frontend();

  // Checks the request, gives it an id (returned) and starts it. `timeout_ms` 0: the default.
  // ERRORS kInvalidArgument: "field: value and what is allowed" (prompt empty or beyond the
  // context,
  //        token id outside the vocabulary, max_tokens < 1, temperature, top_p)
  //        kResourceExhausted: max_pending reached    kUnavailable: draining or failed
  absl::StatusOr<uint64_t> Submit(GenerationRequest request, std::shared_ptr<TokenSink> sink,
                                  int64_t timeout_ms = 0);
  // The request ends with `reason` (if it has not ended); unknown ids are ignored. The rank is
  // told, and the sink hears the end without waiting for it. kStop is for a stop string that was
  // found.
  void Cancel(uint64_t request_id, FinishReason reason = FinishReason::kCancelled);
  // A migration plan for all ranks.
  absl::Status BroadcastPlan(std::vector<std::byte> plan);
  // Has all ranks verify what they serve from; FrontendOptions::on_verified gets what they find.
  absl::Status AskToVerify(uint64_t id);
  // The rank gets no more requests: it is about to leave.
  // ERRORS kInvalidArgument: rank 0, or out of range; kFailedPrecondition: it is lost, or does not
  //        serve; kUnavailable: stopped or failed
  absl::Status BeginLeaving(int rank);
  // One that is about to leave serves no more until Return: the others regroup without it, and go
  // on with its requests. It keeps its connection. ERRORS as BeginLeaving; kFailedPrecondition also
  // where its departure was called off
  absl::Status Leave(int rank);
  // It serves again; one that has not left yet stays. ERRORS as BeginLeaving; kFailedPrecondition
  // where it serves, or while the ranks regroup
  absl::Status Return(int rank);
  // Of each rank of the job. While the ranks regroup, what they will be.
  enum class RankState { kServes, kLeaving, kLeft, kLost };
  std::vector<RankState> rank_states() const;
  // The ranks among them that serve or are about to leave.
  std::vector<int> serving() const;

  // Admits nothing more; waits until every request has ended or `timeout_ms` have passed (the rest
  // end with kCancelled); then tells all ranks to stop.
  void DrainAndStop(int64_t timeout_ms);

  bool accepting() const;
  FrontendStats stats() const;

 private:
  class State;
  explicit Frontend(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_FRONTEND_H_
