#ifndef BALLAST_PLACEMENT_REGRET_H_
#define BALLAST_PLACEMENT_REGRET_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "placement/policy.h"
#include "placement/traffic_memory.h"
#include "placement/water_fill.h"

namespace ballast {

// The incremental planner: few copies, each paid for by what was lost without it.
//
// Search. From the placement in force, the best single change at a time: an expert copied onto a
// rank in place of a redundant copy or into an empty slot, or two experts of two ranks exchanged.
// Candidates are ranked by a first-order estimate, the best of them evaluated by water-filling all
// scenarios of the traffic memory. No rank receives more than `level` copies.
//
//   objective = sum over scenarios of weight * (largest load + 8-power mean of the loads) / 2
//
// Acceptance (ski rental). The regret of not having made the changes is summed over the last
// batches, newest first; the largest sum over such a suffix must reach what the transfer costs on
// the busiest rank:
//
//   max over n of sum over the last n batches (T in force - T after)  >=  theta * rho * copies
//
// with T the largest rank load over the mean. Then level 2 is tried on top, and so on, while the
// regret pays for it.
class RegretPlanner : public LayerPlanner {
 public:
  RegretPlanner(const Topology& topology, int32_t num_experts, std::span<const int32_t> row,
                double rho);

  void OnBatch(std::span<const int32_t> counts) override;
  std::optional<std::vector<int32_t>> Plan(const Input& input) override;
  void Adopt(std::span<const int32_t> row) override;

 private:
  // Expert `expert` comes to slot `slot`. `from_slot` >= 0: its copy there is exchanged for what
  // `slot` held.
  struct Change {
    int32_t expert, slot, from_slot;
    float estimate;  // of the gain per copy
    int32_t copies() const { return from_slot < 0 ? 1 : 2; }
  };

  void SetRow(std::span<const int32_t> row);
  void SortShared();
  void FillInForce();
  Lanes LargestLoads(const std::vector<Lanes>& demand);
  float Objective(std::span<const Lanes> load) const;
  float Evaluate(const Change& change);
  void Apply(const Change& change);
  Lanes FlowAt(int32_t expert, int32_t rank) const;
  void PriceRanks();
  void CollectCandidates(int32_t level);
  void CollectCopies(int32_t slot);
  void CollectExchanges(int32_t slot, int32_t level);
  int32_t Search(int32_t level, float least_gain);
  float LargestSuffix(const Lanes& before, const Lanes& after) const;
  double Threshold() const;

  const int32_t num_experts_, num_ranks_;
  std::vector<int32_t> slot_offsets_, rank_of_slot_;
  const double rho_;
  TrafficMemory memory_;
  Lanes history_in_force_ = {};          // T of each batch of the history under the row in force

  std::vector<int32_t> row_;             // the placement being worked on
  std::vector<RankList> ranks_of_;       // [E]
  std::vector<int32_t> shared_;          // experts on several ranks, largest first
  std::vector<int32_t> shared_index_;    // [E] place in shared_, or -1
  std::vector<int32_t> flow_offsets_;    // per shared expert, into flows_
  std::vector<Lanes> flows_;             // of the placement being worked on
  std::vector<Lanes> fixed_load_, load_, price_;  // [R]; fixed: of experts on one rank
  std::vector<float> total_price_;       // [R]
  std::vector<int32_t> received_;        // [R] copies of the plan so far
  std::vector<Change> candidates_;
  std::vector<Lanes> trial_load_, trial_flows_;
  std::vector<SharedExpert> trial_;
};

std::unique_ptr<Policy> MakeRegretPolicy();

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_REGRET_H_
