#ifndef BALLAST_PLACEMENT_SPLIT_H_
#define BALLAST_PLACEMENT_SPLIT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/layer_hosts.h"
#include "placement/cost_model.h"
#include "placement/split_exact.h"

namespace ballast {

// How the copies of a replicated expert are divided over its hosts.
enum class SplitMode { kExact, kCost, kPrice, kEven, kRoundRobin, kHash };
inline constexpr SplitMode kAllSplitModes[] = {SplitMode::kExact,      SplitMode::kCost,
                                               SplitMode::kPrice,      SplitMode::kEven,
                                               SplitMode::kRoundRobin, SplitMode::kHash};

// "exact", "cost", "price", "even", "roundrobin", "hash". ERRORS kInvalidArgument names the value
// and the choices
absl::StatusOr<SplitMode> ParseSplitMode(const std::string& name);
const char* NameOf(SplitMode mode);
std::vector<std::string> SplitModeNames();  // of all modes

// One rank's part of a split: what it sends and what it gets.
struct RankPart {
  std::vector<int32_t> send;     // [num_hosts] copies of this rank that go to the host
  std::vector<int32_t> receive;  // [R] copies that come to this rank from source r, itself included
};

// What all ranks send to and get from other ranks under a split.
struct RowTraffic {
  std::vector<int64_t> node_sent, node_received;        // [R] copies within the node
  std::vector<int64_t> network_sent, network_received;  // [R] copies between nodes
};

// Copies of the batch per expert: demand[e] = sum over s of counts[s * E + e].
// SHAPES counts [R * E]   demand [E], written
// REQUIRES all counts together are below 2^31
void SumOverSources(std::span<const int32_t> counts, std::span<int32_t> demand);

// Divides batches over one layer of one placement. Deterministic: the same counts give the same
// split on every rank, with no message. Owns its scratch; allocates only while growing.
//
// kPrice remembers: the split depends on the rank loads of the earlier batches that were Run with
// kPrice since construction, so all ranks must construct their splitters at the same batch and Run
// the same batches. Batches Run in other modes in between leave no trace.
//
// THREADS one thread at a time.
class Splitter {
 public:
  // `hosts` is copied. The constants are for kCost; they must be the same on every rank.
  // REQUIRES CheckCostConstants(constants, hosts.num_ranks).ok() (checked)
  explicit Splitter(const LayerHosts& hosts, const CostConstants& constants = {});
  ~Splitter();
  Splitter(Splitter&&) noexcept;
  Splitter& operator=(Splitter&&) noexcept;

  // Divides the batch over the hosts.
  // SHAPES counts [R * E], counts[s * E + e] = copies that source rank s has for expert e, >= 0
  // REQUIRES all counts together are below 2^31.
  // ORDER  kExact, kCost: as ExactSplitter, CostSplitter, of the counts' sums over the sources.
  // kEven: a host weighs its
  //        copies, remainders by largest remainder then lowest rank. kPrice: each source divides
  //        its own counts, a host weighs copies / price of its rank (RankPrices, in steps of
  //        1/4096), remainders by largest remainder, then by turns that start at host s mod
  //        num_hosts(e). kRoundRobin: the j-th copy of source s goes to host (j + s) mod
  //        num_hosts(e). kHash: by a hash of (s, j).
  void Run(SplitMode mode, std::span<const int32_t> counts, Split* split);

  // Cuts the split of the last Run over the sources, as far as `rank` sends or receives. The parts
  // of all ranks fit together: host h gets split.quota[h] in all, and source s sends counts[s][e].
  // SHAPES counts as given to Run
  // REQUIRES mode, counts and split are those of the last Run
  // ORDER  kExact, kCost, kEven: a source serves its own rank first, then its node, then the others
  // in
  //        ascending order; sources in ascending order too. kPrice, kRoundRobin, kHash: as Run
  //        says; what source s sends depends on counts[s] and, with kPrice, on the prices alone.
  void Cut(SplitMode mode, std::span<const int32_t> counts, const Split& split, int32_t rank,
           RankPart* part);

  // The parts of all ranks, added up by link: as Cut for every rank, in a fraction of its time.
  // REQUIRES mode, counts and split are those of the last Run
  void AddUp(SplitMode mode, std::span<const int32_t> counts, const Split& split,
             RowTraffic* traffic);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_SPLIT_H_
