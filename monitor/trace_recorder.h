#ifndef BALLAST_MONITOR_TRACE_RECORDER_H_
#define BALLAST_MONITOR_TRACE_RECORDER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// Keeps the routing of whole steps in memory of a fixed size, on the leader, for `ballast replay`.
//
//   counts  [steps, 2, layers, experts] i32: copies per step, kind of token (prefill, then decode),
//           layer and logical expert, all ranks
//   ids     [tokens, layers, top-k] u8 (u16 with more than 256 experts): the choice of each token
//
// Start takes all the memory. A step that does not fit ends the recording ("full"); what is there
// stays until the next Start: (Start (AddStep | AddIds | Dump)* Stop Dump*)*.
// ORDER   of ids: by step, then rank, then row of the rank's batch
// THREADS AddStep from one thread, AddIds from one thread, the others from any
class TraceRecorder {
 public:
  enum class What { kCounts, kIds };
  static constexpr int64_t kDefaultBytes = int64_t{256} << 20;
  static constexpr int64_t kMostBytes = int64_t{1} << 30;  // a dump is one HTTP answer

  struct Shape {
    int32_t num_ranks = 1, num_layers = 0, num_experts = 0, top_k = 0;
  };
  struct State {
    bool started = false;  // between Start and Stop
    bool full = false;     // the next step did not fit
    bool gap = false;      // ids of a step were lost: what came before them is kept
    What what = What::kCounts;
    int64_t length = 0;  // whole steps of counts, or tokens of whole steps of ids
    int64_t tokens = 0;  // of these steps
    int64_t bytes = 0;
    int64_t max_bytes = 0;
  };
  // One rank's tokens of one step. Tokens are numbered over all ranks from the begin of the
  // recording, so every rank can say where its own belong.
  struct IdsPart {
    uint32_t recording = 0;                // as ids_recording() said
    int64_t step_begin = 0, step_end = 0;  // the step's tokens, all ranks
    int64_t first = 0;                     // of this rank's
    std::span<const std::byte> ids;        // [tokens, layers, top-k] of IdBytes each
  };

  explicit TraceRecorder(const Shape& shape);

  // ERRORS kFailedPrecondition: not stopped since the last Start
  //        kInvalidArgument: max_bytes below one step (counts) or token (ids) or above kMostBytes
  //        kResourceExhausted: no such memory
  absl::Status Start(What what, int64_t max_bytes);
  // ERRORS kFailedPrecondition: not started
  absl::Status Stop();
  State state() const;

  // A step's counts; ignored unless counts are being recorded. SHAPES [2 * layers * experts]
  void AddStep(std::span<const int32_t> counts);
  // A rank's part of a step; a rank without tokens gives an empty one. Parts of one rank come in
  // order of steps. Ignored unless they belong to this recording.
  void AddIds(int32_t rank, const IdsPart& part);

  // The recording whose ids are wanted, from 1; 0: none.
  uint32_t ids_recording() const { return ids_recording_.load(std::memory_order_relaxed); }
  static int32_t IdBytes(int32_t num_experts) { return num_experts > 256 ? 2 : 1; }

  // A .npy file of the whole steps recorded so far.
  // ERRORS kFailedPrecondition: nothing is recorded
  absl::StatusOr<std::string> Dump() const;

 private:
  int64_t unit_bytes(What what) const;  // of a step's counts, or a token's ids
  void EndLocked(const char* why);

  const Shape shape_;
  std::atomic<uint32_t> ids_recording_ = 0;
  mutable std::mutex mutex_;
  // State below is protected by mutex_. Bytes before state_.length are never written again, so a
  // dump reads them without it.
  State state_;
  uint32_t recording_ = 0;
  std::shared_ptr<std::byte[]> bytes_;
  std::vector<int64_t> rank_end_;  // tokens of the steps of which the rank's part is here
};

}  // namespace ballast

#endif  // BALLAST_MONITOR_TRACE_RECORDER_H_
