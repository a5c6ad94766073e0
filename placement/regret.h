#ifndef BALLAST_PLACEMENT_REGRET_H_
#define BALLAST_PLACEMENT_REGRET_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "placement/policy.h"
#include "placement/row_search.h"
#include "placement/traffic_memory.h"

namespace ballast {

// The incremental planner: few copies, each paid for by what was lost without it.
//
// It looks for a better row that brings no rank more than one copy (row_search.h) and accepts it by
// ski rental: the regret of not having had it is summed over the last batches, newest first, and
// the largest sum must reach what the transfer costs on the busiest rank,
//
//   max over n of sum over the last n batches (1 + lambda(k) / n(k)) * w * (T in force - T after)
//       >=  theta * rho * copies
//
// with T the largest rank load over the mean, w the weight of the batch, k its kind of token, and
// n(k) how many of the n batches are of that kind. Then a second copy per rank is tried on top, and
// so on, while the regret pays for it. theta > 1: part of what would have helped is hindsight.
// lambda is 0 but for the first batches after a change of traffic of that kind: they speak for some
// more of their sort.
//
// Where the rules ask for coverage, the hot experts (rules.h), by what they have carried for long,
// get a second rank first, whatever that costs, and no change takes it away.
class RegretPlanner : public LayerPlanner {
 public:
  RegretPlanner(const PolicyContext& context, std::span<const int32_t> row);

  void OnBatch(std::span<const int32_t> counts, TokenKind kind, float weight) override;
  std::optional<std::vector<int32_t>> Plan(const Input& input) override;
  void Adopt(std::span<const int32_t> row) override;

 private:
  bool Cover();
  float Regret(const Lanes& before, const Lanes& after) const;

  const double rho_;
  const int32_t num_covered_;  // experts that must have a second rank
  TrafficMemory memory_;
  RowSearch search_;
  Lanes history_in_force_ = {};  // T of each batch of the history under the row in force
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_REGRET_H_
