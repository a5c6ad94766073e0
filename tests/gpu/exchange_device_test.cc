// Ranks in one process: parts of one block of memory, a stream each. What they run is what ranks of
// several devices run.
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "kernels/copy_route.h"
#include "kernels/device_split.h"
#include "kernels/exchange.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::DeviceArray;
using testing::RequireCuda;

constexpr int32_t kAlign = 8;

// One rank's batch. Small integers, so that sums are exact in any order.
struct Batch {
  int32_t num_tokens = 0;
  std::vector<int32_t> ids, histogram;  // [T, K]; [2, E]
  std::vector<float> weights, x, base;  // [T, K]; [T, width]
};

int32_t WidthOf(const ArenaShape& shape) {
  return shape.row_bytes / static_cast<int32_t>(sizeof(float));
}

Batch RandomBatch(const ArenaShape& shape, int32_t num_tokens, Random* random) {
  Batch batch;
  batch.num_tokens = num_tokens;
  batch.histogram.resize(2 * static_cast<size_t>(shape.num_experts));
  const auto small = [&] { return static_cast<float>(random->Below(16)) - 8; };
  for (int32_t t = 0; t < num_tokens; ++t) {
    std::vector<int32_t> experts(static_cast<size_t>(shape.num_experts));
    std::iota(experts.begin(), experts.end(), 0);
    const size_t kind = random->Below(2);
    for (int32_t k = 0; k < shape.top_k; ++k) {
      std::swap(experts[k], experts[k + random->Below(shape.num_experts - k)]);
      batch.ids.push_back(experts[k]);
      batch.weights.push_back(static_cast<float>(1 + random->Below(4)));
      ++batch.histogram[kind * shape.num_experts + experts[k]];
    }
    for (int32_t i = 0; i < WidthOf(shape); ++i) {
      batch.x.push_back(small());
      batch.base.push_back(small());
    }
  }
  return batch;
}

// What an expert does in these tests.
float Expert(int32_t e, float x) {
  return static_cast<float>(e + 1) * x;
}

std::vector<float> Dense(const Batch& batch, const ArenaShape& shape) {
  const size_t width = static_cast<size_t>(WidthOf(shape));
  std::vector<float> out = batch.base;
  for (size_t copy = 0; copy < batch.ids.size(); ++copy) {
    const size_t row = copy / static_cast<size_t>(shape.top_k) * width;
    for (size_t i = 0; i < width; ++i) {
      out[row + i] += batch.weights[copy] * Expert(batch.ids[copy], batch.x[row + i]);
    }
  }
  return out;
}

