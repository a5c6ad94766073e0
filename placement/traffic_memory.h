#ifndef BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_
#define BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "placement/lanes.h"
#include "placement/step_counts.h"

namespace ballast {

// What a planner remembers of one layer's traffic: the last batches as they were, means of several
// speeds, and when the traffic last changed. Loads are scaled so that a perfectly balanced rank
// would have load 1: a vector sums to the number of ranks.
//
// A batch holds tokens of one kind, and every kind has means and a usual noise of its own: that
// prompts and generation alternate is no change of traffic. To be good at each kind is enough,
//
//   T(a + b) <= T(a) + T(b)    T: the largest rank load under the exact split
//
// since dividing a and b each in its best way is one way to divide their sum: a row that is within
// a factor of balance for each is within it for every mix of them. With traffic of one kind the
// other has no part in anything.
class TrafficMemory {
 public:
  // `last_batch_weight` is how much the last batch counts as a scenario, against 1 of each mean.
  TrafficMemory(int32_t num_experts, int32_t num_ranks, float last_batch_weight);

  // SHAPES counts [E], not all zero   weight: of the batch (policy.h), in (0, 1]
  void Add(std::span<const int32_t> counts, TokenKind kind, float weight = 1.0f);

  // Scenarios that a placement should be good at, and how much each counts (they sum to 1): the
  // last batch, means at two speeds, and a slow one over all batches, then up to twelve of the
  // batches before, newest first, as far back as their kind's traffic has not changed. The slow
  // mean begins with equal loads and never forgets at once: it is the hedge for traffic to come.
  // Where both kinds have been seen the other one's two means take the places of the two oldest
  // batches, and the means of a kind count by its share of the history. Batches, the last one
  // included, count by their weight.
  const std::vector<Lanes>& scenarios() const { return scenarios_; }  // [E]
  const Lanes& weights() const { return weights_; }

  // The last sixteen batches of any kind, one per lane.
  const std::vector<Lanes>& history() const { return history_; }  // [E]
  // The lane of the batch that is `age` batches old. REQUIRES age < num_batches().
  int lane_of(int age) const { return (newest_ + age) % kLanes; }
  int num_batches() const { return num_batches_; }  // in the history, at most sixteen
  TokenKind kind_of(int lane) const { return kind_of_[lane]; }
  float batch_weight(int lane) const { return batch_weight_[lane]; }

  // Mean of a speed at which single batches still show, of the kinds by their shares, for ordering
  // experts by size.
  float typical_load(int32_t expert) const {
    const Lanes& of = scenarios_[expert];
    return first_share_ * of[kFirstMeans] + (1.0f - first_share_) * of[kOtherMeans];
  }
  // The slow mean: what the expert has carried for long.
  float lasting_load(int32_t expert) const { return scenarios_[expert][kSlowMean]; }
  // Batches of the kind since its traffic changed, the first one after the change included; 0: it
  // was never seen. The first batch of a kind is a change.
  int batches_since_change(TokenKind kind) const { return kinds_[kind].since_change; }

 private:
  // Lanes of the scenarios. Means of a kind: the faster, then the slower.
  static constexpr int kLastBatch = 0, kFirstMeans = 1, kSlowMean = 3, kFirstBatch = 4;
  static constexpr int kOtherMeans = kLanes - 2;

  struct OfKind {
    float usual_distance = -1.0f;  // running average of a batch's distance from the mean; -1: none
    int since_change = 0;          // batches of the kind since its last change, that one included
    int change_age = 0;            // batches of any kind since its last change, at most sixteen
  };

  int means_of(TokenKind kind) const { return kind == first_kind_ ? kFirstMeans : kOtherMeans; }
  bool Changed(std::span<const float> load, TokenKind kind);
  void Follow(TokenKind kind, bool changed);
  void Remember(TokenKind kind, float weight);
  void PickScenarios();

  int32_t num_ranks_;
  float last_batch_weight_;
  std::vector<Lanes> scenarios_, history_;
  Lanes weights_ = {};
  std::vector<float> load_;  // the batch being added
  PerKind<OfKind> kinds_ = {};
  TokenKind first_kind_ = TokenKind::kPrefill;  // that was seen
  float first_share_ = 1.0f;                    // of the history, by weight
  std::array<TokenKind, kLanes> kind_of_ = {};  // of each batch of the history
  Lanes batch_weight_ = {};
  int newest_ = 0;
  int num_batches_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_
