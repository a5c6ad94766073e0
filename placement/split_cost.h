#ifndef BALLAST_PLACEMENT_SPLIT_COST_H_
#define BALLAST_PLACEMENT_SPLIT_COST_H_

#include <cstdint>
#include <span>
#include <vector>

#include "base/layer_hosts.h"
#include "placement/cost_model.h"
#include "placement/split_exact.h"

namespace ballast {

// Divides the rows of each expert over its hosts so that the slowest rank is predicted to take
// little time: right at every batch size. Deterministic, in integers and without memory. Owns its
// scratch; allocates only while growing.
//
//   minimise  max_r time[r] of CostModel
//   subject to  sum over hosts h of e of quota[h] = demand[e], quota in whole rows
//
// With many rows this is the exact split, with speeds too. With few, a host that is active anyway
// takes more rows for nothing, and every active host costs a read of its parameters: rows are
// concentrated. To find the least is NP-hard (whole reads are items to be packed), so this is a
// search: never worse than the better of the exact split and of RunActivated, from which it starts.
//
// ORDER   ranks above the target by rank, hosts by id
// THREADS one thread at a time
class CostSplitter {
 public:
  // `hosts` is copied. REQUIRES every expert has a host; constants as CostModel (checked)
  CostSplitter(const LayerHosts& hosts, const CostConstants& constants);

  // SHAPES demand [E], >= 0
  // REQUIRES all demand together is below 2^31 (checked)
  void Run(std::span<const int32_t> demand, Split* split);

  // All rows of an expert on one host, chosen so that the slowest rank takes little time. While
  // reads dominate this balances the number of active experts.
  // SOURCE the objective: METRO; the search: augmenting paths, exact while all reads cost the same
  void RunActivated(std::span<const int32_t> demand, Split* split);

  const CostModel& model() const { return model_; }

 private:
  void Start(std::span<const int32_t> quota);
  void AssignWhole(std::span<const int32_t> demand);
  void Improve();
  bool Reach(int64_t target);
  void Relieve(int32_t rank, int64_t target);
  void GiveDirectly(int32_t host, int64_t target);
  void GiveThrough(int32_t host, int64_t target);
  void GiveTo(bool active, int32_t host, int64_t target, int64_t* rows);
  void Move(int32_t from, int32_t to, int64_t rows);
  bool MayTake(int32_t to, int32_t from) const;
  int64_t Surplus(int32_t host, int64_t target) const;
  int64_t Room(int32_t host, int64_t target) const;
  int64_t LowerBound() const;
  int64_t LargestTime() const { return *std::max_element(time_.begin(), time_.end()); }
  void Finish(Split* split);

  CostModel model_;
  ExactSplitter exact_;

  // The placement, compiled.
  int32_t num_experts_, num_ranks_;
  std::vector<int32_t> host_offsets_, host_rank_;
  std::vector<int32_t> expert_of_host_;        // [num_hosts]
  std::vector<int32_t> edge_offsets_, edges_;  // per rank: hosts on it of experts with several

  // The search.
  bool whole_ = false;               // whether an expert's rows stay together
  std::vector<int32_t> quota_;       // [num_hosts] of the attempt
  std::vector<int64_t> time_;        // [R] of the attempt, in ticks
  std::vector<int32_t> best_quota_;  // of the best attempt so far
  std::vector<int64_t> best_time_;
  std::vector<int32_t> exact_quota_;
  std::vector<uint8_t> visited_;  // [R]
  std::vector<uint64_t> order_;   // [E] largest demand first: (~demand, expert)
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_SPLIT_COST_H_
