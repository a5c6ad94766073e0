#ifndef BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_
#define BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_

#include <cstdint>
#include <span>
#include <vector>

#include "placement/lanes.h"

namespace ballast {

// What a planner remembers of one layer's traffic: the last batches as they were, means of several
// speeds, and when the traffic last changed. Loads are scaled so that a perfectly balanced rank
// would have load 1: a vector sums to the number of ranks.
class TrafficMemory {
 public:
  // `last_batch_weight` is how much the last batch counts as a scenario, against 1 of each mean.
  TrafficMemory(int32_t num_experts, int32_t num_ranks, float last_batch_weight);

  // SHAPES counts [E], not all zero
  void Add(std::span<const int32_t> counts);

  // Scenarios that a placement should be good at, and how much each counts (they sum to 1): the
  // last batch and means at three speeds, then up to twelve of the batches before, newest first.
  // The slowest mean begins with equal loads and never forgets at once: it is the hedge for traffic
  // to come.
  const std::vector<Lanes>& scenarios() const { return scenarios_; }  // [E]
  const Lanes& weights() const { return weights_; }

  // The last sixteen batches, one per lane.
  const std::vector<Lanes>& history() const { return history_; }  // [E]
  // The lane of the batch that is `age` batches old. REQUIRES age < num_batches().
  int lane_of(int age) const { return (newest_ + age) % kLanes; }
  int num_batches() const { return num_batches_; }  // in the history, at most sixteen

  // Mean of a speed at which single batches still show, for ordering experts by size.
  float typical_load(int32_t expert) const { return scenarios_[expert][1]; }
  // The slowest mean: what the expert has carried for long.
  float lasting_load(int32_t expert) const { return scenarios_[expert][kNumMeans - 1]; }
  // Batches since the traffic changed, the first one after the change included.
  int batches_since_change() const { return since_change_; }

 private:
  static constexpr int kNumMeans = 4;
  bool Changed(std::span<const float> load);

  int32_t num_ranks_;
  float last_batch_weight_;
  std::vector<Lanes> scenarios_, history_;
  Lanes weights_ = {};
  std::vector<float> load_;        // the batch being added
  float usual_distance_ = -1.0f;   // running average of a batch's distance from the mean; -1: none
  int newest_ = 0;
  int num_batches_ = 0;
  int since_change_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_TRAFFIC_MEMORY_H_
