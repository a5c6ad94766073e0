#include "runtime/rank_observer.h"

namespace ballast {

RankObserver::RankObserver(int32_t rank, int32_t num_ranks, int32_t num_layers,
                           RankMetrics* metrics)
    : rank_(rank),
      metrics_(metrics),
      window_(num_layers, num_ranks),
      layer_copies_(static_cast<size_t>(num_layers)) {}

void RankObserver::OnStep(const StepRecord& record) {
  for (size_t layer = 0; layer < record.layers.size(); ++layer) {
    layer_copies_[layer] = record.layers[layer].rank_load[rank_];
    window_.Add(static_cast<int32_t>(layer), record.layers[layer].rank_load);
  }
  if (window_.EndStep(record.all_tokens())) metrics_->SetImbalance(window_.imbalance());
  metrics_->OnStep({.prefill_tokens = record.own_prefill_tokens,
                    .decode_tokens = record.own_decode_tokens,
                    .layer_copies = layer_copies_,
                    .seconds = static_cast<double>(record.wall_us) * 1e-6,
                    .stall_seconds = static_cast<double>(record.stall_us) * 1e-6,
                    .to_node = {record.to_node.steps, record.to_node.experts},
                    .to_network = {record.to_network.steps, record.to_network.experts}});
  metrics_->OnTokensGenerated(record.tokens_generated);
  OnRest(record.running, record.waiting, record.kv_bytes_used);
}

void RankObserver::OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) {
  metrics_->SetSequencesRunning(running);
  metrics_->SetQueueDepth(waiting);
  metrics_->SetKvBytesUsed(kv_bytes_used);
}

void RankObserver::OnVerified(const Verified& verified) {
  metrics_->OnCopiesVerified(verified.copies);
  metrics_->OnVerifyFailures(VerifyFailure::kParameters, verified.corrupted);
  metrics_->OnVerifyFailures(VerifyFailure::kReplicaChoice, verified.dissenters);
  metrics_->OnVerifyFailures(VerifyFailure::kPlacement, verified.unsound);
  metrics_->OnVerifyFailures(VerifyFailure::kCheckpoint, verified.unreadable);
}

void RankObserver::OnParked() {
  OnRest(0, 0, 0);
  metrics_->SetServing(false);
}

void RankObserver::OnRegrouped(const Regrouping& regrouping, const Placement& in_force) {
  rank_ = regrouping.group.member;
  window_ = LoadWindow(in_force.num_layers(), in_force.topology().num_ranks());
  metrics_->SetPlacementEpoch(in_force.epoch());
  metrics_->SetServing(true);
  metrics_->OnRegrouped(regrouping.reloads, static_cast<double>(regrouping.pause_ns) * 1e-9);
}

void RankObserver::OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) {
  metrics_->SetPlacementEpoch(in_force.epoch());
  const bool applied = outcome.done == Command::kFlip;
  metrics_->OnExpertCopies(applied ? CopyResult::kApplied : CopyResult::kFailed, outcome.own_copies,
                           applied ? outcome.own_bytes : 0);
}

}  // namespace ballast
