#include "deploy/gpu/bench_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "base/dtype.h"
#include "base/random.h"
#include "deploy/gpu/bench_rank.h"
#include "deploy/gpu/measure.h"
#include "kernels/device_matmul.h"
#include "kernels/gate.h"
#include "kernels/grouped_mlp.h"

namespace ballast {
namespace {

struct Model {
  const char* name;
  int32_t hidden, inter;
  GateRule rule;
};
constexpr Model kModels[] = {
    {"DeepSeek-V3",
     7168,
     2048,
     {.num_experts = 256, .top_k = 8, .num_groups = 8, .top_groups = 4, .scale = 2.5f}},
    {"Qwen3-30B-A3B", 2048, 768, {.num_experts = 128, .top_k = 8}},
    {"OLMoE", 2048, 1024, {.num_experts = 64, .top_k = 8}},
};
constexpr Model kSmallModel = {"small", 64, 32, {.num_experts = 8, .top_k = 2}};

// Of all ranks together. Fewer than a device has multiprocessors: whoever waits for a peer keeps
// its place, and the experts, which want whole ones, must find some that are free.
constexpr int32_t kWaitingBlocks = 128;

// Uniform in [-most, most).
std::vector<float> RandomFloats(size_t count, double most, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(most * (2 * random.Uniform() - 1));
  return values;
}

// What all ranks of a layer read.
struct Parameters {
  OnDevice<float> router, bias;
  OnDevice<std::byte> arena;  // expert e in block e
  size_t block_bytes = 0;

  absl::Status Make(const Model& model, bool small) {
    const ExpertShape shape = {.hidden = model.hidden, .inter = model.inter, .dtype = DType::kBF16};
    const size_t experts = static_cast<size_t>(model.rule.num_experts);
    block_bytes = shape.packed_bytes();
    BALLAST_RETURN_IF_ERROR(arena.Allocate(experts * block_bytes));
    BALLAST_RETURN_IF_ERROR(FillWithNoise(&arena, small));
    BALLAST_RETURN_IF_ERROR(bias.Allocate(experts));
    // Tokens are in [-1, 1): logits then have a variance of 1.
    const double most = 3.0 / std::sqrt(model.hidden);
    return router.Set(RandomFloats(experts * static_cast<size_t>(model.hidden), most, kBenchSeed));
  }
};

// One rank of the layer. After Make its addresses stay.
class LayerRank {
 public:
  LayerRank(const Model& model, const LayerHosts& hosts, const Exchange& exchange,
            const Parameters& parameters)
      : model_(model), exchange_(exchange), parameters_(parameters), memory_(hosts) {}

  // SHAPES x [T, hidden]: the tokens of this rank
  absl::Status Make(const LayerHosts& hosts, const std::vector<float>& x, GroupSize size) {
    const ArenaShape& shape = exchange_.shape;
    const size_t tokens = static_cast<size_t>(shape.max_tokens);
    const size_t hidden = static_cast<size_t>(model_.hidden), copies = tokens * shape.top_k;
    const size_t experts = static_cast<size_t>(shape.num_experts);
    const auto* counts = reinterpret_cast<const int32_t*>(Own(shape.counts_offset()));
    BALLAST_RETURN_IF_ERROR(memory_.Make(hosts, exchange_.rank, counts, shape.num_kinds));
    BALLAST_RETURN_IF_ERROR(
        memory_.MakeRoute(hosts, exchange_.rank, shape.max_tokens, shape.top_k));
    memory_.split.row_capacity = shape.row_capacity;
    exchange_.state = memory_.state.data();
    std::vector<std::byte> rounded(x.size() * sizeof(BFloat16));
    for (size_t i = 0; i < x.size(); ++i) {
      reinterpret_cast<BFloat16*>(rounded.data())[i] = ToBFloat16(x[i]);
    }
    BALLAST_RETURN_IF_ERROR(x_.Set(x));
    BALLAST_RETURN_IF_ERROR(memory_.x.Set(rounded));
    BALLAST_RETURN_IF_ERROR(memory_.base.Allocate(x.size()));
    BALLAST_RETURN_IF_ERROR(memory_.weights.Allocate(copies));
    BALLAST_RETURN_IF_ERROR(logits_.Allocate(tokens * experts));
    BALLAST_RETURN_IF_ERROR(workspace_.Allocate(2 * experts + 1));
    const size_t rows = static_cast<size_t>(shape.row_capacity);
    BALLAST_RETURN_IF_ERROR(memory_.expanded.Allocate(rows * hidden * sizeof(BFloat16)));
    BALLAST_RETURN_IF_ERROR(
        activated_.Allocate(rows * static_cast<size_t>(model_.inter) * sizeof(BFloat16)));
    return MakeGroups(size);
  }

