#ifndef BALLAST_TESTS_SUPPORT_CLUSTER_H_
#define BALLAST_TESTS_SUPPORT_CLUSTER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/control_channel.h"
#include "comm/transport.h"
#include "monitor/metrics.h"
#include "runtime/engine.h"
#include "runtime/frontend.h"
#include "runtime/leader.h"
#include "runtime/verification.h"

namespace ballast::testing {

struct ClusterOptions {
  std::string model;  // checkpoint folder
  int num_ranks = 1;
  int num_nodes = 1;           // equal blocks of ranks
  int32_t slots_per_rank = 0;  // 0: what the experts need and two more
  DType dtype = DType::kF32;
  const KernelSet* kernels = nullptr;  // nullptr: plain
  std::string policy = "eplb";
  SplitMode split = SplitMode::kExact;
  int32_t rebalance_every = 0;
  int64_t window_tokens = 256;
  double min_gain = 0.02;
  int32_t prefill_chunk = 128, max_seqs = 64, max_batch_tokens = 512;
  int64_t kv_bytes = 8 << 20;
  size_t chunk_bytes = 4 << 10;
  int64_t slice_bytes = 16 << 10;
  int64_t plan_deadline_ms = 30'000;
  // Memory for copies on their way, in experts; plans then know of no limit. 0: what they need.
  int32_t staging_experts = 0;
  int32_t backoff_steps = 256;
  bool retry_from_file = false;
  TraceRecorder* recorder = nullptr;  // of the leader; may be null
  bool survive_losses = false;
  int64_t step_timeout_ms = 60'000;
  int64_t verify_period_ms = 0;
  int64_t stall_deadline_ms = 30'000;
  std::string state_file = {};
  int64_t state_period_ms = 30'000;
  LeaderLoopOptions::MakeController make_controller = {};
};

// What came back of one request.
struct Reply {
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::kNone;
  bool operator==(const Reply&) const = default;
};

// A whole server in one process: the ranks are threads. Stopped by the destructor at the latest.
class Cluster {
 public:
  static absl::StatusOr<std::unique_ptr<Cluster>> Start(const ClusterOptions& options);
  ~Cluster();

  // Submits all requests at once and waits for all replies, in order of the requests.
  absl::StatusOr<std::vector<Reply>> Generate(std::vector<GenerationRequest> requests);

  // The rank dies, as by a signal: after so many more messages that it posts (-1: now), and without
  // a word. It may not be rank 0.
  void Kill(int rank, int64_t after_messages = -1);
  // Of copies of experts that the rank sends from now on, the next `chunks` arrive with one bit
  // changed, or never.
  void CorruptCopies(int rank, int chunks);
  void LoseCopies(int rank, int chunks);
  // Every message that the rank sends takes so much longer.
  void SlowDown(int rank, int64_t us_per_message);
  // Waits until `count` ranks serve, under a group of their own.
  bool AwaitMembers(size_t count);

  // Drains, stops and joins. What the ranks' step loops returned.
  std::vector<absl::Status> Stop();

  Frontend& frontend() { return *frontend_; }
  Leader& leader() { return *leader_; }
  // GET /v1/verify.
  absl::StatusOr<std::string> Verify() { return verification_->Run(); }
  std::string Metrics() const { return metrics_->Render().value_or(""); }  // of rank 0
  // Of the placement in force on rank 0, and copies that plans in force have made so far.
  int64_t epoch() const { return epoch_; }
  int64_t copies() const { return copies_; }
  int64_t flips() const { return flips_; }
  int64_t aborts() const { return aborts_; }
  int64_t steps() const { return steps_; }
  // Regroupings that rank 0 has been through, and experts that they read from the checkpoint.
  int64_t regroupings() const { return regroupings_; }
  int64_t reloads() const { return reloads_; }
  // Bytes of messages that rank 0 had posted when it reported its last step, counted outside of it.
  SentBytes sent_to(int rank) const { return sent_to_[static_cast<size_t>(rank)]; }
  // REQUIRES stopped
  const ExpertStore& store(int rank) const;
  MemoryPlan memory(int rank) const;
  // Of all ranks in all steps.
  int64_t prefill_tokens() const { return prefill_tokens_; }
  int64_t decode_tokens() const { return decode_tokens_; }

 private:
  struct Rank;
  struct Counter;
  Cluster() = default;
  absl::Status Prepare(const ClusterOptions& options);
  absl::Status StartLeader(const ClusterOptions& options, const Placement& placement);
  absl::Status MakeEngines(const ClusterOptions& options, const Placement& placement);

  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LocalFabric> fabric_;
  std::unique_ptr<RankMetrics> metrics_;
  std::unique_ptr<Verification> verification_;
  std::unique_ptr<Frontend> frontend_;
  std::unique_ptr<Leader> leader_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::thread> threads_;
  std::atomic<int64_t> epoch_ = 0, copies_ = 0, flips_ = 0, aborts_ = 0, steps_ = 0;
  std::atomic<int64_t> regroupings_ = 0, reloads_ = 0;
  std::atomic<size_t> num_members_ = 0;
  std::atomic<int64_t> prefill_tokens_ = 0, decode_tokens_ = 0;
  std::vector<SentBytes> sent_to_;  // [ranks]
};

// `count` prompts of different lengths, random from the seed; request i samples with seed i.
std::vector<GenerationRequest> RandomRequests(int count, int32_t vocab, int32_t longest_prompt,
                                              int32_t max_tokens, double temperature,
                                              uint64_t seed);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_CLUSTER_H_
