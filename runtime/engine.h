#ifndef BALLAST_RUNTIME_ENGINE_H_
#define BALLAST_RUNTIME_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/control_channel.h"
#include "monitor/trace_recorder.h"
#include "runtime/checkpoint.h"
#include "runtime/decoder.h"
#include "runtime/ids_capture.h"
#include "runtime/rebalancer.h"
#include "runtime/scheduler.h"

namespace ballast {

// What one step did, as its rank saw it; loads and counts are the same on every rank.
struct StepRecord {
  int64_t step = 0;
  int64_t end_unix_us = 0;
  int64_t wall_us = 0;
  int64_t epoch = 0;
  PerKind<int64_t> num_tokens = {};  // over all ranks
  int32_t copies_committed = 0;     // by the flip that opened the step
  int64_t stall_us = 0;             // that flip, and slices of transfers, on this rank
  std::vector<int64_t> cpu_us;      // [R] CPU time of each rank's step thread outside waits
  std::vector<LayerCounts> layers;  // [num_moe_layers]
  // Of this rank alone:
  int32_t own_prefill_tokens = 0, own_decode_tokens = 0;
  int32_t running = 0, waiting = 0;
  int64_t kv_bytes_used = 0;
  int64_t tokens_generated = 0;

  int64_t all_tokens() const {
    return num_tokens[TokenKind::kPrefill] + num_tokens[TokenKind::kDecode];
  }
};

// Told what happens, on the step thread: must not block or allocate much.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepRecord& record) = 0;
  virtual void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) = 0;
  // This rank has nothing to run: what was still in its batch was cancelled.
  virtual void OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) = 0;
};

struct EngineOptions {
  DType dtype = DType::kF32;
  SplitMode split = SplitMode::kExact;
  int64_t kv_bytes = 256 << 20;
  Scheduler::Options scheduler;    // context, end token and vocabulary are the model's
  Rebalancer::Options rebalancer;  // rank is filled in
  int32_t staging_experts = 0;     // per rank; 0: as many as the rank has slots in one layer
  size_t chunk_bytes = 256 << 10;
  const TraceRecorder* recorder = nullptr;  // leader: says whether ids are wanted; may be null
};

// One rank of the server: runs steps in lock-step with the other ranks until told to stop
// (design section 2.1). All communication of the data path happens on the thread that calls Run.
class Engine {
 public:
  // Loads the parameters that `initial` gives to this rank.
  // `channel` leads to the leader's front end; rank 0's own engine has one too.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(
      const EngineOptions& options, const Checkpoint& checkpoint, const KernelSet& kernels,
      const Placement& initial, Transport* transport, Communicator* communicator,
      ControlChannel* channel, EngineObserver* observer);
  ~Engine();

  // Steps until the leader says stop. COLLECTIVE.
  // ERRORS kUnavailable, kDeadlineExceeded: a peer or the leader is lost; nothing more can be
  // served
  absl::Status Run();

  const ExpertStore& store() const { return *store_; }

 private:
  struct Header;
  Engine();
  absl::Status ReadFrames();
  void ReportAbort();                     // once no rank has anything of the plan left
  absl::Status Open(const Batch& batch);  // exchanges the headers and does what the leader says
  absl::Status RunStep(const Batch& batch);
  absl::Status Rest();  // nobody has tokens
  absl::Status SendEvents();
  absl::Status SendIds();  // of the step, where the leader records them
  void Report();  // the step before, now that all CPU times are known

  EngineOptions options_;
  int32_t rank_ = 0;
  Communicator* comm_ = nullptr;
  ControlChannel* channel_ = nullptr;
  EngineObserver* observer_ = nullptr;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<Rebalancer> rebalancer_;

  std::vector<Header> headers_;  // [R] of this step
  std::vector<int32_t> rank_tokens_;  // [R] of them
  std::unique_ptr<IdsCapture> capture_;
  std::vector<TokenEvent> events_;
  PlanCommand next_command_;                    // leader: for the next header
  std::optional<Rebalancer::Outcome> aborted_;  // not yet reported: messages of it are under way
  uint64_t wake_seq_ = 0;                       // of the last frame read
  bool stop_ = false;                           // told to stop
  bool stopping_ = false;                       // the leader's header says so: all leave now
  int64_t step_ = 0;
  int64_t last_cpu_us_ = 0;
  bool record_open_ = false;
  StepRecord record_;
  int32_t copies_committed_ = 0;
  int64_t stall_ns_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_ENGINE_H_