void RequireOk(const absl::Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

// Launches what one rank launches in one layer.
class TestRank {
 public:
  TestRank(const Placement& placement, const ArenaShape& shape, int32_t rank)
      : hosts_(placement.hosts(0)),
        compiled_(hosts_),
        words_(compiled_.words()),
        quota_(hosts_.host_rank.size()),
        load_(hosts_.num_ranks),
        send_(hosts_.host_rank.size()),
        row_begin_(hosts_.host_rank.size()),
        group_begin_(static_cast<size_t>(compiled_.num_groups(rank)) + 1),
        group_rows_(compiled_.num_groups(rank)),
        copy_rank_(static_cast<size_t>(shape.max_tokens) * shape.top_k),
        copy_row_(copy_rank_.size()),
        tile_counts_(static_cast<size_t>(NumRouteTiles(static_cast<int32_t>(copy_rank_.size()))) *
                     shape.num_experts),
        blocks_done_(std::vector<int32_t>{0}),
        blocks_begun_(std::vector<int32_t>{0}),
        expanded_(static_cast<size_t>(shape.row_capacity) * WidthOf(shape)),
        status_(std::vector<uint32_t>{0}) {
    exchange_.shape = shape;
    exchange_.rank = rank;
    exchange_.deadline_ns = 1'000'000'000;
    exchange_.status = status_.data();
    RequireCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~TestRank() { static_cast<void>(cudaStreamDestroy(stream_)); }

  void BeginExchange(const Batch& batch, uint32_t number) {
    exchange_.number = number;
    batch_ = batch;
    ids_ = std::make_unique<DeviceArray<int32_t>>(batch.ids);
    histogram_ = std::make_unique<DeviceArray<int32_t>>(batch.histogram);
    weights_ = std::make_unique<DeviceArray<float>>(batch.weights);
    x_ = std::make_unique<DeviceArray<float>>(batch.x);
    base_ = std::make_unique<DeviceArray<float>>(batch.base);
    out_ = std::make_unique<DeviceArray<float>>(batch.base.size());
  }

  void LaunchSplit() {
    const DeviceHosts hosts = compiled_.At(words_.data());
    const int32_t* counts = reinterpret_cast<const int32_t*>(exchange_.arena[exchange_.rank] +
                                                             exchange_.shape.counts_offset());
    RequireOk(cuda::ExchangeCountsAndSplit({.hosts = hosts,
                                            .rank = exchange_.rank,
                                            .row_align = kAlign,
                                            .row_capacity = exchange_.shape.row_capacity,
                                            .num_kinds = 2,
                                            .counts = counts,
                                            .quota = quota_.data(),
                                            .rank_load = load_.data(),
                                            .send = send_.data(),
                                            .row_begin = row_begin_.data(),
                                            .group_begin = group_begin_.data(),
                                            .group_rows = group_rows_.data(),
                                            .status = status_.data()},
                                           exchange_, histogram_->data(), stream_));
    RequireOk(cuda::RouteCopies({.rank = exchange_.rank,
                                 .num_tokens = batch_.num_tokens,
                                 .top_k = exchange_.shape.top_k,
                                 .ids = ids_->data(),
                                 .hosts = hosts,
                                 .send = send_.data(),
                                 .row_begin = row_begin_.data(),
                                 .copy_rank = copy_rank_.data(),
                                 .copy_row = copy_row_.data(),
                                 .tile_counts = tile_counts_.data(),
                                 .status = status_.data()},
                                stream_));
  }

  DispatchArgs dispatch_args() const {
    return {.num_tokens = batch_.num_tokens,
            .x = reinterpret_cast<const std::byte*>(x_->data()),
            .copy_rank = copy_rank_.data(),
            .copy_row = copy_row_.data(),
            .blocks_done = blocks_done_.data()};
  }
  ExpandArgs expand_args() const { return {reinterpret_cast<std::byte*>(expanded_.data())}; }

  // Up to the experts' rows.
  void LaunchFirstHalf() {
    LaunchSplit();
    RequireOk(cuda::Dispatch(dispatch_args(), exchange_, stream_));
    RequireOk(cuda::Expand(expand_args(), exchange_, stream_));
  }

  // The experts, by the host: the rows of each group, and what is between them is poison.
  void RunExperts() {
    const int32_t width = WidthOf(exchange_.shape);
    const std::vector<float> x = expanded_.Read();
    const std::vector<int32_t> begin = group_begin_.Read(), rows = group_rows_.Read();
    const DeviceHosts hosts = compiled_.At(compiled_.words().data());
    std::vector<float> results(x.size(), std::nanf(""));
    for (size_t g = 0; g < rows.size(); ++g) {
      REQUIRE(begin[g] % kAlign == 0);
      const int32_t host =
          hosts.rank_hosts[hosts.rank_offsets[exchange_.rank] + static_cast<int32_t>(g)];
      for (int32_t i = begin[g] * width; i < (begin[g] + rows[g]) * width; ++i) {
        results[i] = Expert(hosts.expert_of_host[host], x[i]);
      }
    }
    RequireCuda(cudaMemcpy(exchange_.arena[exchange_.rank] + exchange_.shape.results_offset(),
                           results.data(), results.size() * sizeof(float), cudaMemcpyHostToDevice));
  }

  void LaunchSecondHalf() {
    RequireOk(cuda::PullCombine({.num_tokens = batch_.num_tokens,
                                 .type = DType::kF32,
                                 .copy_rank = copy_rank_.data(),
                                 .copy_row = copy_row_.data(),
                                 .weights = weights_->data(),
                                 .base = base_->data(),
                                 .out = out_->data(),
                                 .blocks_begun = blocks_begun_.data()},
                                exchange_, stream_));
  }

  void RequireResult() const {
    REQUIRE(status_.Read()[0] == 0);
    REQUIRE(out_->Read() == Dense(batch_, exchange_.shape));
  }
  absl::Status status() const { return ToStatus(status_.Read()[0]); }
  std::vector<float> out() const { return out_->Read(); }
  Exchange& exchange() { return exchange_; }

 private:
  const LayerHosts hosts_;
  CompiledHosts compiled_;
  Exchange exchange_;
  Batch batch_;
  cudaStream_t stream_ = nullptr;
  DeviceArray<int32_t> words_, quota_, load_, send_, row_begin_, group_begin_, group_rows_;
  DeviceArray<int32_t> copy_rank_, copy_row_, tile_counts_, blocks_done_, blocks_begun_;
  DeviceArray<float> expanded_;
  DeviceArray<uint32_t> status_;
  std::unique_ptr<DeviceArray<int32_t>> ids_, histogram_;
  std::unique_ptr<DeviceArray<float>> weights_, x_, base_, out_;
};

// All ranks of one placement over one block of memory.
class TestRanks {
 public:
  TestRanks(const Placement& placement, ArenaShape shape)
      : shape_(shape), arena_(shape.bytes() * static_cast<size_t>(shape.num_ranks)) {
    arena_.Fill(0xa5);
    for (int32_t r = 0; r < shape.num_ranks; ++r) {
      ranks_.push_back(std::make_unique<TestRank>(placement, shape, r));
      for (int32_t peer = 0; peer < shape.num_ranks; ++peer) {
        ranks_[r]->exchange().arena[peer] = ArenaOf(peer);
      }
      RequireCuda(cudaMemset(ArenaOf(r) + shape.flags_offset(), 0,
                             shape.tokens_offset() - shape.flags_offset()));
    }
  }

  TestRank& rank(int32_t r) { return *ranks_[r]; }

  void Begin(const std::vector<Batch>& batches, uint32_t number) {
    for (size_t r = 0; r < ranks_.size(); ++r) ranks_[r]->BeginExchange(batches[r], number);
  }

  void Run(const std::vector<Batch>& batches, uint32_t number) {
    Begin(batches, number);
    for (auto& rank : ranks_) rank->LaunchFirstHalf();
    Finish();
  }

  // The same with dispatch and expand of all ranks in one launch.
  void RunTogether(const std::vector<Batch>& batches, uint32_t number, int blocks_per_rank) {
    Begin(batches, number);
    for (auto& rank : ranks_) rank->LaunchSplit();
    RequireCuda(cudaDeviceSynchronize());
    std::vector<VirtualRank> all;
    for (auto& rank : ranks_) {
      all.push_back({rank->dispatch_args(), rank->expand_args(), rank->exchange()});
    }
    const DeviceArray<VirtualRank> device(all);
    RequireOk(cuda::DispatchAndExpand(device.data(), shape_.num_ranks, blocks_per_rank, nullptr));
    Finish();
  }

  void Finish() {
    RequireCuda(cudaDeviceSynchronize());
    for (auto& rank : ranks_) rank->RunExperts();
    for (auto& rank : ranks_) rank->LaunchSecondHalf();
    RequireCuda(cudaDeviceSynchronize());
  }

 private:
  std::byte* ArenaOf(int32_t rank) const {
    return arena_.data() + shape_.bytes() * static_cast<size_t>(rank);
  }

  ArenaShape shape_;
  DeviceArray<std::byte> arena_;
  std::vector<std::unique_ptr<TestRank>> ranks_;
};

// Rows of 24 floats: not a multiple of any tile.
ArenaShape ShapeFor(const Placement& placement, int32_t max_tokens, int32_t top_k,
                    int32_t width = 24) {
  const LayerHosts& hosts = placement.hosts(0);
  ArenaShape shape;
  shape.num_ranks = hosts.num_ranks;
  shape.num_experts = hosts.num_experts;
  shape.max_tokens = max_tokens;
  shape.top_k = top_k;
  shape.row_bytes = width * static_cast<int32_t>(sizeof(float));
  shape.row_capacity = hosts.num_ranks * max_tokens * top_k + hosts.num_experts * kAlign;
  return shape;
}

std::vector<Batch> RandomBatches(const ArenaShape& shape, Random* random) {
  std::vector<Batch> batches;
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    const int32_t tokens = static_cast<int32_t>(random->Below(shape.max_tokens + 1));
    batches.push_back(RandomBatch(shape, random->Below(4) == 0 ? 0 : tokens, random));
  }
  return batches;
}

TEST_CASE("the exchange computes what one rank would", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 3);
    const Topology topology = testing::RandomTopology(&random, 6);
    const Placement placement = testing::RandomPlacement(&random, topology, 1);
    const int32_t top_k = std::min(placement.num_experts(), 1 + round % 5);
    const ArenaShape shape = ShapeFor(placement, 9, top_k);
    REQUIRE(CheckArenaShape(shape).ok());
    TestRanks ranks(placement, shape);
    for (const uint32_t number : {1u, 2u, 3u}) {  // nothing is cleared in between
      CAPTURE(round, shape.num_ranks, number);
      ranks.Run(RandomBatches(shape, &random), number);
      for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
    }
  });
}

