#ifndef BALLAST_PLACEMENT_SPLIT_EXACT_H_
#define BALLAST_PLACEMENT_SPLIT_EXACT_H_

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/layer_hosts.h"

namespace ballast {

// The division of one batch over the hosts of one layer; reused from step to step.
struct Split {
  std::vector<int32_t> quota;      // [num_hosts] copies that the host takes
  std::vector<int32_t> rank_load;  // [R] copies per rank: the sum of its quotas
  int32_t largest_load = 0;        // the maximum of rank_load
  // What proves that no split of this placement does better; only of an exact split, else zero.
  int32_t bound = 0;                 // ceil(T*) = largest_load
  std::vector<uint8_t> certificate;  // [R] a rank set S with ceil(load only in S / |S|) = bound
};

// Divides the copies of each expert over its hosts so that the largest rank load is the least
// possible, and proves it. Deterministic, in integers and without memory: the same demand gives
// the same split. Owns its scratch; allocates only while growing.
// Where the copies come from has no say: starting from each rank's own copies kept 0 to 2 % more of
// the shared ones at home and made the solve 10 to 25 % slower (64 to 384 experts, 8 to 64 ranks).
//
//   minimise  max_r sum over hosts h on rank r of quota[h]
//   subject to  sum over hosts h of e of quota[h] = demand[e]
//
//   the least largest load is ceil(T*), T* = max over rank sets S of
//   (demand of the experts hosted only inside S) / |S|
//
// THREADS one thread at a time.
class ExactSplitter {
 public:
  // `hosts` is copied. REQUIRES every expert has a host
  explicit ExactSplitter(const LayerHosts& hosts);

  // SHAPES demand [E], >= 0
  // REQUIRES all demand together is below 2^31 (checked)
  void Run(std::span<const int32_t> demand, Split* split);

 private:
  void Pour(int32_t expert, int32_t demand, Split* split);
  void PourAll(std::span<const int32_t> demand, int32_t target, Split* split);
  bool Augment(int32_t target, Split* split);
  int32_t PushTo(int32_t rank, int32_t target, Split* split);

  // The placement, compiled. Only experts with more than one host leave anything to decide.
  int32_t num_experts_, num_ranks_;
  std::vector<int32_t> host_offsets_, host_rank_;
  std::vector<int32_t> expert_of_host_;        // [num_hosts]
  std::vector<int32_t> single_, shared_;       // experts with one host, with several; ascending
  std::vector<int32_t> edge_offsets_, edges_;  // per rank: hosts of shared experts on it

  std::vector<uint64_t> pour_order_;  // shared experts, largest demand first: (~demand, expert)
  std::vector<std::pair<int32_t, int32_t>> by_level_;  // hosts of one expert by (load, host)
  std::vector<int32_t> queue_;                         // [R] reached ranks, breadth first
  std::vector<uint8_t> reached_;                       // [R]
  std::vector<uint8_t> expert_seen_;                   // [E]
  std::vector<int32_t> give_host_;  // [R] host of the parent rank that would give copies, or -1
  std::vector<int32_t> take_host_;  // [R] host of this rank that would take them
};

// What the splitter can count of loads beyond its 32 bits: demand[e] = load[e] >> shift, with the
// smallest shift that keeps the total below 2^30. Returns the shift.
int ScaleDemand(std::span<const int64_t> load, std::vector<int32_t>* demand);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_SPLIT_EXACT_H_
