#ifndef BALLAST_MONITOR_METRICS_H_
#define BALLAST_MONITOR_METRICS_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// What the info metrics say about this rank; all of it is known before the first step.
struct RankMetricsOptions {
  int32_t rank = 0;
  std::string node;     // name of the machine
  std::string backend;  // "cpu" or "cuda"
  std::string version;
  std::string commit;
  std::string model;       // name of the model
  int32_t num_layers = 0;  // MoE layers
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t num_ranks = 1;  // of the job
};

// One finished step of this rank.
struct LinkBytes {
  int64_t steps = 0, experts = 0;  // sent for steps, and of experts' parameters
};

struct StepSample {
  int64_t prefill_tokens = 0;  // of this rank's sequences
  int64_t decode_tokens = 0;
  std::span<const int64_t> layer_copies;  // [num_layers] copies that this rank's experts computed
  double seconds = 0.0;                   // length of the step
  double stall_seconds = 0.0;             // of it, waited for a flip or spent on a migration slice
  LinkBytes to_node, to_network;          // to ranks of the same node, of others
};

enum class CopyResult { kApplied, kFailed };
enum class RebalanceResult { kApplied, kAborted, kRejected, kOverBudget };
enum class RebalanceTrigger { kThreshold, kInterval, kManual, kFailure };
enum class RequestResult { kOk, kRejected, kCancelled, kFailed };

// What verification may find wrong.
enum class VerifyFailure { kParameters, kReplicaChoice, kPlacement, kCheckpoint };

struct HotExpert {
  int32_t layer;
  int32_t expert;
  double share;  // of the layer's copies in the window, in [0, 1]
};

// The metrics of one rank, named in docs/metrics.md. Every handle is resolved and every bounded
// combination of labels exists, at 0, once Create returns; an update neither allocates nor takes a
// lock of ours.
//
// THREADS any; meant to be called once per step or per event, never per token.
class RankMetrics {
 public:
  // ERRORS kInvalidArgument when the metrics library refuses a name or a label
  static absl::StatusOr<std::unique_ptr<RankMetrics>> Create(const RankMetricsOptions& options);
  ~RankMetrics();

  // REQUIRES sample.layer_copies has num_layers entries.
  void OnStep(const StepSample& sample);
  // SHAPES ratio [num_layers] largest over mean rank load of the last window
  void SetImbalance(std::span<const double> ratio);
  void SetPlacementEpoch(int64_t epoch);
  // Copies of experts that entered this rank, and their bytes.
  void OnExpertCopies(CopyResult result, int64_t copies, int64_t bytes);
  void OnRebalance(RebalanceResult result, RebalanceTrigger trigger);
  // The hottest experts, on the leader only; replaces the table of the last call.
  void SetHotExperts(std::vector<HotExpert> experts);

  // The ranks have regrouped: experts that were read from the checkpoint, and how long this rank
  // ran no step.
  void OnRegrouped(int64_t reloads, double pause_seconds);
  // Whether this rank serves; it does from the start.
  void SetServing(bool serves);
  // On the leader only: ranks that serve, requests that went on at another rank since the last
  // call, and for each rank of the job how many experts of all layers it alone holds.
  void SetRanksServing(int64_t ranks);
  void OnRequestsMoved(int64_t requests);
  void SetLastCopies(std::span<const int64_t> last_copies);

  // Experts whose parameters were read again, and what was found wrong, since the last call.
  void OnCopiesVerified(int64_t copies);
  void OnVerifyFailures(VerifyFailure kind, int64_t failures);

  // On the leader only: the controller was given up for working on one thing for too long; the
  // state file was written, or could not be.
  void OnControllerStalled();
  void OnStateWritten(bool ok);

  void OnRequest(RequestResult result);
  void OnTokensGenerated(int64_t tokens);
  void SetQueueDepth(int64_t requests);
  void SetSequencesRunning(int64_t sequences);
  void SetKvBytesUsed(int64_t bytes);

  // All metrics in the Prometheus text format 0.0.4.
  // ERRORS kInternal when the metrics library throws
  absl::StatusOr<std::string> Render() const;

 private:
  struct State;
  explicit RankMetrics(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_MONITOR_METRICS_H_
