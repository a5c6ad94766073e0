#include "placement/traffic_memory.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace ballast {
namespace {

// How fast the means follow. The first is the last batch itself.
// SOURCE all constants: see regret.cc
constexpr float kRates[] = {1.0f, 0.4f, 0.12f, 0.02f};
constexpr int kSlowMean = 3;
// Weight of the batch before the last one, and how it falls with age.
constexpr float kBatchWeight = 0.3f, kBatchDecay = 0.8f;
// The traffic has changed when a batch is this many times further from the mean than batches are.
constexpr float kChangeFactor = 1.8f;
constexpr float kDistanceRate = 0.2f;

}  // namespace

TrafficMemory::TrafficMemory(int32_t num_experts, int32_t num_ranks, float last_batch_weight)
    : num_ranks_(num_ranks),
      last_batch_weight_(last_batch_weight),
      scenarios_(static_cast<size_t>(num_experts),
                 Splat(static_cast<float>(num_ranks) / static_cast<float>(num_experts))),
      history_(static_cast<size_t>(num_experts)),
      load_(static_cast<size_t>(num_experts)) {}

// Total-variation distance of the batch from the second mean, against what it usually is.
bool TrafficMemory::Changed(std::span<const float> load) {
  float distance = 0.0f;
  for (size_t e = 0; e < load.size(); ++e) distance += std::abs(load[e] - scenarios_[e][1]);
  distance /= 2.0f * static_cast<float>(num_ranks_);
  if (num_batches_ == 0) return true;
  if (usual_distance_ >= 0.0f && distance > kChangeFactor * usual_distance_) {
    // A change right after a change is no change: batches are noisier than they were.
    if (since_change_ == 1) usual_distance_ += kDistanceRate * (distance - usual_distance_);
    return true;
  }
  usual_distance_ = usual_distance_ < 0.0f
                        ? distance
                        : usual_distance_ + kDistanceRate * (distance - usual_distance_);
  return false;
}

void TrafficMemory::Add(std::span<const int32_t> counts) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  BALLAST_CHECK(total > 0 && counts.size() == load_.size());
  const float scale = static_cast<float>(num_ranks_) / static_cast<float>(total);
  for (size_t e = 0; e < counts.size(); ++e) load_[e] = static_cast<float>(counts[e]) * scale;

  const bool changed = Changed(load_);
  for (size_t e = 0; e < load_.size(); ++e) {
    for (int m = 0; m < kNumMeans; ++m) {
      const bool restart = changed && m != kSlowMean;
      scenarios_[e][m] += (restart ? 1.0f : kRates[m]) * (load_[e] - scenarios_[e][m]);
    }
  }
  since_change_ = changed ? 1 : since_change_ + 1;
  newest_ = (newest_ + kLanes - 1) % kLanes;
  num_batches_ = std::min(num_batches_ + 1, kLanes);
  for (size_t e = 0; e < load_.size(); ++e) history_[e][newest_] = load_[e];

  weights_ = Lanes{};
  for (int m = 0; m < kNumMeans; ++m) weights_[m] = m == 0 ? last_batch_weight_ : 1.0f;
  const int batches = std::min({kLanes - kNumMeans, since_change_ - 1, num_batches_ - 1});
  float weight = kBatchWeight;
  for (int k = 0; k < kLanes - kNumMeans; ++k) {
    const int lane = lane_of(k + 1);
    for (size_t e = 0; e < load_.size(); ++e) {
      scenarios_[e][kNumMeans + k] = k < batches ? history_[e][lane] : 0.0f;
    }
    if (k < batches) weights_[kNumMeans + k] = weight;
    weight *= kBatchDecay;
  }
  weights_ *= 1.0f / Sum(weights_);
}

}  // namespace ballast
