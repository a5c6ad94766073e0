#include "deploy/gpu/bench_gpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "base/random.h"
#include "deploy/gpu/bench_experts.h"
#include "deploy/gpu/bench_layer.h"
#include "deploy/gpu/bench_rank.h"
#include "deploy/gpu/measure.h"
#include "kernels/block_checksum.h"
#include "kernels/gate.h"

namespace ballast {
namespace {

class Bench {
 public:
  explicit Bench(bool small) : small_(small) {}
  GpuBenchResult result;

  // Repetitions: enough to fill the clock's steps, few where an emulator runs.
  absl::Status Add(const char* name, const std::string& shape, double bytes,
                   const std::function<absl::Status(cudaStream_t)>& launch) {
    Times times;
    BALLAST_RETURN_IF_ERROR(Measure(small_ ? 1 : 20, small_ ? 2 : 50, launch, &times));
    result.rows.push_back({name, shape, times.median_us, times.spread_us, bytes, 0});
    return absl::OkStatus();
  }
  int tokens(int wanted) const { return small_ ? std::min(wanted, 12) : wanted; }
  bool small() const { return small_; }

 private:
  bool small_;
};

absl::Status BenchCopy(Bench* bench) {
  const size_t bytes = bench->small() ? 1 << 16 : size_t{2} << 30;
  OnDevice<std::byte> from, to;
  BALLAST_RETURN_IF_ERROR(from.Allocate(bytes));
  BALLAST_RETURN_IF_ERROR(to.Allocate(bytes));
  const auto copy = [&](cudaStream_t stream) -> absl::Status {
    BALLAST_CUDA(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream));
    return absl::OkStatus();
  };
  BALLAST_RETURN_IF_ERROR(bench->Add("copy", absl::StrCat(bytes >> 20, " MiB"),
                                     2.0 * static_cast<double>(bytes), copy));
  const GpuBenchRow& row = bench->result.rows.back();
  bench->result.copy_bytes_per_second = row.bytes / row.median_us * 1e6;
  return absl::OkStatus();
}

absl::Status BenchChecksum(Bench* bench, int32_t thread_blocks) {
  const size_t bytes = bench->small() ? 1 << 16 : size_t{256} << 20;
  OnDevice<std::byte> block;
  OnDevice<uint64_t> sum;
  BALLAST_RETURN_IF_ERROR(block.Allocate(bytes));
  BALLAST_RETURN_IF_ERROR(sum.Allocate(1));
  return bench->Add(
      "block checksum", absl::StrCat(bytes >> 20, " MiB, ", thread_blocks, " thread blocks"),
      static_cast<double>(bytes), [&](cudaStream_t stream) {
        return cuda::AddBlockChecksums({.num_pieces = 1,
                                        .num_thread_blocks = thread_blocks,
                                        .pieces = {{{block.data(), bytes, 0, sum.data()}}}},
                                       stream);
      });
}

absl::Status BenchGate(Bench* bench, const GateRule& rule, int tokens) {
  tokens = bench->tokens(tokens);
  Random random(kBenchSeed);
  const size_t experts = static_cast<size_t>(rule.num_experts);
  std::vector<float> logits(static_cast<size_t>(tokens) * experts), bias(experts);
  for (float& x : logits) x = static_cast<float>(8 * random.Uniform() - 4);
  for (float& x : bias) x = static_cast<float>(random.Uniform() - 0.5);
  OnDevice<float> device_logits, device_bias, weights;
  OnDevice<int32_t> ids, histogram, workspace;
  BALLAST_RETURN_IF_ERROR(device_logits.Set(logits));
  BALLAST_RETURN_IF_ERROR(device_bias.Set(bias));
  BALLAST_RETURN_IF_ERROR(weights.Allocate(static_cast<size_t>(tokens) * rule.top_k));
  BALLAST_RETURN_IF_ERROR(ids.Allocate(weights.size()));
  BALLAST_RETURN_IF_ERROR(histogram.Allocate(2 * experts));
  BALLAST_RETURN_IF_ERROR(workspace.Allocate(2 * experts + 1));
  const double bytes = 4.0 * static_cast<double>(logits.size() + experts + 2 * ids.size());
  return bench->Add("gate",
                    absl::StrCat(tokens, " x ", rule.num_experts, " top-", rule.top_k, " groups ",
                                 rule.num_groups),
                    bytes, [&](cudaStream_t stream) {
                      return cuda::Gate({.rule = rule,
                                         .num_tokens = tokens,
                                         .logits = {device_logits.data(), logits.size()},
                                         .bias = {device_bias.data(), experts},
                                         .ids = {ids.data(), ids.size()},
                                         .weights = {weights.data(), weights.size()},
                                         .histogram = {histogram.data(), histogram.size()},
                                         .workspace = {workspace.data(), workspace.size()}},
                                        stream);
                    });
}

absl::Status BenchSplit(Bench* bench, int32_t experts, int32_t ranks, int32_t slots) {
  std::vector<int32_t> all[4];
  const LayerHosts hosts = RandomHosts(experts, ranks, slots, &all);
  Random random(kBenchSeed);
  std::vector<int32_t> counts(static_cast<size_t>(experts) * ranks);
  for (int32_t e = 0; e < experts; ++e) {  // about 1/rank, at random ranks of the experts
    const double share = 1.0 / (1 + random.Below(static_cast<uint32_t>(experts)));
    for (int32_t r = 0; r < ranks; ++r) {
      counts[static_cast<size_t>(r) * experts + e] =
          static_cast<int32_t>(share * 400 * (0.9 + 0.2 * random.Uniform()));
    }
  }
  OnDevice<int32_t> device_counts;
  BALLAST_RETURN_IF_ERROR(device_counts.Set(counts));
  RankMemory memory(hosts);
  BALLAST_RETURN_IF_ERROR(memory.Make(hosts, 0, device_counts.data(), 1));
  BALLAST_RETURN_IF_ERROR(
      bench->Add("split", absl::StrCat(experts, " experts ", slots, " slots ", ranks, " ranks"),
                 4.0 * static_cast<double>(counts.size()),
                 [&](cudaStream_t stream) { return cuda::SplitOnDevice(memory.split, stream); }));
  return memory.Check();
}

// The whole exchange of `ranks` ranks on this device but for the experts; every step measured alone
// is measured on what the one before left.
class ExchangeBench {
 public:
  ExchangeBench(int32_t experts, int32_t ranks, int32_t tokens, int32_t top_k, int32_t hidden)
      : hosts_(RandomHosts(experts, ranks, experts, &all_)) {
    shape_.num_ranks = ranks;
    shape_.num_experts = experts;
    shape_.max_tokens = tokens;
    shape_.top_k = top_k;
    shape_.row_bytes = 2 * hidden;
    shape_.row_capacity = ranks * tokens * top_k / ranks * 2 + experts * 128;
  }

