#include <numeric>
#include <vector>

#include "base/random.h"
#include "kernels/copy_route.h"
#include "kernels/device_split.h"
#include "kernels/dispatch.h"
#include "placement/split.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::DeviceArray;

constexpr int32_t kAlign = 16;
constexpr size_t kSpareGroups = 2;  // that the rank has not got

// What the device is to say to one rank, by the splitter of the CPU and by counting.
struct Expected {
  Split split;
  std::vector<int32_t> send, row_begin, group_begin, group_rows;
};

Expected ExpectedFor(const LayerHosts& hosts, std::span<const int32_t> counts, int32_t rank) {
  Expected want;
  Splitter splitter(hosts);
  splitter.Run(SplitMode::kExact, counts, &want.split);
  const size_t num_hosts = hosts.host_rank.size();
  std::vector<RankPart> parts(static_cast<size_t>(hosts.num_ranks));
  for (int32_t s = 0; s < hosts.num_ranks; ++s) {
    splitter.Cut(SplitMode::kExact, counts, want.split, s, &parts[s]);
  }
  want.send = parts[rank].send;
  want.row_begin.resize(num_hosts);
  for (int32_t r = 0; r < hosts.num_ranks; ++r) {
    int32_t begin = 0;
    for (size_t h = 0; h < num_hosts; ++h) {
      if (hosts.host_rank[h] != r) continue;
      int32_t before = 0;
      for (int32_t s = 0; s < rank; ++s) before += parts[s].send[h];
      want.row_begin[h] = begin + before;
      if (r == rank) {
        want.group_begin.push_back(begin);
        want.group_rows.push_back(want.split.quota[h]);
      }
      begin += (want.split.quota[h] + kAlign - 1) / kAlign * kAlign;
    }
    if (r != rank) continue;
    want.group_begin.insert(want.group_begin.end(), 1 + kSpareGroups, begin);
    want.group_rows.insert(want.group_rows.end(), kSpareGroups, 0);
  }
  return want;
}

// Everything that the device writes, in device memory.
struct OnDevice {
  OnDevice(const CompiledHosts& compiled, const LayerHosts& hosts, int32_t rank)
      : words(compiled.words()),
        layer(std::vector<DeviceHosts>{compiled.At(words.data())}),
        quota(hosts.host_rank.size()),
        load(hosts.num_ranks),
        send(hosts.host_rank.size()),
        row_begin(hosts.host_rank.size()),
        group_begin(static_cast<size_t>(compiled.num_groups(rank)) + 1 + kSpareGroups),
        group_rows(static_cast<size_t>(compiled.num_groups(rank)) + kSpareGroups),
        status(std::vector<uint32_t>{0}) {}

  DeviceSplitArgs Args(const CompiledHosts& compiled, int32_t rank, const int32_t* counts) const {
    const DeviceHosts hosts = compiled.At(words.data());
    return {.layer = layer.data(),
            .num_experts = hosts.num_experts,
            .num_ranks = hosts.num_ranks,
            .max_hosts = hosts.num_hosts + 3,
            .max_groups = static_cast<int32_t>(group_rows.size()),
            .rank = rank,
            .row_align = kAlign,
            .row_capacity = 1 << 30,
            .num_kinds = 1,
            .counts = counts,
            .quota = quota.data(),
            .rank_load = load.data(),
            .send = send.data(),
            .row_begin = row_begin.data(),
            .group_begin = group_begin.data(),
            .group_rows = group_rows.data(),
            .status = status.data()};
  }

  DeviceArray<int32_t> words;
  DeviceArray<DeviceHosts> layer;
  DeviceArray<int32_t> quota, load, send, row_begin, group_begin, group_rows;
  DeviceArray<uint32_t> status;
};