TEST_CASE("ranks of one launch exchange rows", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 60);
    const Placement placement =
        testing::RandomPlacement(&random, testing::RandomTopology(&random, 8), 1);
    const ArenaShape shape = ShapeFor(placement, 12, std::min(placement.num_experts(), 3));
    TestRanks ranks(placement, shape);
    for (const uint32_t number : {7u, 8u}) {
      ranks.RunTogether(RandomBatches(shape, &random), number, 1 + round % 3);
      for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
    }
  });
}

// The last block speaks for all: what the others stored must be seen with its flag.
TEST_CASE("blocks of one rank wait for each other's rows", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 360);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(1, 4), true);
    const ArenaShape shape = ShapeFor(placement, 8, 2);
    TestRanks ranks(placement, shape);
    for (const uint32_t number : {1u, 2u, 3u, 4u, 5u}) {
      ranks.RunTogether({RandomBatch(shape, 8, &random)}, number, 2 + round % 3);
      ranks.rank(0).RequireResult();
    }
  });
}

// Every warp copies, and twice; a block has several tokens.
TEST_CASE("rows wider than a block are exchanged", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 160);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 3), true);
    const ArenaShape shape = ShapeFor(placement, 4, 2, 4900);
    TestRanks ranks(placement, shape);
    const std::vector<Batch> batches = {RandomBatch(shape, 4, &random),
                                        RandomBatch(shape, 3, &random)};
    ranks.RunTogether(batches, 1, 1);
    for (int32_t r = 0; r < 2; ++r) ranks.rank(r).RequireResult();
  });
}

