// Ranks in one process: parts of one block of memory, a stream each. What they run is what ranks of
// several devices run.
#ifndef BALLAST_TESTS_GPU_VIRTUAL_RANKS_H_
#define BALLAST_TESTS_GPU_VIRTUAL_RANKS_H_

#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "base/random.h"
#include "kernels/copy_route.h"
#include "kernels/device_split.h"
#include "kernels/exchange.h"
#include "kernels/grouped_mlp.h"
#include "placement/placement.h"
#include "tests/gpu/device_array.h"

namespace ballast::testing {

inline constexpr int32_t kAlign = 8;
inline constexpr int32_t kMaxInter = 16;  // of the experts that are launched

// One rank's batch. Small integers, so that sums are exact in any order.
struct Batch {
  int32_t num_tokens = 0;
  std::vector<int32_t> ids, histogram;  // [T, K]; [2, E]
  std::vector<float> weights, x, base;  // [T, K]; [T, width]
};

inline int32_t WidthOf(const ArenaShape& shape) {
  return shape.row_bytes / static_cast<int32_t>(sizeof(float));
}

inline Batch RandomBatch(const ArenaShape& shape, int32_t num_tokens, Random* random) {
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
inline float Expert(int32_t e, float x) {
  return static_cast<float>(e + 1) * x;
}

inline std::vector<float> Dense(const Batch& batch, const ArenaShape& shape) {
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

inline void RequireOk(const absl::Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

// Launches what one rank launches in one layer.
class TestRank {
 public:
  TestRank(const Placement& placement, const ArenaShape& shape, int32_t rank)
      : max_hosts_(placement.topology().num_slots()),
        layer_(1),
        quota_(max_hosts_),
        load_(shape.num_ranks),
        send_(max_hosts_),
        row_begin_(max_hosts_),
        group_begin_(max_hosts_ + 1),
        group_rows_(max_hosts_),
        copy_rank_(static_cast<size_t>(shape.max_tokens) * shape.top_k),
        copy_row_(copy_rank_.size()),
        tile_counts_(static_cast<size_t>(NumRouteTiles(static_cast<int32_t>(copy_rank_.size()))) *
                     shape.num_experts),
        ids_(copy_rank_.size()),
        histogram_(2 * static_cast<size_t>(shape.num_experts)),
        blocks_(max_hosts_),
        weights_(copy_rank_.size()),
        x_(static_cast<size_t>(shape.max_tokens) * WidthOf(shape)),
        base_(x_.size()),
        out_(x_.size()),
        expanded_(static_cast<size_t>(shape.row_capacity) * WidthOf(shape)),
        activated_(static_cast<size_t>(shape.row_capacity) * kMaxInter),
        state_(std::vector<ExchangeState>{{}}) {
    exchange_.shape = shape;
    exchange_.rank = rank;
    exchange_.deadline_ns = 1'000'000'000;
    exchange_.max_blocks = 12;  // of 256 threads: eight ranks fit a device and the emulator
    exchange_.state = state_.data();
    RequireCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    Flip(placement);
  }
  ~TestRank() { static_cast<void>(cudaStreamDestroy(stream_)); }

  // From the next exchange on. REQUIRES none is under way; as many slots as at first
  void Flip(const Placement& placement) {
    compiled_ = std::make_unique<CompiledHosts>(placement.hosts(0), placement.epoch());
    words_ = std::make_unique<DeviceArray<int32_t>>(compiled_->words());
    layer_.Write({compiled_->At(words_->data())});
    // Experts of the tests lie in an arena by their numbers.
    const DeviceHosts hosts = compiled_->At(compiled_->words().data());
    std::vector<int32_t> block;
    for (int32_t g = 0; g < compiled_->num_groups(exchange_.rank); ++g) {
      const int32_t host = hosts.rank_hosts[hosts.rank_offsets[exchange_.rank] + g];
      block.push_back(hosts.expert_of_host[host]);
    }
    blocks_.WriteFirst(block);
  }

  // Sets the batch of the next exchange, the one after `exchanges` others.
  void Begin(const Batch& batch, uint32_t exchanges) {
    ExchangeState state;
    state.number = exchanges;
    state_.Write({state});
    SetBatch(batch);
  }
  void SetBatch(const Batch& batch) {
    batch_ = batch;
    ids_.WriteFirst(batch.ids);
    histogram_.Write(batch.histogram);
    weights_.WriteFirst(batch.weights);
    x_.WriteFirst(batch.x);
    base_.WriteFirst(batch.base);
    out_.Fill(0xa5);
  }

  void LaunchSplit() {
    const ArenaShape& shape = exchange_.shape;
    const int32_t* counts =
        reinterpret_cast<const int32_t*>(exchange_.arena[exchange_.rank] + shape.counts_offset());
    RequireOk(cuda::ExchangeCountsAndSplit({.layer = layer_.data(),
                                            .num_experts = shape.num_experts,
                                            .num_ranks = shape.num_ranks,
                                            .max_hosts = static_cast<int32_t>(max_hosts_),
                                            .max_groups = static_cast<int32_t>(max_hosts_),
                                            .rank = exchange_.rank,
                                            .row_align = kAlign,
                                            .row_capacity = shape.row_capacity,
                                            .num_kinds = 2,
                                            .counts = counts,
                                            .place = exchange_.place,
                                            .quota = quota_.data(),
                                            .rank_load = load_.data(),
                                            .send = send_.data(),
                                            .row_begin = row_begin_.data(),
                                            .group_begin = group_begin_.data(),
                                            .group_rows = group_rows_.data(),
                                            .status = &state_.data()->status},
                                           exchange_, histogram_.data(), stream_));
    RequireOk(cuda::RouteCopies({.rank = exchange_.rank,
                                 .num_tokens = batch_.num_tokens,
                                 .top_k = shape.top_k,
                                 .ids = ids_.data(),
                                 .layer = layer_.data(),
                                 .num_experts = shape.num_experts,
                                 .send = send_.data(),
                                 .row_begin = row_begin_.data(),
                                 .copy_rank = copy_rank_.data(),
                                 .copy_row = copy_row_.data(),
                                 .tile_counts = tile_counts_.data(),
                                 .status = &state_.data()->status},
                                stream_));
  }

  DispatchArgs dispatch_args() const {
    return {.num_tokens = batch_.num_tokens,
            .x = reinterpret_cast<const std::byte*>(x_.data()),
            .copy_rank = copy_rank_.data(),
            .copy_row = copy_row_.data()};
  }
  ExpandArgs expand_args() const {
    return {.own = reinterpret_cast<const std::byte*>(x_.data()),
            .x = reinterpret_cast<std::byte*>(expanded_.data())};
  }

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
    const DeviceHosts hosts = compiled_->At(compiled_->words().data());
    std::vector<float> results(x.size(), std::nanf(""));
    for (int32_t g = 0; g < compiled_->num_groups(exchange_.rank); ++g) {
      REQUIRE(begin[g] % kAlign == 0);
      const int32_t host = hosts.rank_hosts[hosts.rank_offsets[exchange_.rank] + g];
      for (int32_t i = begin[g] * width; i < (begin[g] + rows[g]) * width; ++i) {
        results[i] = Expert(hosts.expert_of_host[host], x[i]);
      }
    }
    RequireCuda(cudaMemcpy(Results(), results.data(), results.size() * sizeof(float),
                           cudaMemcpyHostToDevice));
    RequireCuda(cudaStreamSynchronize(nullptr));  // a copy from the heap may still be under way
  }
  // Experts whose parameters are in one arena for all ranks, packed: block e is expert e.
  void LaunchExperts(const ExpertShape& shape, const std::byte* arena) {
    REQUIRE(shape.inter <= kMaxInter);
    RequireOk(cuda::GroupedMlp({.shape = shape,
                                .groups = {.num_groups = static_cast<int32_t>(max_hosts_),
                                           .num_rows = exchange_.shape.row_capacity,
                                           .max_rows = exchange_.shape.row_capacity,
                                           .size = GroupSize::kSmall,
                                           .begin = group_begin_.data(),
                                           .rows = group_rows_.data(),
                                           .block = blocks_.data(),
                                           .arena = arena,
                                           .block_bytes = shape.packed_bytes(),
                                           .num_blocks = exchange_.shape.num_experts},
                                .x = expanded_.data(),
                                .activated = activated_.data(),
                                .y = Results()},
                               stream_));
  }
  void LaunchSecondHalf() {
    RequireOk(cuda::PullCombine({.num_tokens = batch_.num_tokens,
                                 .type = DType::kF32,
                                 .copy_rank = copy_rank_.data(),
                                 .copy_row = copy_row_.data(),
                                 .weights = weights_.data(),
                                 .base = base_.data(),
                                 .out = out_.data()},
                                exchange_, stream_));
  }

  void RequireResult() const {
    REQUIRE(status().ok());
    REQUIRE(out() == Dense(batch_, exchange_.shape));
  }
  std::vector<int32_t> group_rows() const { return group_rows_.Read(); }
  absl::Status status() const { return ToStatus(state_.Read()[0].status); }
  // SHAPES [T, width]
  std::vector<float> out() const {
    std::vector<float> out = out_.Read();
    out.resize(batch_.base.size());
    return out;
  }
  Exchange& exchange() { return exchange_; }
  cudaStream_t stream() const { return stream_; }

 private:
  std::byte* Results() const {
    return exchange_.arena[exchange_.rank] + exchange_.shape.results_offset();
  }

  const size_t max_hosts_;
  std::unique_ptr<CompiledHosts> compiled_;
  Exchange exchange_;
  Batch batch_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<DeviceArray<int32_t>> words_;
  DeviceArray<DeviceHosts> layer_;
  DeviceArray<int32_t> quota_, load_, send_, row_begin_, group_begin_, group_rows_;
  DeviceArray<int32_t> copy_rank_, copy_row_, tile_counts_;
  DeviceArray<int32_t> ids_, histogram_, blocks_;
  DeviceArray<float> weights_, x_, base_, out_, expanded_, activated_;
  DeviceArray<ExchangeState> state_;
};

// All ranks of one placement over one block of memory. They have the last of the places.
class TestRanks {
 public:
  TestRanks(const Placement& placement, const ArenaShape& shape)
      : shape_(shape),
        arena_(shape.bytes() * static_cast<size_t>(shape.num_ranks)),
        place_(static_cast<size_t>(shape.num_ranks)) {
    std::vector<int32_t> places(static_cast<size_t>(shape.num_ranks));
    std::iota(places.begin(), places.end(), shape.places() - shape.num_ranks);
    place_.Write(places);
    for (int32_t r = 0; r < shape.num_ranks; ++r) {
      ranks_.push_back(std::make_unique<TestRank>(placement, shape, r));
      for (int32_t peer = 0; peer < shape.num_ranks; ++peer) {
        ranks_[r]->exchange().arena[peer] = ArenaOf(peer);
      }
      if (shape.num_places > 0) ranks_[r]->exchange().place = place_.data();
      RequireCuda(cudaMemset(ArenaOf(r) + shape.flags_offset(), 0,
                             shape.tokens_offset() - shape.flags_offset()));
    }
  }

  TestRank& rank(int32_t r) { return *ranks_[r]; }

  void Begin(const std::vector<Batch>& batches, uint32_t exchanges) {
    for (size_t r = 0; r < ranks_.size(); ++r) ranks_[r]->Begin(batches[r], exchanges);
  }

  // Exchange `number`, each rank on its stream.
  void Run(const std::vector<Batch>& batches, uint32_t number) {
    Begin(batches, number - 1);
    for (auto& rank : ranks_) rank->LaunchFirstHalf();
    Finish();
  }

  // The same with dispatch and expand of all ranks in one launch.
  void RunTogether(const std::vector<Batch>& batches, uint32_t number, int blocks_per_rank) {
    Begin(batches, number - 1);
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

 private:
  void Finish() {
    RequireCuda(cudaDeviceSynchronize());
    for (auto& rank : ranks_) rank->RunExperts();
    for (auto& rank : ranks_) rank->LaunchSecondHalf();
    RequireCuda(cudaDeviceSynchronize());
  }
  std::byte* ArenaOf(int32_t rank) const {
    return arena_.data() + shape_.bytes() * static_cast<size_t>(rank);
  }

  ArenaShape shape_;
  DeviceArray<std::byte> arena_;
  DeviceArray<int32_t> place_;
  std::vector<std::unique_ptr<TestRank>> ranks_;
};

// Rows of 24 floats: not a multiple of any tile.
inline ArenaShape ShapeFor(const Placement& placement, int32_t max_tokens, int32_t top_k,
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

inline std::vector<Batch> RandomBatches(const ArenaShape& shape, Random* random) {
  std::vector<Batch> batches;
  for (int32_t r = 0; r < shape.num_ranks; ++r) {
    const int32_t tokens = static_cast<int32_t>(random->Below(shape.max_tokens + 1));
    batches.push_back(RandomBatch(shape, random->Below(4) == 0 ? 0 : tokens, random));
  }
  return batches;
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_VIRTUAL_RANKS_H_