void RequireSplit(const LayerHosts& hosts, const std::vector<int32_t>& counts, int32_t rank) {
  const Expected want = ExpectedFor(hosts, counts, rank);
  const CompiledHosts compiled(hosts, 0);
  const DeviceArray<int32_t> device_counts(counts);
  const OnDevice device(compiled, hosts, rank);
  const absl::Status status =
      cuda::SplitOnDevice(device.Args(compiled, rank, device_counts.data()), nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  REQUIRE(device.quota.Read() == want.split.quota);
  REQUIRE(device.load.Read() == want.split.rank_load);
  REQUIRE(device.send.Read() == want.send);
  REQUIRE(device.row_begin.Read() == want.row_begin);
  REQUIRE(device.group_begin.Read() == want.group_begin);
  REQUIRE(device.group_rows.Read() == want.group_rows);
  REQUIRE(device.status.Read()[0] == 0);
}

TEST_CASE("the split on the device is that of the CPU quota by quota", "[device][split]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 1);
    for (int i = 0; i < 12; ++i) {
      const Topology topology = testing::RandomTopology(&random, i == 0 ? 70 : 20);
      const Placement placement = testing::RandomPlacement(&random, topology, 1);
      const LayerHosts& hosts = placement.hosts(0);
      const auto counts = testing::RandomCounts(&random, hosts.num_ranks, hosts.num_experts);
      CAPTURE(round, i, hosts.num_ranks, hosts.num_experts);
      RequireSplit(hosts, counts, static_cast<int32_t>(random.Below(hosts.num_ranks)));
    }
  });
}

// Skewed, as real traffic is: the optimum needs augmenting paths and a raised target.
TEST_CASE("the device splits a large layer as the CPU does", "[device][split]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 500);
    const Topology topology = Topology::Uniform(32, 9);
    const std::vector<int32_t> row = testing::RandomRow(&random, 288, 256);
    const Placement placement = *Placement::Create(1, 256, topology, row, 0);
    std::vector<int32_t> counts(32 * 256);
    for (size_t i = 0; i < counts.size(); ++i) {
      const double hot = 0.02 / (0.001 + random.Uniform());
      counts[i] = static_cast<int32_t>(hot * (1 + random.Below(8)));
    }
    RequireSplit(placement.hosts(0), counts, static_cast<int32_t>(random.Below(32)));
  });
}

TEST_CASE("an expert on more ranks than a warp has lanes is split", "[device][split]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 900);
    Topology topology = Topology::Uniform(75, 2);
    for (size_t r = 0; r < 75; ++r) topology.node_of_rank[r] = static_cast<int32_t>(r / 8);
    std::vector<int32_t> row(150);
    if (round % 2 == 0) {  // three that share ranks: copies are handed on from one to the other
      const Placement mixed =
          *Placement::Create(1, 4, topology, testing::RandomRow(&random, 150, 4), 0);
      std::vector<int32_t> skewed(75 * 4);
      for (size_t i = 0; i < skewed.size(); ++i) {
        skewed[i] = static_cast<int32_t>(random.Below(i % 4 == 0 ? 1000 : 30));
      }
      RequireSplit(mixed.hosts(0), skewed, static_cast<int32_t>(random.Below(75)));
    }
    for (size_t s = 0; s < row.size(); ++s)
      row[s] = s % 2 == 0 ? 0 : static_cast<int32_t>(s / 50) + 1;
    const Placement placement = *Placement::Create(1, 4, topology, row, 0);
    std::vector<int32_t> counts(75 * 4);
    for (int32_t& count : counts) count = static_cast<int32_t>(random.Below(100));
    RequireSplit(placement.hosts(0), counts, static_cast<int32_t>(random.Below(75)));
  });
}

TEST_CASE("more rows than a rank has room for are reported with the rank", "[device][split]") {
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 2), false);
  const LayerHosts& hosts = placement.hosts(0);
  const CompiledHosts compiled(hosts, 0);
  const DeviceArray<int32_t> counts(std::vector<int32_t>{1, 1, 5, 20, 0, 0, 8, 20});
  const OnDevice device(compiled, hosts, 0);
  DeviceSplitArgs args = device.Args(compiled, 0, counts.data());
  args.row_capacity = 48;  // rank 1 needs 16 and 48
  REQUIRE(cuda::SplitOnDevice(args, nullptr).ok());
  const absl::Status status = ToStatus(device.status.Read()[0]);
  REQUIRE(absl::IsResourceExhausted(status));
  REQUIRE(status.message() == "exchange: rank 1 has no room for the rows of this batch");

  const OnDevice other(compiled, hosts, 1);
  args = other.Args(compiled, 1, counts.data());
  args.row_capacity = 48;
  REQUIRE(cuda::SplitOnDevice(args, nullptr).ok());
  REQUIRE(ToStatus(other.status.Read()[0]).message() == status.message());  // all ranks say so
  REQUIRE(other.group_rows.Read() == std::vector<int32_t>(2 + kSpareGroups, 0));
}

