#ifndef BALLAST_PLACEMENT_SPLIT_H_
#define BALLAST_PLACEMENT_SPLIT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/layer_hosts.h"

namespace ballast {

// How the copies of a replicated expert are divided over its hosts.
enum class SplitMode { kExact, kEven, kRoundRobin, kHash };

// "exact", "even", "roundrobin", "hash". ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<SplitMode> ParseSplitMode(const std::string& name);
const char* NameOf(SplitMode mode);

// The division of one batch over the hosts of one layer; reused from step to step.
struct Split {
  std::vector<int32_t> quota;      // [num_hosts] copies that the host takes
  std::vector<int32_t> share;      // [R * num_hosts] of these, how many come from source rank r
  std::vector<int64_t> rank_load;  // [R] copies per rank: the sum of its quotas
  int64_t largest_load = 0;        // the maximum of rank_load
  int64_t bound = 0;               // ceil(T*): no split of this placement does better (kExact)
  std::vector<uint8_t>
      certificate;  // [R] kExact: a rank set S with ceil(load only in S / |S|) = bound
};

// Divides batches over one layer of one placement. Deterministic: the same counts give the same
// split on every rank, with no message. Owns its scratch; allocates only while growing.
//
//   minimise  max_r sum over hosts h on rank r of quota[h]
//   subject to  sum over hosts h of e of quota[h] = sum over sources s of counts[s][e]
//
// THREADS one thread at a time.
class Splitter {
 public:
  // `hosts` is copied.
  explicit Splitter(const LayerHosts& hosts);
  ~Splitter();
  Splitter(Splitter&&) noexcept;
  Splitter& operator=(Splitter&&) noexcept;

  // SHAPES counts [R * E], counts[s * E + e] = copies that source rank s has for expert e, >= 0
  // REQUIRES all counts together are below 2^31.
  // ORDER  kExact: quotas attain ceil(T*); the partition over sources serves a source's own rank
  //        first, then its node, then ascending rank. kEven: a host weighs its copies, remainders
  //        by largest remainder then lowest rank. kRoundRobin: the j-th copy of source s goes to
  //        host (j + s) mod num_hosts(e). kHash: by a hash of (s, j).
  //        `bound` and `certificate` are zero in the modes other than kExact.
  void Run(SplitMode mode, std::span<const int32_t> counts, Split* split);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_SPLIT_H_