  absl::Status Make() {
    BALLAST_RETURN_IF_ERROR(CheckArenaShape(shape_));
    BALLAST_RETURN_IF_ERROR(
        arena_.Allocate(shape_.bytes() * static_cast<size_t>(shape_.num_ranks)));
    const size_t row_bytes = static_cast<size_t>(shape_.row_bytes);
    for (int32_t r = 0; r < shape_.num_ranks; ++r) {
      ranks_.push_back(std::make_unique<RankMemory>(hosts_));
      RankMemory& m = *ranks_.back();
      const auto* counts = reinterpret_cast<const int32_t*>(ArenaOf(r) + shape_.counts_offset());
      BALLAST_RETURN_IF_ERROR(m.Make(hosts_, r, counts, 2));
      BALLAST_RETURN_IF_ERROR(m.MakeRoute(hosts_, r, shape_.max_tokens, shape_.top_k));
      m.split.row_capacity = shape_.row_capacity;
      BALLAST_RETURN_IF_ERROR(m.x.Allocate(static_cast<size_t>(shape_.max_tokens) * row_bytes));
      BALLAST_RETURN_IF_ERROR(
          m.expanded.Allocate(static_cast<size_t>(shape_.row_capacity) * row_bytes));
      BALLAST_RETURN_IF_ERROR(m.weights.Allocate(m.ids.size()));
      BALLAST_RETURN_IF_ERROR(
          m.base.Allocate(static_cast<size_t>(shape_.max_tokens) * row_bytes / 2));
      Exchange exchange;
      exchange.shape = shape_;
      for (int32_t peer = 0; peer < shape_.num_ranks; ++peer) exchange.arena[peer] = ArenaOf(peer);
      exchange.rank = r;
      exchange.deadline_ns = 2'000'000'000;
      exchange.state = m.state.data();
      virtual_.push_back({{.num_tokens = shape_.max_tokens,
                           .x = m.x.data(),
                           .copy_rank = m.copy_rank.data(),
                           .copy_row = m.copy_row.data()},
                          {.own = m.x.data(), .x = m.expanded.data()},
                          exchange});
    }
    return device_virtual_.Set(virtual_);
  }

