#include "deploy/bench_rebalance.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "comm/mpi_transport.h"
#include "deploy/commands.h"
#include "deploy/lab.h"
#include "kernels/matmul.h"
#include "runtime/expert_store.h"
#include "runtime/moe_layer.h"
#include "runtime/rebalancer.h"
#include "runtime/step_protocol.h"

namespace ballast {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kSeed = 20261122;
constexpr int32_t kInputs = 8;  // batches that the steps go round
constexpr int64_t kWarmSteps = 2 * kInputs, kLeastBlockSteps = 20;
constexpr int kWrongBits = 1;  // exit code

std::vector<float> Draw(size_t count, uint64_t seed, double spread) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(spread * (2.0 * RandomUniform(seed, i) - 1.0));
  }
  return values;
}

// Where the copies are, and where they are after a quarter of them has gone to the next rank.
Placement HomeOf(const RebalanceBenchFlags& flags, int32_t ranks) {
  return *Placement::Contiguous(flags.layers, flags.experts_per_rank * ranks,
                                Topology::Uniform(ranks, flags.experts_per_rank),
                                /*fill_spare=*/false);
}

int32_t QuarterOf(const RebalanceBenchFlags& flags) {
  return std::max(1, flags.experts_per_rank / 4);
}

std::vector<Placement::LayerRow> RowsAway(const RebalanceBenchFlags& flags, int32_t ranks) {
  std::vector<Placement::LayerRow> rows;
  for (int32_t layer = 0; layer < flags.layers; ++layer) {
    Placement::LayerRow row{layer, {}};
    for (int32_t slot = 0; slot < ranks * flags.experts_per_rank; ++slot) {
      const int32_t rank = slot / flags.experts_per_rank, i = slot % flags.experts_per_rank;
      const int32_t from = i < QuarterOf(flags) ? (rank + ranks - 1) % ranks : rank;
      row.expert_of_slot.push_back(from * flags.experts_per_rank + i);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::vector<Placement::LayerRow> RowsOf(const Placement& placement) {
  std::vector<Placement::LayerRow> rows;
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const auto row = placement.expert_of_slot(layer);
    rows.push_back({layer, {row.begin(), row.end()}});
  }
  return rows;
}

// What was sampled; every rank has the same numbers of steps and plans.
struct Samples {
  std::vector<int64_t> quiet_ns, moving_ns;  // of steps
  std::vector<int64_t> flip_ns, plan_ns;     // of plans: the flip, and from its start to there
  int64_t copies = 0;                        // over all ranks
  int64_t slice_ns = 0;
  int64_t wrong_outputs = 0;
};

// One rank: the pieces of an engine, without its decoder.
class BenchRank {
 public:
  BenchRank(const RebalanceBenchFlags& flags, DType dtype, Transport* transport)
      : flags_(flags),
        dtype_(dtype),
        rank_(transport->rank()),
        ranks_(transport->size()),
        transport_(transport),
        comm_(transport, {}),
        home_(HomeOf(flags, ranks_)) {}

  absl::Status Load();
  absl::Status Run();
  // The ranks' samples become those of the slowest rank, step by step.
  absl::Status Gather();

  const Samples& samples() const { return samples_; }
  size_t block_bytes() const { return store_->block_bytes(); }

 private:
  absl::StatusOr<int64_t> Step();  // its wall time
  absl::Status QuietBlock(int64_t steps);
  absl::StatusOr<int64_t> MovingBlock();  // its steps
  absl::Status Slowest(std::vector<int64_t>* values);

  const RebalanceBenchFlags& flags_;
  const DType dtype_;
  const int32_t rank_, ranks_;
  Transport* const transport_;
  Communicator comm_;
  const Placement home_;
  std::unique_ptr<MoeExecutor> executor_;
  std::vector<RouterParameters> routers_;  // [layers]
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<DispatchTable> table_;
  std::unique_ptr<Rebalancer> rebalancer_;
  std::unique_ptr<StepProtocol> protocol_;
  std::vector<StepHeader> headers_;
  std::vector<std::vector<float>> inputs_;   // [kInputs][tokens * hidden]
  std::vector<AlignedBuffer> inputs_act_;    // the same in dtype_
  std::vector<std::vector<float>> outputs_;  // [kInputs * layers], of the first round
  std::vector<float> y_;
  LayerCounts counts_;
  std::optional<Rebalancer::Outcome> ended_;  // with the last step
  int64_t steps_ = 0, plans_ = 0;
  Samples samples_;
};

absl::Status BenchRank::Load() {
  const int32_t experts = home_.num_experts();
  BALLAST_ASSIGN_OR_RETURN(
      executor_, MoeExecutor::Create({.gate = {.num_experts = experts, .top_k = flags_.top_k},
                                      .hidden = flags_.hidden,
                                      .expert_inter = flags_.inter,
                                      .dtype = dtype_},
                                     dtype_ == DType::kBF16 && !cpu::OneDnnHasBFloat16()
                                         ? PlainKernels()
                                         : DefaultCpuKernels()));
  executor_->Connect(&comm_);
  GatedMlp& mlp = executor_->expert_mlp();
  store_ = std::make_unique<ExpertStore>(
      ExpertStore::Options{.rank = rank_,
                           .num_layers = flags_.layers,
                           .num_experts = experts,
                           .block_bytes = mlp.packed_bytes(),
                           .resident_blocks = flags_.experts_per_rank * flags_.layers,
                           .staging_blocks = QuarterOf(flags_) * flags_.layers,
                           .chunk_bytes = flags_.chunk_bytes},
      transport_);
  const size_t hidden = flags_.hidden, inter = flags_.inter, tokens = flags_.tokens;
  for (int32_t layer = 0; layer < flags_.layers; ++layer) {
    routers_.emplace_back();
    const std::vector<float> router = Draw(experts * hidden, kSeed + layer, 0.1);
    routers_.back().packed = AlignedBuffer(executor_->gate_matmul().packed_bytes());
    BALLAST_RETURN_IF_ERROR(
        executor_->gate_matmul().Pack(router.data(), DType::kF32, routers_.back().packed.data()));
    routers_.back().bias.assign(experts, 0.0f);
    for (int32_t e = 0; e < experts; ++e) {
      if (!home_.Hosts(layer, e, rank_)) continue;
      const std::vector<float> w = Draw(3 * hidden * inter, kSeed + 1000 * (layer + 1) + e, 0.05);
      BALLAST_RETURN_IF_ERROR(mlp.Pack(&w[0], &w[hidden * inter], &w[2 * hidden * inter],
                                       DType::kF32, store_->Allocate(layer, e).data()));
      BALLAST_RETURN_IF_ERROR(store_->Seal(layer, e));
    }
  }
  for (int32_t i = 0; i < kInputs; ++i) {
    inputs_.push_back(Draw(tokens * hidden, kSeed + 10'000 + i * ranks_ + rank_, 1.0));
    inputs_act_.emplace_back(RoundUp(tokens, kRowBlock) * hidden * SizeOf(dtype_));
    for (size_t k = 0; k < inputs_.back().size(); ++k) {
      if (dtype_ == DType::kF32) {
        inputs_act_.back().as<float>()[k] = inputs_.back()[k];
      } else {
        inputs_act_.back().as<BFloat16>()[k] = ToBFloat16(inputs_.back()[k]);
      }
    }
  }
  y_.resize(tokens * hidden);
  headers_.resize(ranks_);
  table_ = std::make_unique<DispatchTable>(home_, rank_, *store_, nullptr);
  const SliceBudget::Options slice{.slice_bytes = static_cast<int64_t>(flags_.slice_bytes),
                                   .bytes_per_second = flags_.bandwidth_mb * 1e6,
                                   .step_share = flags_.share};
  rebalancer_ = std::make_unique<Rebalancer>(
      Rebalancer::Options{.rank = rank_, .slice = slice, .plan_deadline_ms = 600'000}, store_.get(),
      home_, [this](const Placement& placement) {
        table_ = std::make_unique<DispatchTable>(placement, rank_, *store_, table_.get());
      });
  protocol_ = std::make_unique<StepProtocol>(rank_, /*last_step=*/0, rebalancer_.get());
  return absl::OkStatus();
}

absl::StatusOr<int64_t> BenchRank::Step() {
  const size_t input = steps_++ % kInputs;
  const bool first_round = steps_ <= kInputs;
  const int64_t began = NowNs();
  const StepHeader mine = protocol_->Begin({.num_tokens = flags_.tokens});
  BALLAST_RETURN_IF_ERROR(comm_.AllGather(rebalancer_->placement().epoch(),
                                          std::as_bytes(std::span(&mine, 1)),
                                          std::as_writable_bytes(std::span(headers_))));
  BALLAST_ASSIGN_OR_RETURN(const auto opening, protocol_->Open(headers_, NowNs()));
  ended_ = opening.ended;
  int64_t wall_ns = NowNs() - began;
  for (int32_t layer = 0; layer < flags_.layers; ++layer) {
    const int64_t layer_began = NowNs();
    BALLAST_RETURN_IF_ERROR(executor_->Run(table_.get(), {.layer = layer,
                                                          .num_tokens = flags_.tokens,
                                                          .x_f32 = inputs_[input].data(),
                                                          .x_act = inputs_act_[input].data(),
                                                          .router = routers_[layer].view(),
                                                          .while_waiting = {},
                                                          .base = inputs_[input].data(),
                                                          .y = y_.data(),
                                                          .counts = &counts_}));
    if (rebalancer_->busy()) {
      const int64_t slice_began = NowNs();
      rebalancer_->Slice(SliceOf::kStep);
      samples_.slice_ns += NowNs() - slice_began;
    }
    wall_ns += NowNs() - layer_began;
    if (first_round) {
      outputs_.push_back(y_);
    } else {
      const std::vector<float>& expected = outputs_[input * flags_.layers + layer];
      samples_.wrong_outputs +=
          std::memcmp(y_.data(), expected.data(), y_.size() * sizeof(float)) != 0;
    }
  }
  return wall_ns;
}

absl::Status BenchRank::QuietBlock(int64_t steps) {
  for (int64_t i = 0; i < steps; ++i) {
    BALLAST_ASSIGN_OR_RETURN(const int64_t wall_ns, Step());
    samples_.quiet_ns.push_back(wall_ns);
  }
  return absl::OkStatus();
}

// From the receipt of a plan to its flip.
absl::StatusOr<int64_t> BenchRank::MovingBlock() {
  auto rows = plans_ % 2 == 0 ? RowsAway(flags_, ranks_) : RowsOf(home_);
  BALLAST_ASSIGN_OR_RETURN(
      MigrationPlan plan, MakeMigrationPlan(rebalancer_->placement(), std::move(rows), plans_ + 1));
  ++plans_;
  const int64_t began = NowNs();
  rebalancer_->OnPlan(std::move(plan));
  for (int64_t steps = 1;; ++steps) {
    BALLAST_ASSIGN_OR_RETURN(const int64_t wall_ns, Step());
    samples_.moving_ns.push_back(wall_ns);
    if (!ended_.has_value()) continue;
    if (ended_->done != Command::kFlip) {
      return absl::InternalError(absl::StrCat("plan ", plans_, " was given up"));
    }
    samples_.plan_ns.push_back(NowNs() - began);
    samples_.flip_ns.push_back(ended_->stall_ns);
    samples_.copies += ended_->copies;
    return steps;
  }
}

absl::Status BenchRank::Run() {
  for (int64_t i = 0; i < kWarmSteps; ++i) BALLAST_RETURN_IF_ERROR(Step().status());
  int64_t block = std::min(flags_.steps, kLeastBlockSteps);
  const auto wanted = static_cast<size_t>(flags_.steps);
  ProgressBar bar("bench rebalance");
  while (samples_.quiet_ns.size() < wanted || (ranks_ > 1 && samples_.moving_ns.size() < wanted)) {
    if (rank_ == 0) bar.Show(static_cast<int64_t>(samples_.quiet_ns.size()), flags_.steps);
    BALLAST_RETURN_IF_ERROR(QuietBlock(block));
    if (ranks_ == 1) continue;
    BALLAST_ASSIGN_OR_RETURN(block, MovingBlock());
  }
  return Gather();
}

absl::Status BenchRank::Slowest(std::vector<int64_t>* values) {
  std::vector<int64_t> all(values->size() * static_cast<size_t>(ranks_));
  BALLAST_RETURN_IF_ERROR(comm_.AllGather(rebalancer_->placement().epoch(),
                                          std::as_bytes(std::span(*values)),
                                          std::as_writable_bytes(std::span(all))));
  for (size_t i = 0; i < all.size(); ++i) {
    int64_t& value = (*values)[i % values->size()];
    value = std::max(value, all[i]);
  }
  return absl::OkStatus();
}

absl::Status BenchRank::Gather() {
  std::vector<int64_t> sums = {samples_.slice_ns, samples_.wrong_outputs};
  for (std::vector<int64_t>* values :
       {&samples_.quiet_ns, &samples_.moving_ns, &samples_.flip_ns, &samples_.plan_ns, &sums}) {
    if (!values->empty()) BALLAST_RETURN_IF_ERROR(Slowest(values));
  }
  samples_.slice_ns = sums[0];
  samples_.wrong_outputs = sums[1];
  return absl::OkStatus();
}

// ---- the report ---------------------------------------------------------------------------------

std::vector<double> Microseconds(const std::vector<int64_t>& ns) {
  std::vector<double> us;
  for (const int64_t n : ns) us.push_back(static_cast<double>(n) * 1e-3);
  return us;
}

Json Spread(const char* count, const std::vector<int64_t>& ns) {
  const std::vector<double> us = Microseconds(ns);
  return {{count, us.size()},
          {"median_us", PercentileOf(us, 0.5)},
          {"p99_us", PercentileOf(us, 0.99)},
          {"max_us", PercentileOf(us, 1.0)}};
}

Json JsonOf(const RebalanceBenchFlags& flags, DType dtype, int32_t ranks, size_t block_bytes,
            const Samples& samples) {
  const Json quiet = Spread("steps", samples.quiet_ns), moving = Spread("steps", samples.moving_ns);
  const auto ratio = [&](const char* what) {
    const double base = quiet[what].get<double>();
    return samples.moving_ns.empty() ? Json(nullptr) : Json(moving[what].get<double>() / base);
  };
  double plans_s = 0.0, moving_s = 0.0;
  for (const int64_t ns : samples.plan_ns) plans_s += static_cast<double>(ns) * 1e-9;
  for (const int64_t ns : samples.moving_ns) moving_s += static_cast<double>(ns) * 1e-9;
  const double bytes = static_cast<double>(samples.copies) * static_cast<double>(block_bytes);
  const auto per = [](double amount, double seconds) {
    return seconds > 0.0 ? amount / seconds : 0.0;
  };
  return {{"commit", BALLAST_COMMIT},
          {"machine", {{"cpu", CpuModel()}, {"cores", CoresHere()}}},
          {"ranks", ranks},
          {"layers", flags.layers},
          {"experts", flags.experts_per_rank * ranks},
          {"expert_bytes", block_bytes},
          {"dtype", NameOf(dtype)},
          {"tokens_per_rank", flags.tokens},
          {"top_k", flags.top_k},
          {"bandwidth_mb", flags.bandwidth_mb},
          {"share", flags.share},
          {"slice_bytes", flags.slice_bytes},
          {"chunk_bytes", flags.chunk_bytes},
          {"quiet", quiet},
          {"moving", moving},
          {"median_ratio", ratio("median_us")},
          {"p99_ratio", ratio("p99_us")},
          {"slice_share", per(static_cast<double>(samples.slice_ns) * 1e-9, moving_s)},
          {"flip", Spread("plans", samples.flip_ns)},
          {"copies_moved", samples.copies},
          {"bytes_moved", bytes},
          {"migration_ms", PercentileOf(Microseconds(samples.plan_ns), 0.5) * 1e-3},
          {"moved_mb_per_s", per(bytes * 1e-6, plans_s)},
          {"wrong_outputs", samples.wrong_outputs}};
}

void Print(const Json& json) {
  const auto number = [](const Json& value, int digits) {
    return value.is_null() ? std::string("-") : Fixed(value.get<double>(), digits);
  };
  std::vector<std::vector<std::string>> table = {{"", "number", "median us", "p99 us", "max us"}};
  for (const auto& [name, count] :
       {std::pair{"quiet", "steps"}, {"moving", "steps"}, {"flip", "plans"}}) {
    const Json& row = json[name];
    table.push_back({name, row[count].dump(), number(row["median_us"], 1), number(row["p99_us"], 1),
                     number(row["max_us"], 1)});
  }
  std::cout << json["ranks"] << " ranks on " << json["machine"]["cpu"].get<std::string>() << ", "
            << json["layers"] << " layers of " << json["experts"] << " experts of "
            << number(json["expert_bytes"].get<double>() * 1e-6, 2) << " MB, "
            << json["tokens_per_rank"] << " tokens a rank and step\n"
            << FormatTable(table) << "steps while copies move, over quiet ones: median "
            << number(json["median_ratio"], 3) << ", p99 " << number(json["p99_ratio"], 3) << "\n"
            << json["copies_moved"] << " copies, " << number(json["migration_ms"], 1)
            << " ms a plan (median), " << number(json["moved_mb_per_s"], 1)
            << " MB/s over all ranks, " << number(json["slice_share"], 4)
            << " of the time in slices (allowed " << number(json["share"], 4) << ")\n";
}

absl::StatusOr<int> RunOn(const RebalanceBenchFlags& flags, MpiRuntime* mpi) {
  cpu::SetMatmulThreads(std::max(1, CoresHere() / std::max(1, mpi->local_size())));
  const DType dtype = DTypeOfFlag(flags.dtype);
  const std::unique_ptr<Transport> transport = mpi->MakeTransport();
  BenchRank rank(flags, dtype, transport.get());
  const absl::Status loaded = rank.Load();
  if (mpi->Highest(loaded.ok() ? 0 : 1) != 0) {
    return loaded.ok() ? absl::UnavailableError("another rank could not start") : loaded;
  }
  BALLAST_RETURN_IF_ERROR(rank.Run());
  if (mpi->rank() != 0) return int{kExitOk};
  const Samples& samples = rank.samples();
  const Json json = JsonOf(flags, dtype, mpi->size(), rank.block_bytes(), samples);
  Print(json);
  if (!flags.json.empty()) BALLAST_RETURN_IF_ERROR(WriteFile(flags.json, json.dump(2) + "\n"));
  if (samples.wrong_outputs == 0) return int{kExitOk};
  std::cerr << "ballast: " << samples.wrong_outputs << " outputs have other bits than at first\n";
  return kWrongBits;
}

}  // namespace

absl::StatusOr<int> RunRebalanceBench(const RebalanceBenchFlags& flags, int* argc, char*** argv) {
  if (flags.top_k > flags.experts_per_rank) {
    return RefuseOnAllRanks(absl::StrCat("--top-k is ", flags.top_k,
                                         "; allowed: up to --experts-per-rank, which is ",
                                         flags.experts_per_rank));
  }
  BALLAST_ASSIGN_OR_RETURN(const std::unique_ptr<MpiRuntime> mpi, MpiRuntime::Start(argc, argv));
  absl::Status ready = mpi->rank() == 0 ? CheckOutputs({{"--json", flags.json}}) : absl::OkStatus();
  if (mpi->size() == 1) {
    ready = absl::InvalidArgumentError(
        "bench rebalance runs on one rank, which has nobody to send copies to; allowed: two or "
        "more (mpirun -n 2)");
  }
  // Rank 0 speaks before any rank leaves: mpirun then kills them all.
  if (!ready.ok()) Finish(ready);
  if (mpi->Highest(ready.ok() ? 0 : 1) != 0) {
    mpi->Finish();
    return int{kExitUsage};
  }
  absl::StatusOr<int> code = RunOn(flags, mpi.get());
  if (!code.ok()) {  // an orderly end needs all ranks, and they may not all be here
    Finish(code.status());
    std::fflush(nullptr);
    _exit(ExitCodeOf(code.status()));
  }
  mpi->Finish();
  return code;
}

}  // namespace ballast
