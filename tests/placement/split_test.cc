#include "placement/split.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <new>

#include "tests/placement/random_instances.h"

namespace {
std::atomic<int64_t> num_allocations{0};
}  // namespace

// Counts what the program allocates, for the test that the splitter does not.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++num_allocations;
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++num_allocations;
  return std::malloc(bytes == 0 ? 1 : bytes);
}
// Not inlined: GCC would warn of a free of what new gave.
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}

namespace ballast {
namespace {

using testing::RandomCounts;
using testing::RandomPlacement;
using testing::RandomTopology;

constexpr SplitMode kAllModes[] = {SplitMode::kExact, SplitMode::kEven, SplitMode::kRoundRobin,
                                   SplitMode::kHash};

// Copies of the batch whose hosts all lie in the rank set `inside`.
int64_t LoadOnlyInside(const LayerHosts& hosts, std::span<const int32_t> counts,
                       const std::vector<uint8_t>& inside) {
  int64_t load = 0;
  for (int32_t e = 0; e < hosts.num_experts; ++e) {
    bool only_inside = true;
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      only_inside = only_inside && inside[hosts.host_rank[h]] != 0;
    }
    for (int32_t s = 0; only_inside && s < hosts.num_ranks; ++s) {
      load += counts[s * hosts.num_experts + e];
    }
  }
  return load;
}

// The optimum by definition: over all rank sets S, ceil(load only in S / |S|).
int64_t BruteForceOptimum(const LayerHosts& hosts, std::span<const int32_t> counts) {
  int64_t best = 0;
  for (uint32_t set = 1; set < (1u << hosts.num_ranks); ++set) {
    std::vector<uint8_t> inside(hosts.num_ranks);
    int64_t size = 0;
    for (int32_t r = 0; r < hosts.num_ranks; ++r) size += inside[r] = (set >> r) & 1;
    best = std::max(best, (LoadOnlyInside(hosts, counts, inside) + size - 1) / size);
  }
  return best;
}

// Every count is sent exactly once, every quota is the sum of its shares, loads add up.
bool IsConsistent(const LayerHosts& hosts, std::span<const int32_t> counts, const Split& split) {
  const size_t num_hosts = hosts.host_rank.size();
  std::vector<int64_t> quota(num_hosts, 0);
  for (int32_t s = 0; s < hosts.num_ranks; ++s) {
    for (int32_t e = 0; e < hosts.num_experts; ++e) {
      int64_t sent = 0;
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        const int32_t share = split.share[s * num_hosts + h];
        if (share < 0) return false;
        sent += share;
        quota[h] += share;
      }
      if (sent != counts[s * hosts.num_experts + e]) return false;
    }
  }
  std::vector<int64_t> load(hosts.num_ranks, 0);
  for (size_t h = 0; h < num_hosts; ++h) {
    if (quota[h] != split.quota[h]) return false;
    load[hosts.host_rank[h]] += quota[h];
  }
  return load == split.rank_load &&
         split.largest_load == *std::max_element(load.begin(), load.end());
}

// The bound is attained, and the certificate proves that nothing does better.
bool IsProvenOptimal(const LayerHosts& hosts, std::span<const int32_t> counts, const Split& split) {
  int64_t size = 0;
  for (uint8_t in : split.certificate) size += in;
  if (size == 0 || split.largest_load != split.bound) return false;
  return (LoadOnlyInside(hosts, counts, split.certificate) + size - 1) / size == split.bound;
}

TEST_CASE("split mode names can be parsed and unknown ones name the choices",
          "[placement][split]") {
  for (SplitMode mode : kAllModes) REQUIRE(*ParseSplitMode(NameOf(mode)) == mode);
  const absl::Status status = ParseSplitMode("evn").status();
  REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(status.message()) ==
          "unknown split mode 'evn'; the choices are exact, even, roundrobin, hash");
}

TEST_CASE("the exact split of a small batch is the one on paper", "[placement][split]") {
  // Expert 0 on ranks 0 and 1, expert 1 on rank 0, expert 2 on rank 1.
  const auto placement =
      Placement::Create(1, 3, Topology::Uniform(2, 2), {0, 1, 2, 0}, /*epoch=*/0);
  REQUIRE(placement.ok());
  const std::vector<int32_t> counts = {3, 4, 0,   // source 0
                                       6, 0, 1};  // source 1
  Split split;
  Splitter(placement->hosts(0)).Run(SplitMode::kExact, counts, &split);
  REQUIRE(split.bound == 7);
  REQUIRE(split.rank_load == std::vector<int64_t>{7, 7});
  REQUIRE(split.quota == std::vector<int32_t>{3, 6, 4, 1});  // hosts (0,0) (0,1) (1,0) (2,1)
  REQUIRE(split.share == std::vector<int32_t>{3, 0, 4, 0,    // nothing leaves its rank
                                              0, 6, 0, 1});
}

TEST_CASE("even weighs a host by its copies and round robin starts at the source",
          "[placement][split]") {
  // Expert 0 twice on rank 0 and once on rank 1.
  const auto placement =
      Placement::Create(1, 2, Topology::Uniform(2, 2), {0, 0, 0, 1}, /*epoch=*/0);
  REQUIRE(placement.ok());
  Splitter splitter(placement->hosts(0));
  Split split;
  const std::vector<int32_t> counts = {5, 0, 6, 0};
  splitter.Run(SplitMode::kEven, counts, &split);
  REQUIRE(split.quota == std::vector<int32_t>{7, 4, 0});  // 11 * 2/3 = 7.33, 11 * 1/3 = 3.67
  splitter.Run(SplitMode::kRoundRobin, counts, &split);
  REQUIRE(split.share == std::vector<int32_t>{3, 2, 0, 3, 3, 0});
  const std::vector<int32_t> odd = {5, 0, 5, 0};
  splitter.Run(SplitMode::kRoundRobin, odd, &split);
  REQUIRE(split.share == std::vector<int32_t>{3, 2, 0, 2, 3, 0});
}

