#include "placement/split.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <new>

#include "tests/placement/random_instances.h"
#include "tests/placement/split_check.h"

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

using testing::BoundOf;
using testing::BrokenParts;
using testing::BrokenQuotas;
using testing::DemandOf;
using testing::RandomCounts;
using testing::RandomPlacement;
using testing::RandomTopology;

// The optimum by definition: over all rank sets S, ceil(load only in S / |S|).
int64_t BruteForceOptimum(const LayerHosts& hosts, std::span<const int64_t> demand) {
  int64_t best = 0;
  for (uint32_t set = 1; set < (1u << hosts.num_ranks); ++set) {
    std::vector<uint8_t> inside(hosts.num_ranks);
    for (int32_t r = 0; r < hosts.num_ranks; ++r) inside[r] = (set >> r) & 1;
    best = std::max(best, BoundOf(hosts, demand, inside));
  }
  return best;
}

std::vector<RankPart> CutForAll(Splitter* splitter, SplitMode mode, int32_t num_ranks,
                                std::span<const int32_t> counts, const Split& split) {
  std::vector<RankPart> parts(num_ranks);
  for (int32_t r = 0; r < num_ranks; ++r) splitter->Cut(mode, counts, split, r, &parts[r]);
  return parts;
}

TEST_CASE("split mode names can be parsed and unknown ones name the choices",
          "[placement][split]") {
  for (SplitMode mode : kAllSplitModes) REQUIRE(*ParseSplitMode(NameOf(mode)) == mode);
  const absl::Status status = ParseSplitMode("evn").status();
  REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(status.message()) ==
          "unknown split mode 'evn'; the choices are exact, cost, price, even, roundrobin, hash");
}

TEST_CASE("the exact split of a small batch is the one on paper", "[placement][split]") {
  // Expert 0 on ranks 0 and 1, expert 1 on rank 0, expert 2 on rank 1.
  const auto placement =
      Placement::Create(1, 3, Topology::Uniform(2, 2), {0, 1, 2, 0}, /*epoch=*/0);
  REQUIRE(placement.ok());
  const std::vector<int32_t> counts = {3, 4, 0,   // source 0
                                       6, 0, 1};  // source 1
  Splitter splitter(placement->hosts(0));
  Split split;
  splitter.Run(SplitMode::kExact, counts, &split);
  REQUIRE(split.bound == 7);
  REQUIRE(split.rank_load == std::vector<int32_t>{7, 7});
  REQUIRE(split.quota == std::vector<int32_t>{3, 6, 4, 1});  // hosts (0,0) (0,1) (1,0) (2,1)
  const auto parts = CutForAll(&splitter, SplitMode::kExact, 2, counts, split);
  REQUIRE(parts[0].send == std::vector<int32_t>{3, 0, 4, 0});  // nothing leaves its rank
  REQUIRE(parts[1].send == std::vector<int32_t>{0, 6, 0, 1});
  REQUIRE(parts[0].receive == std::vector<int32_t>{7, 0});
  REQUIRE(parts[1].receive == std::vector<int32_t>{0, 7});
}

