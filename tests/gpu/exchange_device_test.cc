// Ranks in one process: parts of one block of memory, a stream each. What they run is what ranks of
// several devices run.
#include <memory>
#include <numeric>
#include <vector>

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
constexpr int32_t kWidth = 24;  // of a row, in floats: not a multiple of any tile

// One rank's batch. Small integers, so that sums are exact in any order.
struct Batch {
  int32_t num_tokens = 0;
  std::vector<int32_t> ids, histogram;  // [T, K]; [2, E]
  std::vector<float> weights, x, base;  // [T, K]; [T, kWidth]
};

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
    for (int32_t i = 0; i < kWidth; ++i) {
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

std::vector<float> Dense(const Batch& batch, int32_t top_k) {
  std::vector<float> out = batch.base;
  for (size_t copy = 0; copy < batch.ids.size(); ++copy) {
    const size_t row = copy / static_cast<size_t>(top_k) * kWidth;
    for (size_t i = 0; i < kWidth; ++i) {
      out[row + i] += batch.weights[copy] * Expert(batch.ids[copy], batch.x[row + i]);
    }
  }
  return out;
}

class VirtualRank {
 public:
  VirtualRank(const Placement& placement, const ArenaShape& shape, int32_t rank)
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
        expanded_(static_cast<size_t>(shape.row_capacity) * kWidth),
        status_(std::vector<uint32_t>{0}) {
    exchange_.shape = shape;
    exchange_.rank = rank;
    exchange_.deadline_ns = 1'000'000'000;
    exchange_.status = status_.data();
    RequireCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~VirtualRank() { static_cast<void>(cudaStreamDestroy(stream_)); }

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

  // Up to the experts' rows.
  void LaunchFirstHalf() {
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
    RequireOk(cuda::Dispatch({.num_tokens = batch_.num_tokens,
                              .x = reinterpret_cast<const std::byte*>(x_->data()),
                              .copy_rank = copy_rank_.data(),
                              .copy_row = copy_row_.data(),
                              .blocks_done = blocks_done_.data()},
                             exchange_, stream_));
    RequireOk(cuda::Expand({reinterpret_cast<std::byte*>(expanded_.data())}, exchange_, stream_));
  }

  // The experts, by the host: the rows of each group, and what is between them is poison.
  void RunExperts() {
    const std::vector<float> x = expanded_.Read();
    const std::vector<int32_t> begin = group_begin_.Read(), rows = group_rows_.Read();
    const DeviceHosts hosts = compiled_.At(compiled_.words().data());
    std::vector<float> results(x.size(), std::nanf(""));
    for (size_t g = 0; g < rows.size(); ++g) {
      REQUIRE(begin[g] % kAlign == 0);
      const int32_t host =
          hosts.rank_hosts[hosts.rank_offsets[exchange_.rank] + static_cast<int32_t>(g)];
      for (int32_t i = begin[g] * kWidth; i < (begin[g] + rows[g]) * kWidth; ++i) {
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
                                 .out = out_->data()},
                                exchange_, stream_));
  }

  void RequireResult() const {
    REQUIRE(status_.Read()[0] == 0);
    REQUIRE(out_->Read() == Dense(batch_, exchange_.shape.top_k));
  }
  absl::Status status() const { return ToStatus(status_.Read()[0]); }
  std::vector<float> out() const { return out_->Read(); }
  Exchange& exchange() { return exchange_; }

 private:
  static void RequireOk(const absl::Status& status) {
    INFO(status.message());
    REQUIRE(status.ok());
  }

  const LayerHosts hosts_;
  CompiledHosts compiled_;
  Exchange exchange_;
  Batch batch_;
  cudaStream_t stream_ = nullptr;
  DeviceArray<int32_t> words_, quota_, load_, send_, row_begin_, group_begin_, group_rows_;
  DeviceArray<int32_t> copy_rank_, copy_row_, tile_counts_, blocks_done_;
  DeviceArray<float> expanded_;
  DeviceArray<uint32_t> status_;
  std::unique_ptr<DeviceArray<int32_t>> ids_, histogram_;
  std::unique_ptr<DeviceArray<float>> weights_, x_, base_, out_;
};

// All ranks of one placement over one block of memory.
class VirtualRanks {
 public:
  VirtualRanks(const Placement& placement, ArenaShape shape)
      : shape_(shape), arena_(shape.bytes() * static_cast<size_t>(shape.num_ranks)) {
    arena_.Fill(0xa5);
    for (int32_t r = 0; r < shape.num_ranks; ++r) {
      ranks_.push_back(std::make_unique<VirtualRank>(placement, shape, r));
      for (int32_t peer = 0; peer < shape.num_ranks; ++peer) {
        ranks_[r]->exchange().arena[peer] = ArenaOf(peer);
      }
      RequireCuda(cudaMemset(ArenaOf(r) + shape.flags_offset(), 0,
                             shape.tokens_offset() - shape.flags_offset()));
    }
  }

  VirtualRank& rank(int32_t r) { return *ranks_[r]; }

  void Run(const std::vector<Batch>& batches, uint32_t number) {
    for (size_t r = 0; r < ranks_.size(); ++r) ranks_[r]->BeginExchange(batches[r], number);
    for (auto& rank : ranks_) rank->LaunchFirstHalf();
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
  std::vector<std::unique_ptr<VirtualRank>> ranks_;
};

ArenaShape ShapeFor(const Placement& placement, int32_t max_tokens, int32_t top_k) {
  const LayerHosts& hosts = placement.hosts(0);
  ArenaShape shape;
  shape.num_ranks = hosts.num_ranks;
  shape.num_experts = hosts.num_experts;
  shape.max_tokens = max_tokens;
  shape.top_k = top_k;
  shape.row_bytes = kWidth * sizeof(float);
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
    VirtualRanks ranks(placement, shape);
    for (const uint32_t number : {1u, 2u, 3u}) {  // nothing is cleared in between
      CAPTURE(round, shape.num_ranks, number);
      ranks.Run(RandomBatches(shape, &random), number);
      for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
    }
  });
}

}  // namespace
}  // namespace ballast