  absl::Status Launch(cudaStream_t stream) const {
    const int32_t tokens = exchange_.shape.max_tokens;
    BALLAST_RETURN_IF_ERROR(cuda::PlainMatmul({.m = tokens,
                                               .n = model_.rule.num_experts,
                                               .k = model_.hidden,
                                               .dtype = DType::kF32,
                                               .x = x_.data(),
                                               .w = parameters_.router.data(),
                                               .y = logits_.data()},
                                              stream));
    BALLAST_RETURN_IF_ERROR(
        cuda::Gate({.rule = model_.rule,
                    .num_tokens = tokens,
                    .logits = {logits_.data(), logits_.size()},
                    .bias = {parameters_.bias.data(), parameters_.bias.size()},
                    .ids = {memory_.ids.data(), memory_.ids.size()},
                    .weights = {memory_.weights.data(), memory_.weights.size()},
                    .histogram = {memory_.histogram.data(), memory_.histogram.size()},
                    .workspace = {workspace_.data(), workspace_.size()}},
                   stream));
    BALLAST_RETURN_IF_ERROR(
        cuda::ExchangeCountsAndSplit(memory_.split, exchange_, memory_.histogram.data(), stream));
    BALLAST_RETURN_IF_ERROR(cuda::RouteCopies(memory_.route, stream));
    BALLAST_RETURN_IF_ERROR(cuda::Dispatch({.num_tokens = tokens,
                                            .x = memory_.x.data(),
                                            .copy_rank = memory_.copy_rank.data(),
                                            .copy_row = memory_.copy_row.data()},
                                           exchange_, stream));
    BALLAST_RETURN_IF_ERROR(
        cuda::Expand({.own = memory_.x.data(), .x = memory_.expanded.data()}, exchange_, stream));
    BALLAST_RETURN_IF_ERROR(cuda::GroupedMlp(experts_, stream));
    return cuda::PullCombine({.num_tokens = tokens,
                              .type = DType::kBF16,
                              .copy_rank = memory_.copy_rank.data(),
                              .copy_row = memory_.copy_row.data(),
                              .weights = memory_.weights.data(),
                              .base = memory_.base.data(),
                              .out = memory_.base.data()},
                             exchange_, stream);
  }

