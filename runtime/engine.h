#ifndef BALLAST_RUNTIME_ENGINE_H_
#define BALLAST_RUNTIME_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/control_channel.h"
#include "comm/member_transport.h"
#include "monitor/trace_recorder.h"
#include "runtime/backend.h"
#include "runtime/checkpoint.h"
#include "runtime/control_frames.h"
#include "runtime/decoder.h"
#include "runtime/group_member.h"
#include "runtime/ids_capture.h"
#include "runtime/memory_plan.h"
#include "runtime/rebalancer.h"
#include "runtime/scheduler.h"
#include "runtime/step_protocol.h"
#include "runtime/verifier.h"

namespace ballast {

// How a group came to be.
struct Regrouping {
  Group group;
  int32_t reloads = 0;            // experts that were read from the checkpoint, over all members
  int64_t pause_ns = 0;           // from the order to halt to the readiness of this rank
  int64_t committed_plan_id = 0;  // of the last plan that a regrouping put in force; 0: none so far
};

// What a rank sent: rows, results and headers of steps, and the parameters of experts.
// UNITS bytes of whole messages
struct SentBytes {
  int64_t steps = 0, experts = 0;
};

// What one step did, as its rank saw it; loads and counts are the same on every rank.
// Ranks are members of the group (R of them).
struct StepRecord {
  int64_t step = 0;
  int64_t end_unix_us = 0;
  int64_t wall_us = 0;
  int64_t epoch = 0;
  PerKind<int64_t> num_tokens = {};  // over all ranks
  int32_t copies_committed = 0;      // by the flip that opened the step
  int64_t stall_us = 0;              // that flip, and slices of transfers, on this rank
  std::vector<int64_t> cpu_us;       // [R] CPU time of each rank's step thread outside waits
  std::vector<LayerCounts> layers;   // [num_moe_layers]
  // Of this rank alone:
  int32_t own_prefill_tokens = 0, own_decode_tokens = 0;
  int32_t running = 0, waiting = 0;
  int64_t kv_bytes_used = 0;
  int64_t tokens_generated = 0;
  // Since the record before; also what was sent between steps, and before a regrouping.
  SentBytes to_node, to_network;  // to ranks of the same node, of others

  int64_t all_tokens() const {
    return num_tokens[TokenKind::kPrefill] + num_tokens[TokenKind::kDecode];
  }
};

// What came of looking (verifier.h, step_protocol.h, placement_check.h).
struct Verified {
  int64_t copies = 0;      // experts whose parameters were read again
  int32_t corrupted = 0;   // of these, not as they were packed
  int32_t dissenters = 0;  // members that chose other replicas than most
  int32_t unsound = 0;     // placements or tables that contradict themselves
  int32_t unreadable = 0;  // failures to read an expert from the checkpoint
};

// Told what happens, on the step thread: must not block or allocate much.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepRecord& record) = 0;
  virtual void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) = 0;
  // This rank has nothing to run: what was still in its batch was cancelled.
  virtual void OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) = 0;
  // What this rank looked at to find out whether it is as it should be.
  virtual void OnVerified(const Verified& verified) = 0;
  // This rank serves no more until OnRegrouped: it has nothing to run.
  virtual void OnParked() = 0;
  // Other ranks than before serve from here on, under a placement for them. A plan that was under
  // way has come to nothing, or is part of it.
  virtual void OnRegrouped(const Regrouping& regrouping, const Placement& in_force) = 0;
};

struct EngineOptions {
  DType dtype = DType::kF32;
  SplitMode split = SplitMode::kExact;
  int64_t kv_bytes = 256 << 20;
  Scheduler::Options scheduler;    // context, end token and vocabulary are the model's
  Rebalancer::Options rebalancer;  // rank is filled in
  int32_t staging_experts = 0;     // per rank; 0: as many as the rank has slots in one layer
  size_t chunk_bytes = 256 << 10;
  int64_t step_timeout_ms = 60'000;   // of every wait for another rank
  int64_t read_patience_ms = 10'000;  // a checkpoint that cannot be read is tried again so long
  // How long to wait for the leader's word when a step cannot go on, or a group is forming.
  int64_t halt_timeout_ms = 60'000;
  int64_t verify_period_ms = 0;  // read all parameters again so often (verifier.h); 0: when asked
  int64_t alive_period_ms = 0;   // tell the leader so often that this rank lives; 0: never
  const TraceRecorder* recorder = nullptr;  // leader: says whether ids are wanted; may be null
};

// What the engine's decoder asks of the MoE layers.
MoeLayers::Options MoeOptionsOf(const EngineOptions& options, const ModelConfig& config);