  // Counts, split and routes of all ranks, each on a stream of its own.
  absl::Status Split() {
    std::vector<cudaStream_t> streams(ranks_.size());
    for (size_t r = 0; r < ranks_.size(); ++r) {
      BALLAST_CUDA(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
      BALLAST_RETURN_IF_ERROR(cuda::ExchangeCountsAndSplit(
          ranks_[r]->split, virtual_[r].exchange, ranks_[r]->histogram.data(), streams[r]));
      BALLAST_RETURN_IF_ERROR(cuda::RouteCopies(ranks_[r]->route, streams[r]));
    }
    BALLAST_CUDA(cudaDeviceSynchronize());
    for (cudaStream_t stream : streams) BALLAST_CUDA(cudaStreamDestroy(stream));
    return StatusOfAll();
  }

  absl::Status Run(Bench* bench) {
    BALLAST_RETURN_IF_ERROR(Make());
    BALLAST_RETURN_IF_ERROR(Split());
    const std::string shape =
        absl::StrCat(shape_.num_ranks, " ranks x ", shape_.max_tokens, " tokens x ",
                     shape_.row_bytes / 2, " top-", shape_.top_k);
    const double rows = static_cast<double>(shape_.num_ranks) * shape_.max_tokens;
    const double row_bytes = shape_.row_bytes;
    if (shape_.num_ranks == 1) {
      BALLAST_RETURN_IF_ERROR(bench->Add(
          "route", shape, 12 * rows * shape_.top_k,
          [&](cudaStream_t stream) { return cuda::RouteCopies(ranks_[0]->route, stream); }));
      BALLAST_RETURN_IF_ERROR(BenchCombine(bench, shape));
    }
    // Rows read once and written once per copy.
    BALLAST_ASSIGN_OR_RETURN(const int32_t resident, cuda::MostResidentBlocks());
    const int blocks = std::min(std::max(resident / shape_.num_ranks, 1), shape_.max_tokens);
    const auto launch = [&](cudaStream_t stream) -> absl::Status {
      BALLAST_RETURN_IF_ERROR(
          cuda::AdvanceNumbers(device_virtual_.data(), shape_.num_ranks, stream));
      return cuda::DispatchAndExpand(device_virtual_.data(), shape_.num_ranks, blocks, stream);
    };
    BALLAST_RETURN_IF_ERROR(bench->Add(shape_.num_ranks == 1 ? "permute" : "dispatch and expand",
                                       shape, rows * row_bytes * (1 + shape_.top_k), launch));
    return StatusOfAll();
  }

 private:
  absl::Status StatusOfAll() const {
    for (const auto& rank : ranks_) BALLAST_RETURN_IF_ERROR(rank->Check());
    return absl::OkStatus();
  }
  std::byte* ArenaOf(int32_t rank) const {
    return arena_.data() + shape_.bytes() * static_cast<size_t>(rank);
  }

  absl::Status BenchCombine(Bench* bench, const std::string& shape) {
    RankMemory& m = *ranks_[0];
    const PullCombineArgs args = {.num_tokens = shape_.max_tokens,
                                  .type = DType::kBF16,
                                  .copy_rank = m.copy_rank.data(),
                                  .copy_row = m.copy_row.data(),
                                  .weights = m.weights.data(),
                                  .base = m.base.data(),
                                  .out = m.base.data()};
    const double rows = shape_.max_tokens, row_bytes = shape_.row_bytes;
    // The copies' rows, and the sums in fp32, read and written.
    return bench->Add(
        "combine", shape, rows * row_bytes * (shape_.top_k + 4),
        [&](cudaStream_t stream) { return cuda::PullCombine(args, virtual_[0].exchange, stream); });
  }

  std::vector<int32_t> all_[4];
  LayerHosts hosts_;
  ArenaShape shape_;
  OnDevice<std::byte> arena_;
  std::vector<std::unique_ptr<RankMemory>> ranks_;
  std::vector<VirtualRank> virtual_;
  OnDevice<VirtualRank> device_virtual_;
};

}  // namespace

absl::StatusOr<GpuBenchResult> RunGpuBench(bool small) {
  // Ranks that share the device wait for each other's kernels: each needs a queue of its own, and
  // no kernel may be loaded while others spin.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  Bench bench(small);
  cudaDeviceProp properties;
  BALLAST_CUDA(cudaGetDeviceProperties(&properties, 0));
  bench.result.device = properties.name;
  BALLAST_RETURN_IF_ERROR(BenchCopy(&bench));
  for (const int32_t blocks : {4, 132}) BALLAST_RETURN_IF_ERROR(BenchChecksum(&bench, blocks));
  const GateRule deepseek = {.num_experts = 256, .top_k = 8, .num_groups = 8, .top_groups = 4};
  const GateRule qwen = {.num_experts = 128, .top_k = 8}, olmoe = {.num_experts = 64, .top_k = 8};
  for (const int tokens : {1, 128, 8192}) {
    BALLAST_RETURN_IF_ERROR(BenchGate(&bench, deepseek, tokens));
  }
  BALLAST_RETURN_IF_ERROR(BenchGate(&bench, qwen, 8192));
  BALLAST_RETURN_IF_ERROR(BenchGate(&bench, olmoe, 8192));
  BALLAST_RETURN_IF_ERROR(BenchSplit(&bench, 256, 32, 288));
  BALLAST_RETURN_IF_ERROR(BenchSplit(&bench, 128, 8, 144));
  const int tokens = bench.tokens(4096), hidden = small ? 64 : 7168;
  BALLAST_RETURN_IF_ERROR(ExchangeBench(256, 1, tokens, 8, hidden).Run(&bench));
  BALLAST_RETURN_IF_ERROR(ExchangeBench(128, 1, tokens, 8, small ? 64 : 2048).Run(&bench));
  BALLAST_RETURN_IF_ERROR(ExchangeBench(256, 8, bench.tokens(512), 8, hidden).Run(&bench));
  BALLAST_RETURN_IF_ERROR(BenchExperts(small, &bench.result));
  BALLAST_RETURN_IF_ERROR(BenchLayers(small, &bench.result));
  return std::move(bench.result);
}

}  // namespace ballast
