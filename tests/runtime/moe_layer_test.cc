#include "runtime/moe_layer.h"

#include <sched.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>

#include "base/random.h"
#include "base/status.h"
#include "tests/placement/random_instances.h"
#include "tests/support/run_ranks.h"

namespace ballast {
namespace {

using testing::FirstError;
using testing::RunRanks;

// One MoE layer's parameters and a batch, in fp32.
struct Instance {
  GateRule rule;
  int32_t hidden = 0, inter = 0, tokens = 0;
  std::vector<float> router = {}, bias = {};                     // [E, H], [E]
  std::vector<std::vector<float>> gate = {}, up = {}, down = {};  // per expert
  std::vector<float> x = {}, base = {};                          // [T, H]
};

std::vector<float> Draw(size_t count, Random* random, double spread) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(spread * (2 * random->Uniform() - 1));
  return values;
}

Instance RandomInstance(uint64_t seed, const GateRule& rule, int32_t tokens, int32_t hidden = 24) {
  Random random(seed);
  Instance in{.rule = rule, .hidden = hidden, .inter = 16, .tokens = tokens};
  const size_t experts = static_cast<size_t>(rule.num_experts);
  const size_t h = static_cast<size_t>(in.hidden), f = static_cast<size_t>(in.inter);
  in.router = Draw(experts * h, &random, 1.0);
  in.bias = Draw(experts, &random, 0.2);
  for (size_t e = 0; e < experts; ++e) {
    in.gate.push_back(Draw(f * h, &random, 0.4));
    in.up.push_back(Draw(f * h, &random, 0.4));
    in.down.push_back(Draw(h * f, &random, 0.4));
  }
  in.x = Draw(static_cast<size_t>(tokens) * h, &random, 1.5);
  in.base = Draw(static_cast<size_t>(tokens) * h, &random, 1.0);
  return in;
}

// Numbers on which fp32 makes no rounding: the activation's gate is always 32, where silu is exact;
// logits are 0 or 32, whose sigmoids are 1/2 and 1; the rest are small integers.
Instance ExactInstance(uint64_t seed, GateRule rule, int32_t tokens) {
  rule.renormalise = false;
  rule.scale = 2.0f;
  Random random(seed);
  Instance in = RandomInstance(seed, rule, tokens);
  const size_t h = static_cast<size_t>(in.hidden);
  const auto small = [&] { return static_cast<float>(random.Below(5)) - 2.0f; };
  std::fill(in.router.begin(), in.router.end(), 0.0f);
  for (size_t e = 0; e < in.bias.size(); ++e) {
    in.router[e * h + 1 + e % 7] = 32.0f;
    in.bias[e] = static_cast<float>(random.Below(64)) / 256.0f - 0.125f;
    std::fill(in.gate[e].begin(), in.gate[e].end(), 0.0f);
    for (size_t row = 0; row < static_cast<size_t>(in.inter); ++row) in.gate[e][row * h] = 1.0f;
    for (float& v : in.up[e]) v = small();
    for (float& v : in.down[e]) v = small();
  }
  for (size_t i = 0; i < in.x.size(); ++i) {
    const size_t at = i % h;
    in.x[i] = at == 0 ? 32.0f : at < 8 ? static_cast<float>(random.Below(2)) : small();
    in.base[i] = small();
  }
  return in;
}

// The layer by definition: every expert on every token, in fp64, without ranks.
std::vector<double> DenseOracle(const Instance& in) {
  const size_t h = static_cast<size_t>(in.hidden), f = static_cast<size_t>(in.inter);
  const size_t experts = static_cast<size_t>(in.rule.num_experts);
  std::vector<double> y(in.base.begin(), in.base.end());
  for (size_t t = 0; t < static_cast<size_t>(in.tokens); ++t) {
    const float* x = &in.x[t * h];
    std::vector<double> score(experts);
    std::vector<size_t> order(experts);
    for (size_t e = 0; e < experts; ++e) {
      double logit = 0;
      for (size_t i = 0; i < h; ++i) logit += double{in.router[e * h + i]} * x[i];
      score[e] = 1 / (1 + std::exp(-logit));
      order[e] = e;
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return score[a] + in.bias[a] > score[b] + in.bias[b];
    });
    order.resize(static_cast<size_t>(in.rule.top_k));
    double sum = 0;
    for (size_t e : order) sum += score[e];
    for (size_t e : order) {
      const double weight = score[e] / (in.rule.renormalise ? sum : 1.0) * in.rule.scale;
      for (size_t row = 0; row < f; ++row) {
        double g = 0, u = 0;
        for (size_t i = 0; i < h; ++i) {
          g += double{in.gate[e][row * h + i]} * x[i];
          u += double{in.up[e][row * h + i]} * x[i];
        }
        const double act = g / (1 + std::exp(-g)) * u;
        for (size_t i = 0; i < h; ++i) y[t * h + i] += weight * act * in.down[e][i * f + row];
      }
    }
  }
  return y;
}