TEST_CASE("tables that are larger than was said are refused on the device", "[device][split]") {
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 2), false);
  const LayerHosts& hosts = placement.hosts(0);
  const CompiledHosts compiled(hosts, 0);
  const DeviceArray<int32_t> counts(std::vector<int32_t>(8, 1));
  const auto refused = [&](auto change) {
    const OnDevice device(compiled, hosts, 0);
    DeviceSplitArgs args = device.Args(compiled, 0, counts.data());
    change(args);
    REQUIRE(cuda::SplitOnDevice(args, nullptr).ok());
    const bool empty = device.group_rows.Read()[0] == 0;
    return empty &&
           device.status.Read()[0] >> 16 == static_cast<uint32_t>(ExchangeCode::kLayerTooLarge);
  };
  REQUIRE(refused([](DeviceSplitArgs& a) { a.max_hosts = 3; }));
  REQUIRE(refused([](DeviceSplitArgs& a) { a.max_groups = 1; }));
  REQUIRE(refused([](DeviceSplitArgs& a) { a.num_experts = 5; }));
}

// The hosts by AssignCopies, the rows by counting what goes to the same host before.
void RequireRoutes(const LayerHosts& hosts, const std::vector<int32_t>& ids, int32_t top_k,
                   const std::vector<int32_t>& send, const std::vector<int32_t>& row_begin) {
  Route route;
  const int32_t tokens = static_cast<int32_t>(ids.size()) / top_k;
  REQUIRE(cpu::AssignCopies({.num_tokens = tokens,
                             .top_k = top_k,
                             .ids = ids,
                             .hosts = &hosts,
                             .share = send,
                             .route = &route},
                            nullptr)
              .ok());
  std::vector<int32_t> rows(ids.size()), next = row_begin;
  for (size_t i = 0; i < ids.size(); ++i) {
    int32_t h = hosts.host_offsets[ids[i]];
    while (hosts.host_rank[h] != route.copy_rank[i]) ++h;
    rows[i] = next[h]++;
  }
  const CompiledHosts compiled(hosts, 0);
  const DeviceArray<int32_t> words(compiled.words()), device_ids(ids), device_send(send);
  const DeviceArray<DeviceHosts> layer(std::vector<DeviceHosts>{compiled.At(words.data())});
  const DeviceArray<int32_t> device_begin(row_begin), copy_rank(ids.size()), copy_row(ids.size());
  const DeviceArray<int32_t> tile_counts(static_cast<size_t>(hosts.num_experts) *
                                         NumRouteTiles(static_cast<int32_t>(ids.size())));
  const DeviceArray<uint32_t> status(std::vector<uint32_t>{0});
  REQUIRE(cuda::RouteCopies({.rank = 0,
                             .num_tokens = tokens,
                             .top_k = top_k,
                             .ids = device_ids.data(),
                             .layer = layer.data(),
                             .num_experts = hosts.num_experts,
                             .send = device_send.data(),
                             .row_begin = device_begin.data(),
                             .copy_rank = copy_rank.data(),
                             .copy_row = copy_row.data(),
                             .tile_counts = tile_counts.data(),
                             .status = status.data()},
                            nullptr)
              .ok());
  REQUIRE(copy_rank.Read() == route.copy_rank);
  REQUIRE(copy_row.Read() == rows);
  REQUIRE(status.Read()[0] == 0);
}

TEST_CASE("copies are routed in order whatever the schedule", "[device][route]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 40);
    for (const int32_t tokens : {1, 37, 700}) {
      const Topology topology = testing::RandomTopology(&random, 6);
      const Placement placement = testing::RandomPlacement(&random, topology, 1);
      const LayerHosts& hosts = placement.hosts(0);
      const int32_t top_k = std::min<int32_t>(hosts.num_experts, 1 + random.Below(8));
      std::vector<int32_t> ids(static_cast<size_t>(tokens) * top_k);
      std::vector<int32_t> counts(static_cast<size_t>(hosts.num_experts));
      for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>(random.Below(hosts.num_experts));
        ++counts[ids[i]];
      }
      std::vector<int32_t> send(hosts.host_rank.size()), row_begin(send.size());
      for (int32_t e = 0; e < hosts.num_experts; ++e) {
        for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
          const bool last = h + 1 == hosts.host_offsets[e + 1];
          send[h] = last ? counts[e] : static_cast<int32_t>(random.Below(counts[e] + 1));
          counts[e] -= send[h];
          row_begin[h] = static_cast<int32_t>(random.Below(1000));
        }
      }
      CAPTURE(round, tokens, top_k);
      RequireRoutes(hosts, ids, top_k, send, row_begin);
    }
  });
}

}  // namespace
}  // namespace ballast