  // After a launch: how many experts this rank had rows for, how many rows, and its sums [T,
  // hidden] behind those of `sums`.
  absl::Status Read(int32_t* experts, int64_t* rows, std::vector<float>* sums) const {
    BALLAST_RETURN_IF_ERROR(memory_.Check());
    const size_t before = sums->size();
    sums->resize(before + memory_.base.size());
    BALLAST_CUDA(cudaMemcpy(sums->data() + before, memory_.base.data(),
                            memory_.base.size() * sizeof(float), cudaMemcpyDeviceToHost));
    std::vector<int32_t> of_group(static_cast<size_t>(memory_.split.max_groups));
    BALLAST_CUDA(cudaMemcpy(of_group.data(), memory_.group_rows.data(),
                            of_group.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
    for (const int32_t n : of_group) {
      *experts += n > 0;
      *rows += n;
    }
    return absl::OkStatus();
  }

 private:
  std::byte* Own(size_t offset) const { return exchange_.arena[exchange_.rank] + offset; }

  // Which expert each group is of, and what computes them.
  absl::Status MakeGroups(GroupSize size) {
    const ArenaShape& shape = exchange_.shape;
    const int32_t rank = exchange_.rank, num_groups = memory_.split.max_groups;
    const DeviceHosts hosts = memory_.compiled.At(memory_.compiled.words().data());
    std::vector<int32_t> blocks(static_cast<size_t>(num_groups));
    for (int32_t g = 0; g < memory_.compiled.num_groups(rank); ++g) {
      blocks[static_cast<size_t>(g)] =
          hosts.expert_of_host[hosts.rank_hosts[hosts.rank_offsets[rank] + g]];
    }
    BALLAST_RETURN_IF_ERROR(blocks_.Set(blocks));
    experts_ = {.shape = {.hidden = model_.hidden, .inter = model_.inter, .dtype = DType::kBF16},
                .groups = {.num_groups = num_groups,
                           .num_rows = shape.row_capacity,
                           .max_rows = shape.max_tokens * shape.top_k,  // as many go out as come in
                           .size = size,
                           .begin = memory_.group_begin.data(),
                           .rows = memory_.group_rows.data(),
                           .block = blocks_.data(),
                           .arena = parameters_.arena.data(),
                           .block_bytes = parameters_.block_bytes,
                           .num_blocks = shape.num_experts},
                .x = memory_.expanded.data(),
                .activated = activated_.data(),
                .y = Own(shape.results_offset())};
    return absl::OkStatus();
  }

  const Model& model_;
  Exchange exchange_;
  const Parameters& parameters_;
  RankMemory memory_;
  OnDevice<float> x_, logits_;
  OnDevice<int32_t> workspace_, blocks_;
  OnDevice<std::byte> activated_;
  GroupedMlpArgs experts_;
};

ArenaShape ShapeOf(const Model& model, int32_t num_ranks, int32_t tokens_per_rank) {
  const GateRule& rule = model.rule;
  ArenaShape shape;
  shape.num_ranks = num_ranks;
  shape.num_experts = rule.num_experts;
  shape.max_tokens = tokens_per_rank;
  shape.top_k = rule.top_k;
  shape.row_bytes = model.hidden * static_cast<int32_t>(sizeof(BFloat16));
  // Every expert has one host, so a rank may get twice what is even, and more of a small batch.
  const int32_t copies = num_ranks * tokens_per_rank * rule.top_k;
  const int32_t groups = (rule.num_experts + num_ranks - 1) / num_ranks;
  shape.row_capacity = std::min(copies, 2 * copies / num_ranks + 1024) + groups * kBenchRowAlign;
  return shape;
}

// `sums` gets those of all tokens.
absl::Status Run(const Model& model, const Parameters& parameters, int32_t num_ranks,
                 int32_t tokens, bool small, GpuBenchResult* result, std::vector<float>* sums) {
  const GateRule& rule = model.rule;
  const ArenaShape shape = ShapeOf(model, num_ranks, tokens / num_ranks);
  BALLAST_RETURN_IF_ERROR(CheckArenaShape(shape));
  std::vector<int32_t> all[4];
  const LayerHosts hosts = RandomHosts(rule.num_experts, num_ranks, rule.num_experts, &all);
  OnDevice<std::byte> arena;
  BALLAST_RETURN_IF_ERROR(arena.Allocate(shape.bytes() * static_cast<size_t>(num_ranks)));
  Exchange exchange;
  exchange.shape = shape;
  exchange.deadline_ns = 2'000'000'000;
  if (num_ranks > 1) exchange.max_blocks = kWaitingBlocks / num_ranks;
  for (int32_t r = 0; r < num_ranks; ++r) {
    exchange.arena[r] = arena.data() + shape.bytes() * static_cast<size_t>(r);
  }
  std::vector<std::unique_ptr<LayerRank>> ranks;
  std::vector<LaunchFunction> launches;
  const GroupSize size =
      tokens * rule.top_k / rule.num_experts >= 64 ? GroupSize::kLarge : GroupSize::kSmall;
  const size_t per_rank = static_cast<size_t>(shape.max_tokens) * static_cast<size_t>(model.hidden);
  const std::vector<float> x =
      RandomFloats(per_rank * static_cast<size_t>(num_ranks), 1.0, kBenchSeed + 1);
  for (exchange.rank = 0; exchange.rank < num_ranks; ++exchange.rank) {
    ranks.push_back(std::make_unique<LayerRank>(model, hosts, exchange, parameters));
    const auto first = x.begin() + static_cast<std::ptrdiff_t>(exchange.rank * per_rank);
    const auto last = first + static_cast<std::ptrdiff_t>(per_rank);
    BALLAST_RETURN_IF_ERROR(ranks.back()->Make(hosts, {first, last}, size));
    launches.push_back(
        [rank = ranks.back().get()](cudaStream_t stream) { return rank->Launch(stream); });
  }
  Times times;
  BALLAST_RETURN_IF_ERROR(MeasureTogether(small ? 1 : 5, small ? 2 : 30, launches, &times));
  int32_t chosen = 0;
  int64_t rows = 0;
  for (const auto& rank : ranks) BALLAST_RETURN_IF_ERROR(rank->Read(&chosen, &rows, sums));
  if (rows != int64_t{tokens} * rule.top_k) {
    return absl::InternalError(absl::StrCat("a layer computed ", rows, " rows of ",
                                            int64_t{tokens} * rule.top_k, " copies"));
  }
  // A token comes as fp32 for the gate and as bf16; its sum is read and written.
  const double values = static_cast<double>(tokens) * model.hidden;
  const double routers = static_cast<double>(rule.num_experts) * model.hidden;
  result->rows.push_back(
      {.name = "layer",
       .shape = absl::StrCat(model.name, " ", num_ranks, num_ranks == 1 ? " rank" : " ranks", " x ",
                             shape.max_tokens, " tokens"),
       .median_us = times.median_us,
       .spread_us = times.spread_us,
       .bytes = chosen * static_cast<double>(parameters.block_bytes) + 4.0 * routers +
                (4 + 2 + 4 + 4) * values,
       .flops =
           2.0 * tokens * routers + 6.0 * static_cast<double>(rows) * model.hidden * model.inter});
  return absl::OkStatus();
}

absl::Status BenchModel(const Model& model, std::vector<int32_t> ranks, std::vector<int32_t> tokens,
                        bool small, GpuBenchResult* result) {
  Parameters parameters;
  BALLAST_RETURN_IF_ERROR(parameters.Make(model, small));
  for (const int32_t t : tokens) {
    std::vector<float> alone;
    for (const int32_t n : ranks) {
      std::vector<float> sums;
      BALLAST_RETURN_IF_ERROR(Run(model, parameters, n, t, small, result, &sums));
      if (alone.empty()) alone = sums;
      // Bits do not depend on where a token or an expert is.
      if (std::memcmp(sums.data(), alone.data(), alone.size() * sizeof(float)) != 0) {
        return absl::InternalError(absl::StrCat("a layer of ", model.name, " over ", n,
                                                " ranks gave other sums than over ", ranks[0],
                                                " for the same ", t, " tokens"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchLayers(bool small, GpuBenchResult* result) {
  if (small) return BenchModel(kSmallModel, {1, 4}, {12}, small, result);
  for (const Model& model : kModels) {
    BALLAST_RETURN_IF_ERROR(BenchModel(model, {1, 8}, {128, 4096}, small, result));
  }
  return absl::OkStatus();
}

}  // namespace ballast
