// What a front end is made of: shared by frontend.cc (callers) and frontend_io.cc (the I/O thread).
#ifndef BALLAST_RUNTIME_FRONTEND_STATE_H_
#define BALLAST_RUNTIME_FRONTEND_STATE_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/frontend.h"

namespace ballast {

// Two kinds of threads meet here: callers, who send and leave notes under the mutex, and the I/O
// thread, which alone receives and alone calls sinks (never under the mutex).
class Frontend::State {
 public:
  State(FrontendOptions options, std::vector<std::unique_ptr<ControlChannel>> channels,
        std::function<void(int, absl::Status)> on_failure, int wake_fd);
  ~State();

  absl::StatusOr<uint64_t> Submit(GenerationRequest request, std::shared_ptr<TokenSink> sink,
                                  int64_t timeout_ms);
  void Cancel(uint64_t request_id, FinishReason reason);
  absl::Status BroadcastPlan(std::vector<std::byte> plan);
  absl::Status AskToVerify(uint64_t id);
  absl::Status BeginLeaving(int rank);
  absl::Status Leave(int rank);
  absl::Status Return(int rank);
  void DrainAndStop(int64_t timeout_ms);
  std::vector<RankState> rank_states() const;
  bool accepting() const {
    const std::lock_guard lock(mutex_);
    return !draining_ && !failed_;
  }
  FrontendStats stats() const;

 private:
  // Sends `body` to `rank` (-1: to all) and a WakeFrame with the same number to all others.
  absl::Status BroadcastLocked(int rank, decltype(LeaderFrame::body) body);
  absl::Status CheckChangeLocked(int rank) const;
  bool AnyLostLocked() const;
  void CountLocked(RequestEnd end);
  // Ends a request and tells the rank that works on it.
  void AbandonLocked(uint64_t id, FinishReason reason);
  void EndAllLocked(FinishReason reason);
  void FailLocked(int rank, absl::Status status);
  // The rank will not be heard of again.
  void LoseLocked(int rank, absl::Status why);
  void DropLocked(int rank, const absl::Status& why);
  void DismissLocked();
  // Sends what the group's leader has to say, and requests that wait once the group is complete.
  void RegroupLocked();
  void WakeIo();

  void RunIo();
  int PollTimeoutMs() const;
  std::vector<std::pair<int, int64_t>> Silent();
  void Receive(int rank);
  void Handle(int rank, const RankFrame& frame);
  void HandleLocked(int rank, const EventsFrame& frame);
  void HandleLocked(int rank, const TroubleFrame& frame);
  void ExpireLocked();  // requests, ranks that do not report
  // Calls the sinks; false when the I/O thread has nothing more to do.
  bool Deliver();

  const FrontendOptions options_;
  const std::vector<std::unique_ptr<ControlChannel>> channels_;
  const std::function<void(int, absl::Status)> on_failure_;
  const int wake_fd_;  // an eventfd that interrupts the I/O thread's poll

  mutable std::mutex mutex_;
  // State below is protected by mutex_ (vectors by rank keep their size).
  std::condition_variable changed_;  // the I/O thread did something
  RequestBook book_;
  GroupLeader group_;
  std::vector<bool> leaving_;      // get no more requests, by rank
  std::vector<bool> closed_;       // channels that broke or were given up, by rank
  std::vector<int64_t> heard_ns_;  // when each rank was heard last; 0: never yet
  int64_t looked_ns_ = 0;          // when silence was judged last; 0: never yet
  std::vector<RankStatusFrame> rank_status_;
  FrontendStats counts_;
  uint64_t wake_seq_ = 0;
  bool draining_ = false;
  bool stopped_ = false;  // StopFrame is sent: a channel that closes is no failure any more
  bool failed_ = false;
  bool exiting_ = false;
  int failed_rank_ = -1;
  absl::Status failure_;
  bool delivering_ = false;  // sinks are being called
  std::thread::id io_thread_id_;

  std::thread io_thread_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_FRONTEND_STATE_H_