TEST_CASE("the parts of the ranks are those on paper", "[placement][split]") {
  // Ranks 0 and 1 on node 0, ranks 2 and 3 on node 1. Expert 0 on ranks 0 and 3, the others fill.
  const auto placement = Placement::Create(1, 5, Topology::Uniform(4, 2, /*num_nodes=*/2),
                                           {0, 1, 2, -1, 3, -1, 0, 4}, /*epoch=*/0);
  REQUIRE(placement.ok());
  const std::vector<int32_t> counts = {2, 0, 0, 0, 0,   // source 0
                                       7, 1, 0, 0, 0,   // source 1
                                       3, 0, 0, 0, 0,   // source 2
                                       0, 0, 0, 0, 5};  // source 3
  Splitter splitter(placement->hosts(0));
  Split split;
  splitter.Run(SplitMode::kExact, counts, &split);
  // Hosts (0,0) (0,3) (1,0) (2,1) (3,2) (4,3): 12 copies of expert 0 level 1 and 5 to 9 and 9.
  REQUIRE(split.quota == std::vector<int32_t>{8, 4, 1, 0, 0, 5});
  const auto parts = CutForAll(&splitter, SplitMode::kExact, 4, counts, split);
  REQUIRE(parts[0].send == std::vector<int32_t>{2, 0, 0, 0, 0, 0});  // its own rank first
  REQUIRE(parts[1].send == std::vector<int32_t>{6, 1, 1, 0, 0, 0});  // its node, then elsewhere
  REQUIRE(parts[2].send == std::vector<int32_t>{0, 3, 0, 0, 0, 0});
  REQUIRE(parts[3].send == std::vector<int32_t>{0, 0, 0, 0, 0, 5});
  REQUIRE(parts[0].receive == std::vector<int32_t>{2, 7, 0, 0});
  REQUIRE(parts[3].receive == std::vector<int32_t>{0, 1, 3, 5});
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
  const auto round_robin = [&](const std::vector<int32_t>& batch) {
    splitter.Run(SplitMode::kRoundRobin, batch, &split);
    return CutForAll(&splitter, SplitMode::kRoundRobin, 2, batch, split);
  };
  REQUIRE(round_robin(counts)[0].send == std::vector<int32_t>{3, 2, 0});
  REQUIRE(round_robin(counts)[1].send == std::vector<int32_t>{3, 3, 0});
  REQUIRE(round_robin({5, 0, 5, 0})[0].send == std::vector<int32_t>{3, 2, 0});
  REQUIRE(round_robin({5, 0, 5, 0})[1].send == std::vector<int32_t>{2, 3, 0});
}

TEST_CASE("the exact split attains the optimum by definition", "[placement][split][property]") {
  Random random(1);
  int failures = 0;
  for (int i = 0; i < 3000; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 7), 1);
    const LayerHosts& hosts = placement.hosts(0);
    Splitter splitter(hosts);
    Split split;
    for (int batch = 0; batch < 2; ++batch) {
      const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
      splitter.Run(SplitMode::kExact, counts, &split);
      failures += split.largest_load != BruteForceOptimum(hosts, DemandOf(hosts, counts));
    }
  }
  REQUIRE(failures == 0);
}

TEST_CASE("the exact split equals the maximum flow", "[placement][split][property]") {
  REQUIRE(testing::CheckExactSplits(/*seed=*/100, /*rounds=*/2000, /*flow_every=*/1) == "");
}

TEST_CASE("the exact split of thousands of layers carries a proof",
          "[placement][split][property]") {
  REQUIRE(testing::CheckExactSplits(/*seed=*/200, /*rounds=*/5000, /*flow_every=*/100) == "");
}

TEST_CASE("every mode sends every copy to a host of its expert", "[placement][split][property]") {
  Random random(3);
  for (int i = 0; i < 500; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 12), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
    Splitter splitter(hosts);
    for (SplitMode mode : kAllSplitModes) {
      CAPTURE(i, NameOf(mode));
      Split split;
      splitter.Run(mode, counts, &split);
      REQUIRE(BrokenQuotas(hosts, DemandOf(hosts, counts), split) == "");
      const auto parts = CutForAll(&splitter, mode, hosts.num_ranks, counts, split);
      REQUIRE(BrokenParts(hosts, counts, split, parts) == "");
      RowTraffic traffic, want;
      splitter.AddUp(mode, counts, split, &traffic);
      want.node_sent.resize(hosts.num_ranks);
      want.node_received = want.network_sent = want.network_received = want.node_sent;
      for (int32_t to = 0; to < hosts.num_ranks; ++to) {
        for (int32_t from = 0; from < hosts.num_ranks; ++from) {
          if (from == to) continue;
          const bool near = hosts.node_of_rank[from] == hosts.node_of_rank[to];
          (near ? want.node_sent : want.network_sent)[from] += parts[to].receive[from];
          (near ? want.node_received : want.network_received)[to] += parts[to].receive[from];
        }
      }
      REQUIRE(traffic.node_sent == want.node_sent);
      REQUIRE(traffic.node_received == want.node_received);
      REQUIRE(traffic.network_sent == want.network_sent);
      REQUIRE(traffic.network_received == want.network_received);
    }
  }
}