struct RunOptions {
  std::vector<Placement> placements = {};  // one after the other, with a migration between
  SplitMode split = SplitMode::kExact;
  const KernelSet* kernels = &PlainKernels();
  DType dtype = DType::kF32;
  bool first_rank_empty = false;      // else tokens are dealt round
  int32_t num_decode = INT32_MAX;     // tokens before this one are decode, the others prefill
};

// One rank's part of a run.
class RankRun {
 public:
  RankRun(const Instance& in, const RunOptions& options, Transport* transport, Communicator* comm)
      : in_(in), options_(options), transport_(transport), comm_(comm) {
    const int ranks = comm->size(), rank = comm->rank();
    for (int32_t t = 0; t < in.tokens; ++t) {
      const int owner = options.first_rank_empty && ranks > 1 ? 1 + t % (ranks - 1) : t % ranks;
      if (owner == rank) mine_.push_back(t);
    }
    // Tokens from number `num_decode` on are prefill: the last of every rank.
    num_prefill_ = static_cast<int32_t>(std::count_if(
        mine_.begin(), mine_.end(), [&](int32_t t) { return t >= options.num_decode; }));
  }

  absl::Status Run(std::vector<std::vector<float>>* outputs, std::vector<LayerCounts>* counts) {
    BALLAST_RETURN_IF_ERROR(Load());
    const Placement* current = &options_.placements.front();
    auto table = std::make_unique<DispatchTable>(*current, comm_->rank(), *store_, nullptr);
    for (size_t i = 0; i < options_.placements.size(); ++i) {
      if (i > 0) {
        BALLAST_RETURN_IF_ERROR(Migrate(*current, options_.placements[i]));
        current = &options_.placements[i];
        table = std::make_unique<DispatchTable>(*current, comm_->rank(), *store_, table.get());
      }
      BALLAST_RETURN_IF_ERROR(Step(table.get(), &(*outputs)[i], &(*counts)[i]));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Load() {
    BALLAST_ASSIGN_OR_RETURN(executor_, MoeExecutor::Create({.gate = in_.rule,
                                                             .hidden = in_.hidden,
                                                             .expert_inter = in_.inter,
                                                             .dtype = options_.dtype,
                                                             .split = options_.split},
                                                            *options_.kernels));
    executor_->Connect(comm_);
    router_.packed = AlignedBuffer(executor_->gate_matmul().packed_bytes());
    BALLAST_RETURN_IF_ERROR(
        executor_->gate_matmul().Pack(in_.router.data(), DType::kF32, router_.packed.data()));
    router_.bias = in_.bias;
    const Placement& first = options_.placements.front();
    const int32_t slots = first.topology().slots_on(comm_->rank());
    store_ = std::make_unique<ExpertStore>(
        ExpertStore::Options{.rank = comm_->rank(),
                             .num_layers = 1,
                             .num_experts = in_.rule.num_experts,
                             .block_bytes = executor_->expert_mlp().packed_bytes(),
                             .resident_blocks = slots,
                             .staging_blocks = 64,
                             .chunk_bytes = 1 << 10},
        transport_);
    for (int32_t e = 0; e < in_.rule.num_experts; ++e) {
      if (!first.Hosts(0, e, comm_->rank())) continue;
      BALLAST_RETURN_IF_ERROR(executor_->expert_mlp().Pack(
          in_.gate[e].data(), in_.up[e].data(), in_.down[e].data(), DType::kF32,
          store_->Allocate(0, e).data()));
      BALLAST_RETURN_IF_ERROR(store_->Seal(0, e));
    }
    return absl::OkStatus();
  }

  absl::Status Migrate(const Placement& from, const Placement& to) {
    const auto row = to.expert_of_slot(0);
    BALLAST_ASSIGN_OR_RETURN(const MigrationPlan plan,
                             MakeMigrationPlan(from, {{0, {row.begin(), row.end()}}}, 1));
    BALLAST_RETURN_IF_ERROR(store_->Stage(plan, from));
    while (true) {
      TransferBudget budget{1 << 20, 1 << 20};
      BALLAST_ASSIGN_OR_RETURN(const bool done, store_->Poll(&budget));
      if (done) break;
      sched_yield();
    }
    store_->Commit(to);
    return absl::OkStatus();
  }

  absl::Status Step(DispatchTable* table, std::vector<float>* y, LayerCounts* counts) {
    const size_t h = static_cast<size_t>(in_.hidden);
    const size_t rows = RoundUp(mine_.size(), kRowBlock);
    AlignedBuffer x(rows * h * sizeof(float)), act(rows * h * SizeOf(options_.dtype));
    std::vector<float> base(mine_.size() * h), out(mine_.size() * h);
    for (size_t i = 0; i < base.size(); ++i) {
      const size_t from = static_cast<size_t>(mine_[i / h]) * h + i % h;
      x.as<float>()[i] = in_.x[from];
      base[i] = in_.base[from];
      if (options_.dtype == DType::kF32) {
        act.as<float>()[i] = in_.x[from];
      } else {
        act.as<BFloat16>()[i] = ToBFloat16(in_.x[from]);
      }
    }
    BALLAST_RETURN_IF_ERROR(executor_->Run(table, {.layer = 0,
                                                   .num_tokens = static_cast<int32_t>(mine_.size()),
                                                   .num_prefill = num_prefill_,
                                                   .x_f32 = x.as<float>(),
                                                   .x_act = act.data(),
                                                   .router = router_.view(),
                                                   .while_waiting = nullptr,
                                                   .base = base.data(),
                                                   .y = out.data(),
                                                   .counts = counts}));
    for (size_t i = 0; i < out.size(); ++i) {
      (*y)[static_cast<size_t>(mine_[i / h]) * h + i % h] = out[i];
    }
    return absl::OkStatus();
  }

  const Instance& in_;
  const RunOptions& options_;
  Transport* transport_;
  Communicator* comm_;
  std::vector<int32_t> mine_;  // tokens of this rank
  int32_t num_prefill_ = 0;    // the last of them
  std::unique_ptr<MoeExecutor> executor_;
  std::unique_ptr<ExpertStore> store_;
  RouterParameters router_;
};

// The outputs [T, H] under each placement. Also checks that the ranks know the same counts, that
// these are logical (those of the first placement), and that every copy was computed once.
std::vector<std::vector<float>> RunLayer(const Instance& in, const RunOptions& options,
                                         LayerCounts* of_first_round = nullptr) {
  const int ranks = options.placements.front().topology().num_ranks();
  const size_t rounds = options.placements.size();
  std::vector<std::vector<float>> outputs(rounds, std::vector<float>(in.x.size()));
  std::vector<std::vector<LayerCounts>> counts(static_cast<size_t>(ranks),
                                               std::vector<LayerCounts>(rounds));
  const auto statuses = RunRanks(ranks, [&](Transport* transport, Communicator* comm, int rank) {
    return RankRun(in, options, transport, comm).Run(&outputs, &counts[rank]);
  });
  REQUIRE(FirstError(statuses) == "");
  for (size_t i = 0; i < rounds; ++i) {
    for (const auto& own : counts) {
      REQUIRE(own[i].counts == counts[0][0].counts);
      REQUIRE(own[i].rank_load == counts[0][i].rank_load);
    }
    int64_t load = 0;
    for (int64_t copies : counts[0][i].rank_load) load += copies;
    REQUIRE(load == int64_t{in.tokens} * in.rule.top_k);
  }
  if (of_first_round != nullptr) *of_first_round = counts[0][0];
  return outputs;
}

Placement Contiguous(int32_t experts, int ranks) {
  auto placement =
      Placement::Contiguous(1, experts, Topology::Uniform(ranks, (experts + ranks - 1) / ranks),
                            false);
  REQUIRE(placement.ok());
  return *placement;
}

Placement RandomRows(int32_t experts, const Topology& topology, int64_t epoch, Random* random) {
  auto placement =
      Placement::Create(1, experts, topology,
                        testing::RandomRow(random, topology.num_slots(), experts), epoch);
  REQUIRE(placement.ok());
  return *placement;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST_CASE("the layer equals the dense definition on exact data", "[runtime][moe]") {
  Random random(1);
  for (int ranks : {1, 2, 3, 4}) {
    for (SplitMode split : kAllSplitModes) {
      CAPTURE(ranks, NameOf(split));
      const Instance in = ExactInstance(random.Next(), {.num_experts = 11, .top_k = 4}, 37);
      const Topology topology = Topology::Uniform(ranks, 5 + 11 / ranks);
      const auto y = RunLayer(in, {.placements = {RandomRows(11, topology, 3, &random)},
                                   .split = split});
      // The true sums are integers; fp64's sigmoids of 32 miss 1 in the last places.
      std::vector<double> want = DenseOracle(in);
      for (double& v : want) v = std::nearbyint(v);
      size_t wrong = 0;
      for (size_t i = 0; i < want.size(); ++i) wrong += y[0][i] != want[i];
      REQUIRE(wrong == 0);
    }
  }
}

TEST_CASE("the layer is within its bound of fp64 on random data", "[runtime][moe]") {
  const Instance in = RandomInstance(5, {.num_experts = 10, .top_k = 3, .scale = 1.5f}, 40);
  const auto y = RunLayer(in, {.placements = {Contiguous(10, 3)}});
  const std::vector<double> want = DenseOracle(in);
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::abs(y[0][i] - want[i]));
  CAPTURE(worst);
  // Values are of order one; a few dozen fp32 roundings each.
  REQUIRE(worst < 3e-6);
}

TEST_CASE("the bits depend on neither placement nor split nor ranks nor flips",
          "[runtime][moe][property]") {
  std::vector<std::pair<const KernelSet*, DType>> backends = {{&PlainKernels(), DType::kF32},
                                                              {&PlainKernels(), DType::kBF16}};
  if (OneDnnKernels() != nullptr) backends.emplace_back(OneDnnKernels(), DType::kF32);
  if (cpu::OneDnnHasBFloat16()) backends.emplace_back(OneDnnKernels(), DType::kBF16);
  Random random(2);
  for (const auto& [kernels, dtype] : backends) {
    const Instance in = RandomInstance(
        random.Next(), {.num_experts = 12, .top_k = 4, .num_groups = 3, .top_groups = 2}, 45);
    const auto reference = RunLayer(
        in, {.placements = {Contiguous(12, 1)}, .kernels = kernels, .dtype = dtype});
    for (int ranks : {1, 2, 3, 4}) {
      for (SplitMode split : kAllSplitModes) {
        CAPTURE(kernels->name, NameOf(dtype), ranks, NameOf(split));
        const Topology topology = Topology::Uniform(ranks, 4 + 12 / ranks);
        RunOptions options{.split = split, .kernels = kernels, .dtype = dtype,
                           .first_rank_empty = split == SplitMode::kEven};
        for (int64_t epoch = 0; epoch < 3; ++epoch) {
          options.placements.push_back(RandomRows(12, topology, epoch, &random));
        }
        for (const auto& y : RunLayer(in, options)) REQUIRE(SameBits(y, reference[0]));
      }
    }
  }
}

// SOURCE DeepEP#731, nccl#2103: refused top-16 and top-22, and hidden sizes of few bytes.
TEST_CASE("a token may use 32 experts and a row may be 16 bytes", "[runtime][moe]") {
  Random random(6);
  for (const auto& [top_k, hidden] : {std::pair{22, 24}, {32, 4}, {64, 20}}) {
    CAPTURE(top_k, hidden);
    const Instance in =
        RandomInstance(random.Next(), {.num_experts = 64, .top_k = top_k}, 21, hidden);
    const auto alone = RunLayer(in, {.placements = {Contiguous(64, 1)}});
    const Topology topology = Topology::Uniform(3, 30);
    REQUIRE(SameBits(RunLayer(in, {.placements = {RandomRows(64, topology, 0, &random)}})[0],
                     alone[0]));
  }
}

TEST_CASE("the counts of the kinds are those of their tokens alone", "[runtime][moe]") {
  constexpr int32_t kDecoded = 20;
  const Instance all = RandomInstance(11, {.num_experts = 12, .top_k = 3}, 37);
  Instance decoded = all, prompts = all;  // the first tokens, and the others
  decoded.tokens = kDecoded;
  prompts.tokens = all.tokens - kDecoded;
  const auto cut = static_cast<std::ptrdiff_t>(kDecoded * all.hidden);
  for (auto rows : {&Instance::x, &Instance::base}) {
    (decoded.*rows).resize(static_cast<size_t>(cut));
    (prompts.*rows).erase((prompts.*rows).begin(), (prompts.*rows).begin() + cut);
  }
  for (int ranks : {1, 2, 4}) {
    CAPTURE(ranks);
    const RunOptions options{.placements = {Contiguous(12, ranks)}};
    RunOptions mixed = options;
    mixed.num_decode = kDecoded;
    LayerCounts of_mixed, of_decoded, of_prompts;
    const auto y = RunLayer(all, mixed, &of_mixed);
    RunLayer(decoded, options, &of_decoded);
    RunLayer(prompts, options, &of_prompts);
    REQUIRE(of_mixed.counts[TokenKind::kDecode] == of_decoded.counts[TokenKind::kDecode]);
    REQUIRE(of_mixed.counts[TokenKind::kPrefill] == of_prompts.counts[TokenKind::kDecode]);
    REQUIRE(of_decoded.counts[TokenKind::kPrefill] == std::vector<int32_t>(12, 0));
    // The kinds are counted apart and else treated alike.
    REQUIRE(SameBits(y[0], RunLayer(all, options)[0]));
  }
}

TEST_CASE("a batch without tokens goes through on all ranks", "[runtime][moe]") {
  const Instance in = RandomInstance(9, {.num_experts = 5, .top_k = 2}, 0);
  for (int ranks : {1, 3}) REQUIRE(RunLayer(in, {.placements = {Contiguous(5, ranks)}})[0].empty());
}

TEST_CASE("ranks under different epochs compute nothing", "[runtime][moe][errors]") {
  const Instance in = RandomInstance(4, {.num_experts = 4, .top_k = 2}, 8);
  const Placement placement = Contiguous(4, 2);
  const auto statuses = RunRanks(2, [&](Transport* transport, Communicator* comm, int rank) {
    const std::vector<Placement::LayerRow> none;
    auto mine = placement.With(none, 7 + rank);
    if (!mine.ok()) return mine.status();
    std::vector<std::vector<float>> outputs(1, std::vector<float>(in.x.size()));
    std::vector<LayerCounts> counts(1);
    const RunOptions options{.placements = {*mine}};
    return RankRun(in, options, transport, comm).Run(&outputs, &counts);
  });
  for (const absl::Status& status : statuses) {
    const std::string text(status.message());
    CAPTURE(text);
    REQUIRE(text.find("epoch 7") != std::string::npos);
    REQUIRE(text.find("epoch 8") != std::string::npos);
  }
}

}  // namespace
}  // namespace ballast
