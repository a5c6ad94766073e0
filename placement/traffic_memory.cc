#include "placement/traffic_memory.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace ballast {
namespace {

// How fast the means follow: the two of each kind, and that of all batches.
// SOURCE all constants: see regret.cc
constexpr float kFasterRate = 0.4f, kSlowerRate = 0.12f, kSlowRate = 0.02f;
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

// Total-variation distance of the batch from its kind's faster mean, against what it usually is.
bool TrafficMemory::Changed(std::span<const float> load, TokenKind kind) {
  OfKind& of = kinds_[kind];
  if (of.since_change == 0) return true;
  const int mean = means_of(kind);
  float distance = 0.0f;
  for (size_t e = 0; e < load.size(); ++e) distance += std::abs(load[e] - scenarios_[e][mean]);
  distance /= 2.0f * static_cast<float>(num_ranks_);
  if (of.usual_distance >= 0.0f && distance > kChangeFactor * of.usual_distance) {
    // Right after a change this is a change too, but its distance is learnt as usual: batches may
    // only be noisier than they were.
    if (of.since_change == 1) of.usual_distance += kDistanceRate * (distance - of.usual_distance);
    return true;
  }
  of.usual_distance = of.usual_distance < 0.0f
                          ? distance
                          : of.usual_distance + kDistanceRate * (distance - of.usual_distance);
  return false;
}

// Takes the batch into the means.
void TrafficMemory::Follow(TokenKind kind, bool changed) {
  const int means = means_of(kind);
  for (size_t e = 0; e < load_.size(); ++e) {
    const auto follow = [&](int lane, float rate) {
      scenarios_[e][lane] += rate * (load_[e] - scenarios_[e][lane]);
    };
    follow(kLastBatch, 1.0f);
    follow(means, changed ? 1.0f : kFasterRate);
    follow(means + 1, changed ? 1.0f : kSlowerRate);
    follow(kSlowMean, kSlowRate);
  }
}

// Takes the batch into the history.
void TrafficMemory::Remember(TokenKind kind, float weight) {
  newest_ = (newest_ + kLanes - 1) % kLanes;
  num_batches_ = std::min(num_batches_ + 1, kLanes);
  for (size_t e = 0; e < load_.size(); ++e) history_[e][newest_] = load_[e];
  kind_of_[newest_] = kind;
  batch_weight_[newest_] = weight;
  float of_first = 0.0f, of_all = 0.0f;
  for (int age = 0; age < num_batches_; ++age) {
    const int lane = lane_of(age);
    of_all += batch_weight_[lane];
    if (kind_of_[lane] == first_kind_) of_first += batch_weight_[lane];
  }
  first_share_ = of_first / of_all;
}

// Fills the lanes of single batches and weighs all.
void TrafficMemory::PickScenarios() {
  const bool both =
      kinds_[TokenKind::kPrefill].since_change > 0 && kinds_[TokenKind::kDecode].since_change > 0;
  weights_ = Lanes{};
  weights_[kLastBatch] = last_batch_weight_ * batch_weight_[newest_];
  weights_[kSlowMean] = 1.0f;
  for (int m = 0; m < 2; ++m) {
    weights_[kFirstMeans + m] = first_share_;
    if (both) weights_[kOtherMeans + m] = 1.0f - first_share_;
  }
  float weight = kBatchWeight;
  const int end = both ? kOtherMeans : kLanes;
  for (int scenario = kFirstBatch, age = 1; scenario < end; ++scenario, ++age) {
    const int lane = lane_of(age);
    const bool speaks = age < num_batches_ && age <= kinds_[kind_of_[lane]].change_age;
    for (size_t e = 0; e < load_.size(); ++e) {
      scenarios_[e][scenario] = speaks ? history_[e][lane] : 0.0f;
    }
    if (speaks) weights_[scenario] = weight * batch_weight_[lane];
    weight *= kBatchDecay;
  }
  weights_ *= 1.0f / Sum(weights_);
}

void TrafficMemory::Add(std::span<const int32_t> counts, TokenKind kind, float weight) {
  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  BALLAST_CHECK(total > 0 && counts.size() == load_.size() && weight > 0.0f);
  const float scale = static_cast<float>(num_ranks_) / static_cast<float>(total);
  for (size_t e = 0; e < counts.size(); ++e) load_[e] = static_cast<float>(counts[e]) * scale;

  if (num_batches_ == 0) first_kind_ = kind;
  const bool changed = Changed(load_, kind);
  Follow(kind, changed);
  for (OfKind& of : kinds_) of.change_age = std::min(of.change_age + 1, kLanes);
  if (changed) kinds_[kind].change_age = 0;
  kinds_[kind].since_change = changed ? 1 : kinds_[kind].since_change + 1;
  Remember(kind, weight);
  PickScenarios();
}

}  // namespace ballast