TEST_CASE("a batch without tokens splits into nothing", "[placement][split]") {
  Random random(4);
  const Placement placement = RandomPlacement(&random, RandomTopology(&random, 6), 1);
  const LayerHosts& hosts = placement.hosts(0);
  const std::vector<int32_t> counts(hosts.num_ranks * hosts.num_experts, 0);
  Splitter splitter(hosts);
  for (SplitMode mode : kAllSplitModes) {
    Split split;
    splitter.Run(mode, counts, &split);
    REQUIRE(split.largest_load == 0);
    REQUIRE(split.bound == 0);
    REQUIRE(BrokenQuotas(hosts, DemandOf(hosts, counts), split) == "");
  }
}

TEST_CASE("a source serves its own rank first and then its node", "[placement][split][property]") {
  Random random(5);
  int failures = 0;
  for (int i = 0; i < 500; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 8), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const std::vector<int32_t> counts = RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
    Splitter splitter(hosts);
    Split split;
    splitter.Run(SplitMode::kExact, counts, &split);
    const auto parts = CutForAll(&splitter, SplitMode::kExact, hosts.num_ranks, counts, split);
    for (int32_t e = 0; e < hosts.num_experts; ++e) {
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        const int32_t r = hosts.host_rank[h];
        failures += parts[r].send[h] != std::min(split.quota[h], counts[r * hosts.num_experts + e]);
        // A host takes from afar only when no source of its node sends afar.
        int32_t from_afar = 0;
        int32_t to_afar = 0;
        for (int32_t s = 0; s < hosts.num_ranks; ++s) {
          const bool near = hosts.node_of_rank[s] == hosts.node_of_rank[r];
          if (!near) from_afar += parts[s].send[h];
          for (int32_t g = hosts.host_offsets[e]; near && g < hosts.host_offsets[e + 1]; ++g) {
            if (hosts.node_of_rank[hosts.host_rank[g]] != hosts.node_of_rank[r]) {
              to_afar += parts[s].send[g];
            }
          }
        }
        failures += from_afar > 0 && to_afar > 0;
      }
    }
  }
  REQUIRE(failures == 0);
}

TEST_CASE("a split without prices depends on the counts alone and none allocates when warm",
          "[placement][split]") {
  Random random(6);
  const Topology topology = Topology::Uniform(16, 5, 4);
  const auto placement = Placement::Create(1, 64, topology, testing::RandomRow(&random, 80, 64), 0);
  REQUIRE(placement.ok());
  const LayerHosts& hosts = placement->hosts(0);
  Splitter warm(hosts);
  Split split;
  RankPart part;
  for (int batch = 0; batch < 50; ++batch) {
    const std::vector<int32_t> counts = RandomCounts(&random, 16, 64);
    for (SplitMode mode : kAllSplitModes) {
      const int64_t before = num_allocations;
      warm.Run(mode, counts, &split);
      warm.Cut(mode, counts, split, batch % 16, &part);
      const int64_t allocated = num_allocations - before;
      if (batch > 0) REQUIRE(allocated == 0);
      if (mode == SplitMode::kPrice) continue;  // depends on the past
      Splitter fresh_splitter(hosts);
      Split fresh;
      RankPart fresh_part;
      fresh_splitter.Run(mode, counts, &fresh);
      fresh_splitter.Cut(mode, counts, fresh, batch % 16, &fresh_part);
      const bool same = split.quota == fresh.quota && split.certificate == fresh.certificate &&
                        part.send == fresh_part.send && part.receive == fresh_part.receive;
      REQUIRE(same);
    }
  }
}

}  // namespace
}  // namespace ballast