TEST_CASE("the exact split attains the optimum by definition", "[placement][split][property]") {
  Random random(1);
  int failures = 0;
  for (int i = 0; i < 3000; ++i) {
    const Topology topology = RandomTopology(&random, 7);
    const Placement placement = RandomPlacement(&random, topology, 1);
    const LayerHosts& hosts = placement.hosts(0);
    Splitter splitter(hosts);
    Split split;
    for (int batch = 0; batch < 2; ++batch) {
      const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
      splitter.Run(SplitMode::kExact, counts, &split);
      failures += split.bound != BruteForceOptimum(hosts, counts);
      failures += !IsProvenOptimal(hosts, counts, split);
      failures += !IsConsistent(hosts, counts, split);
    }
  }
  REQUIRE(failures == 0);
}

TEST_CASE("the exact split of larger layers carries a proof", "[placement][split][property]") {
  Random random(2);
  int failures = 0;
  for (int i = 0; i < 300; ++i) {
    const int32_t num_ranks = 8 << random.Below(3);
    const Topology topology = Topology::Uniform(num_ranks, 2 + random.Below(6), 2);
    const int32_t num_experts = topology.num_slots() - random.Below(num_ranks) - 1;
    const auto placement =
        Placement::Create(1, num_experts, topology,
                          testing::RandomRow(&random, topology.num_slots(), num_experts), 0);
    REQUIRE(placement.ok());
    const LayerHosts& hosts = placement->hosts(0);
    const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
    Split split;
    Splitter(hosts).Run(SplitMode::kExact, counts, &split);
    failures += !IsProvenOptimal(hosts, counts, split);
    failures += !IsConsistent(hosts, counts, split);
  }
  REQUIRE(failures == 0);
}

TEST_CASE("every mode sends every copy to a host of its expert", "[placement][split][property]") {
  Random random(3);
  int failures = 0;
  for (int i = 0; i < 500; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 12), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
    Splitter splitter(hosts);
    for (SplitMode mode : kAllModes) {
      Split split;
      splitter.Run(mode, counts, &split);
      failures += !IsConsistent(hosts, counts, split);
    }
  }
  REQUIRE(failures == 0);
}

TEST_CASE("a batch without tokens splits into nothing", "[placement][split]") {
  Random random(4);
  const Placement placement = RandomPlacement(&random, RandomTopology(&random, 6), 1);
  const LayerHosts& hosts = placement.hosts(0);
  const std::vector<int32_t> counts(hosts.num_ranks * hosts.num_experts, 0);
  Splitter splitter(hosts);
  for (SplitMode mode : kAllModes) {
    Split split;
    splitter.Run(mode, counts, &split);
    REQUIRE(split.largest_load == 0);
    REQUIRE(split.bound == 0);
    REQUIRE(IsConsistent(hosts, counts, split));
  }
}

TEST_CASE("a source serves its own rank first and then its node", "[placement][split][property]") {
  Random random(5);
  int failures = 0;
  for (int i = 0; i < 500; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 8), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const size_t num_hosts = hosts.host_rank.size();
    const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
    Split split;
    Splitter(hosts).Run(SplitMode::kExact, counts, &split);
    for (int32_t e = 0; e < hosts.num_experts; ++e) {
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        const int32_t r = hosts.host_rank[h];
        failures += split.share[r * num_hosts + h] !=
                    std::min(split.quota[h], counts[r * hosts.num_experts + e]);
        // A host takes from afar only when no source of its node sends afar.
        int32_t from_afar = 0;
        int32_t to_afar = 0;
        for (int32_t s = 0; s < hosts.num_ranks; ++s) {
          const bool near = hosts.node_of_rank[s] == hosts.node_of_rank[r];
          if (!near) from_afar += split.share[s * num_hosts + h];
          for (int32_t g = hosts.host_offsets[e]; near && g < hosts.host_offsets[e + 1]; ++g) {
            if (hosts.node_of_rank[hosts.host_rank[g]] != hosts.node_of_rank[r]) {
              to_afar += split.share[s * num_hosts + g];
            }
          }
        }
        failures += from_afar > 0 && to_afar > 0;
      }
    }
  }
  REQUIRE(failures == 0);
}

TEST_CASE("a split depends on the counts alone and allocates nothing when warm",
          "[placement][split]") {
  Random random(6);
  const Topology topology = Topology::Uniform(16, 5, 4);
  const auto placement = Placement::Create(1, 64, topology, testing::RandomRow(&random, 80, 64), 0);
  REQUIRE(placement.ok());
  const LayerHosts& hosts = placement->hosts(0);
  Splitter warm(hosts);
  Split split;
  for (int batch = 0; batch < 50; ++batch) {
    const std::vector<int32_t> counts = RandomCounts(&random, 16, 64);
    for (SplitMode mode : kAllModes) {
      const int64_t before = num_allocations;
      warm.Run(mode, counts, &split);
      const int64_t allocated = num_allocations - before;
      Split fresh;
      Splitter(hosts).Run(mode, counts, &fresh);
      const bool same = split.share == fresh.share && split.certificate == fresh.certificate;
      REQUIRE(same);
      if (batch > 0) REQUIRE(allocated == 0);
    }
  }
}

}  // namespace
}  // namespace ballast