// One rank of the server: runs steps in lock-step with the other ranks until told to stop
// (design section 2.1). All communication of the data path happens on the thread that calls Run.
//
// When the leader says that other ranks are to serve, the step under way is abandoned, and the rank
// goes on as a member of the new group, or waits until it is one again. Its sequences do not
// notice: what an abandoned step would have computed is computed again.
class Engine {
 public:
  // Loads the parameters that `initial` gives to this rank. All ranks of `transport` are members.
  // COLLECTIVE on devices, at its begin (Backend::MakeBlocks).
  // `channel` leads to the leader's front end; rank 0's own engine has one too. `checkpoint`,
  // `backend`, `transport`, `channel` and `observer` must live longer than the engine.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options,
                                                        const Checkpoint& checkpoint,
                                                        Backend* backend, const Placement& initial,
                                                        Transport* transport,
                                                        ControlChannel* channel,
                                                        EngineObserver* observer);
  ~Engine();

  // The members take up with each other, and tell each other what they know the experts by: from
  // then on none of them takes in anything else, from wherever it comes. Every generation begins
  // with it. COLLECTIVE.
  // ERRORS kDataLoss: two of them read different checkpoints; those of AllGather and of
  //        MoeLayers::Connect
  absl::Status ShareChecksums();

  // Steps until the leader says stop. COLLECTIVE.
  // ERRORS kUnavailable, kDeadlineExceeded: the leader is lost, or a rank and the leader has not
  //        said how to go on; kInternal: this rank can no longer be trusted
  absl::Status Run();

  const ExpertStore& store() const { return *store_; }
  // What it has allocated, as PlanMemory counts; after a regrouping it may be more.
  MemoryPlan memory() const;
  // After Run: whether all ranks of the job have come to its end.
  bool complete() const { return stopping_ == StopKind::kComplete; }

 private:
  Engine(const EngineOptions& options, const Checkpoint& checkpoint, Backend* backend,
         Transport* transport, ControlChannel* channel, EngineObserver* observer);
  absl::Status MakeStore(const Placement& initial);
  absl::Status LoadMissing(const Placement& placement);
  absl::Status ReadExpert(int32_t layer, int32_t expert);
  absl::Status ReadExpertPatiently(int32_t layer, int32_t expert);
  absl::Status JoinGroup(Group group, int64_t last_step);
  absl::Status Connect();

  absl::Status RunSteps();    // until told to stop, or to halt (kAborted)
  absl::Status TakeFrames();  // off the channel, into the inbox
  absl::Status ReadFrames();
  absl::Status Open(const Batch& batch);  // exchanges the headers and does what the leader says
  absl::Status RunStep(const Batch& batch);
  absl::Status Rest();  // nobody has tokens
  absl::Status SendEvents();
  absl::Status CaptureIds(int32_t num_tokens);
  absl::Status SendIds();  // of the step, where the leader records them
  void Report();           // the step before, now that all CPU times are known
  void CountSent();        // what this rank sent since it was last counted, into the record
  void ShowLoad();
  void TellAlive();  // on a thread of its own, until the end

  // Verification (engine_verify.cc).
  absl::Status Verify();
  absl::Status MendUnfit();
  absl::Status Idle();

  // Regrouping (engine_group.cc).
  absl::Status TellTrouble(const absl::Status& why);
  absl::Status Regroup();  // until this rank serves again, or all stop
  absl::StatusOr<LeaderFrame> NextGroupFrame(bool patient);
  absl::Status ReportHalted(const HaltFrame& frame);
  absl::Status Resume(const ResumeFrame& frame, Group group);
  void Park();

  const EngineOptions options_;
  const Checkpoint& checkpoint_;
  Backend* const backend_;
  Transport* const base_transport_;
  ControlChannel* const channel_;
  EngineObserver* const observer_;
  // Of one generation of the group.
  Group group_;
  std::unique_ptr<MemberTransport> transport_;
  std::vector<bool> on_this_node_;  // [R]
  std::unique_ptr<Communicator> comm_;
  bool connected_ = false;  // the members have taken up with each other
  std::unique_ptr<StepProtocol> protocol_;
  StepProtocol::Opening opening_;
  std::vector<StepHeader> headers_;   // [R] of this step
  std::vector<int32_t> rank_tokens_;  // [R] of them
  std::unique_ptr<IdsCapture> capture_;

  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ExpertStore> store_;
  absl::Status used_;  // whether the placement in force could be put to use
  std::unique_ptr<Rebalancer> rebalancer_;
  std::unique_ptr<Verifier> verifier_;
  uint64_t verify_id_ = 0;           // of the check that the leader asked for last
  std::vector<VerifiedCopy> unfit_;  // copies that are wrong in memory; no step runs on them

  std::deque<LeaderFrame> inbox_;        // taken off the channel, not yet read
  std::deque<LeaderFrame> group_inbox_;  // of these, what concerns the group: it goes first
  std::vector<TokenEvent> events_;
  uint64_t wake_seq_ = 0;                // of the last frame read
  StopKind stop_ = StopKind::kNone;      // told to stop
  StopKind stopping_ = StopKind::kNone;  // the leader's header says so: all leave now
  int64_t last_cpu_us_ = 0;
  bool record_open_ = false;
  StepRecord record_;
  int32_t copies_committed_ = 0;
  int64_t stall_ns_ = 0;
  int64_t halted_ns_ = 0;          // when the regrouping under way began
  int64_t committed_plan_id_ = 0;  // Regrouping
  std::atomic<bool> ended_ = false;
  std::atomic<int32_t> running_ = 0, waiting_ = 0;
  std::atomic<int64_t> kv_bytes_used_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_ENGINE_H_