TEST_CASE("more tokens than a launch has blocks are exchanged", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    if (round % 10 != 3) return;  // it takes a while
    Random random(static_cast<uint64_t>(round) + 260);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(1, 4), true);
    const ArenaShape shape = ShapeFor(placement, 1100, 1, 136);
    TestRanks ranks(placement, shape);
    ranks.Run({RandomBatch(shape, 1100, &random)}, 1);
    ranks.rank(0).RequireResult();
  });
}

TEST_CASE("results do not depend on the placement", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 90);
    const Topology topology = Topology::Uniform(4, 4);
    std::vector<std::vector<float>> first;
    std::vector<Batch> batches;
    for (uint32_t epoch = 0; epoch < 3; ++epoch) {
      const Placement placement = *Placement::Create(
          1, 6, topology, testing::RandomRow(&random, topology.num_slots(), 6), epoch);
      const ArenaShape shape = ShapeFor(placement, 10, 4);
      if (batches.empty()) {
        batches = RandomBatches(shape, &random);
        // Of any size now: the order of the sums shows.
        for (Batch& batch : batches) {
          for (float& x : batch.x) x = static_cast<float>(std::exp(8 * random.Uniform()));
        }
      }
      TestRanks ranks(placement, shape);
      ranks.Run(batches, 1);
      for (int32_t r = 0; r < 4; ++r) {
        if (epoch == 0) first.push_back(ranks.rank(r).out());
        REQUIRE(ranks.rank(r).out() == first[r]);
      }
    }
  });
}

TEST_CASE("numbers of exchanges come round", "[device][exchange]") {
  Random random(5);
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true);
  const ArenaShape shape = ShapeFor(placement, 5, 2);
  TestRanks ranks(placement, shape);
  // A flag may be 2^31 behind at most, so it gets there in steps.
  for (const uint32_t number : {0x7fffffffu, 0xfffffffeu, 0xffffffffu, 0u, 1u}) {
    CAPTURE(number);
    ranks.Run(RandomBatches(shape, &random), number);
    for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
  }
}

// `late` is missing from `code` on; the others say so, and do nothing more.
TEST_CASE("a rank that does not come is named when the deadline has passed", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 7);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true);
    const ArenaShape shape = ShapeFor(placement, 5, 2);
    TestRanks ranks(placement, shape);
    const int32_t late = round % 3;
    const int stage = round / 3 % 3;
    for (int32_t r = 0; r < 3; ++r) {
      ranks.rank(r).exchange().deadline_ns = testing::ShortDeadlineNs();
    }
    ranks.Begin(RandomBatches(shape, &random), 1);
    for (int32_t r = 0; r < 3; ++r) {
      if (r != late || stage == 2) ranks.rank(r).LaunchFirstHalf();
      if (r == late && stage == 1) ranks.rank(r).LaunchSplit();
    }
    RequireCuda(cudaDeviceSynchronize());
    for (int32_t r = 0; r < 3; ++r) {
      if (r != late) ranks.rank(r).LaunchSecondHalf();
    }
    const char* what[] = {"counts", "rows", "results"};
    for (int32_t r = 0; r < 3; ++r) {
      CAPTURE(round, late, stage, r);
      if (r == late) continue;
      REQUIRE(absl::IsDeadlineExceeded(ranks.rank(r).status()));
      REQUIRE(ranks.rank(r).status().message() == absl::StrCat("exchange: the ", what[stage],
                                                               " of rank ", late,
                                                               " did not come in time"));
      for (float x : ranks.rank(r).out()) REQUIRE(std::bit_cast<uint32_t>(x) == 0xa5a5a5a5u);
    }
  });
}

TEST_CASE("an arena of a shape that cannot be is refused", "[device][exchange]") {
  const ArenaShape good =
      ShapeFor(*Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true), 5, 2);
  REQUIRE(CheckArenaShape(good).ok());
  const auto refused = [&](auto change) {
    ArenaShape shape = good;
    change(shape);
    return absl::IsInvalidArgument(CheckArenaShape(shape));
  };
  REQUIRE(refused([](ArenaShape& s) { s.num_ranks = kMaxPeers + 1; }));
  REQUIRE(refused([](ArenaShape& s) { s.num_ranks = 0; }));
  REQUIRE(refused([](ArenaShape& s) { s.top_k = 33; }));
  REQUIRE(refused([](ArenaShape& s) { s.row_bytes = 24; }));
  REQUIRE(refused([](ArenaShape& s) { s.row_capacity = 0; }));
  REQUIRE(refused([](ArenaShape& s) { s.max_tokens = 1 << 30; }));
  // Parts do not overlap and lie in the order of their offsets, each on a line of its own.
  const size_t parts[] = {
      good.counts_offset(), good.flags_offset(),   good.tokens_offset(), good.row_of_copy_offset(),
      good.rows_offset(),   good.results_offset(), good.bytes()};
  const size_t sizes[] = {4u * 3 * 2 * 4, 128u * 3 * 3,
                          4u * 3,         4u * 3 * 5 * 2,
                          3u * 5 * 96,    96u * static_cast<size_t>(good.row_capacity)};
  for (int i = 0; i < 6; ++i) {
    REQUIRE(parts[i] % 128 == 0);
    REQUIRE(parts[i + 1] >= parts[i] + sizes[i]);
    REQUIRE(parts[i + 1] < parts[i] + sizes[i] + 128);
  }
}

}  // namespace
}  // namespace ballast
