// `ballast bench`: how long the brain takes, and what migrations do to steps, against a baseline in
// the same run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/check.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "deploy/bench_batch.h"
#include "deploy/bench_rebalance.h"
#include "deploy/commands.h"
#include "deploy/gpu/bench_gpu.h"
#include "deploy/lab.h"
#include "placement/eplb.h"
#include "placement/full_plan.h"
#include "placement/split.h"

namespace ballast {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kSeed = 20260801;
constexpr int64_t kStepCopies = 1 << 16;  // 8,192 tokens of top-8

struct BenchShape {
  int32_t layers, experts, slots, ranks;
};
// DeepSeek-V2-Lite-like, DeepSeek-V3 prefill and decode, Kimi-K2-like.
constexpr BenchShape kSplitShapes[] = {
    {26, 64, 72, 8}, {58, 256, 288, 32}, {58, 256, 320, 64}, {60, 384, 448, 64}};
constexpr BenchShape kPlanShapes[] = {{26, 64, 72, 8}, {58, 256, 288, 32}, {60, 384, 448, 64}};

// Zipf loads of exponent 0.8, 1.2 or 1.6 (by the layer) in random order, of about kStepCopies.
std::vector<int64_t> ZipfLoad(Random* random, int32_t num_experts, int32_t layer) {
  const double exponent = 0.8 + 0.4 * (layer % 3);
  std::vector<double> share(num_experts);
  for (int32_t i = 0; i < num_experts; ++i) share[i] = std::pow(i + 1.0, -exponent);
  for (int32_t i = num_experts - 1; i > 0; --i) std::swap(share[i], share[random->Below(i + 1)]);
  const double sum = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<int64_t> load;
  for (double s : share) load.push_back(static_cast<int64_t>(s / sum * kStepCopies));
  return load;
}

// The load a step later: every expert by up to 2 % more or less, dealt to the sources.
std::vector<int32_t> DriftedCounts(Random* random, std::span<const int64_t> load,
                                   int32_t num_ranks) {
  std::vector<int32_t> counts(load.size() * num_ranks);
  for (size_t e = 0; e < load.size(); ++e) {
    const double factor = 1.0 + 0.02 * (2.0 * random->Uniform() - 1.0);
    const int64_t drifted = std::llround(static_cast<double>(load[e]) * factor);
    for (int32_t r = 0; r < num_ranks; ++r) {
      counts[r * load.size() + e] = static_cast<int32_t>((drifted + r) / num_ranks);
    }
  }
  return counts;
}

Placement PlacementOf(const BenchShape& shape, std::vector<int32_t> row) {
  absl::StatusOr<Placement> placement =
      Placement::Create(1, shape.experts, Topology::Uniform(shape.ranks, shape.slots / shape.ranks),
                        std::move(row), /*epoch=*/0);
  BALLAST_CHECK(placement.ok());  // a planner's rows are valid
  return *std::move(placement);
}

std::vector<int32_t> EplbRow(const BenchShape& shape, std::span<const int64_t> load) {
  absl::StatusOr<EplbResult> result = Eplb(
      load, {.num_slots = shape.slots, .num_groups = 1, .num_nodes = 1, .num_ranks = shape.ranks});
  BALLAST_CHECK(result.ok());  // the shapes of this file divide
  return std::move(result->expert_of_slot);
}

FullPlanner PlannerOf(const BenchShape& shape) {
  absl::StatusOr<FullPlanner> planner =
      FullPlanner::Create(Topology::Uniform(shape.ranks, shape.slots / shape.ranks), shape.experts);
  BALLAST_CHECK(planner.ok());
  return *std::move(planner);
}

// ceil(load hosted only inside the certificate / its ranks): what no split of the placement beats,
// computed from the placement and the counts alone.
int64_t CertifiedBound(const LayerHosts& hosts, std::span<const int32_t> counts,
                       std::span<const uint8_t> certificate) {
  int64_t load = 0;
  for (int32_t e = 0; e < hosts.num_experts; ++e) {
    bool inside = true;
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      inside = inside && certificate[hosts.host_rank[h]] != 0;
    }
    for (int32_t r = 0; inside && r < hosts.num_ranks; ++r) {
      load += counts[static_cast<size_t>(r) * hosts.num_experts + e];
    }
  }
  const int64_t ranks = std::accumulate(certificate.begin(), certificate.end(), int64_t{0});
  return ranks == 0 ? 0 : (load + ranks - 1) / ranks;
}

template <typename Work>
double MicrosecondsOf(const Work& work) {
  const int64_t begin = NowNs();
  work();
  return static_cast<double>(NowNs() - begin) * 1e-3;
}

Json BenchSplitShape(const BenchShape& shape, const std::string& family) {
  constexpr int kPlacements = 30;
  constexpr int kStepsEach = 40;
  Random random(kSeed);
  FullPlanner planner = PlannerOf(shape);
  FullPlan plan;
  Split split;
  RankPart part;
  std::vector<int32_t> demand(shape.experts);
  std::vector<double> sum_us, exact_us, partition_us, total_us;
  int64_t largest_gap = 0;
  for (int i = 0; i < kPlacements; ++i) {
    const std::vector<int64_t> load = ZipfLoad(&random, shape.experts, i);
    planner.Plan(load, &plan);
    const Placement placement =
        PlacementOf(shape, family == "eplb" ? EplbRow(shape, load) : plan.expert_of_slot);
    ExactSplitter exact(placement.hosts(0));
    Splitter splitter(placement.hosts(0));
    for (int step = 0; step < kStepsEach; ++step) {
      const std::vector<int32_t> counts = DriftedCounts(&random, load, shape.ranks);
      const double sum = MicrosecondsOf([&] { SumOverSources(counts, demand); });
      const double solve = MicrosecondsOf([&] { exact.Run(demand, &split); });
      // And once more in the form in which a server does it.
      const double run = MicrosecondsOf([&] { splitter.Run(SplitMode::kExact, counts, &split); });
      const double cut = MicrosecondsOf(
          [&] { splitter.Cut(SplitMode::kExact, counts, split, step % shape.ranks, &part); });
      if (step > 0) {  // the first warms
        sum_us.push_back(sum);
        exact_us.push_back(solve);
        partition_us.push_back(cut);
        total_us.push_back(run + cut);
      }
      const int64_t bound = CertifiedBound(placement.hosts(0), counts, split.certificate);
      largest_gap = std::max(largest_gap, split.largest_load - bound);
    }
  }
  const double mean =
      std::accumulate(exact_us.begin(), exact_us.end(), 0.0) / static_cast<double>(exact_us.size());
  return {{"experts", shape.experts},
          {"slots", shape.slots},
          {"ranks", shape.ranks},
          {"family", family},
          {"mean_us", mean},
          {"p50_us", PercentileOf(exact_us, 0.5)},
          {"p99_us", PercentileOf(exact_us, 0.99)},
          {"sum_us", PercentileOf(sum_us, 0.5)},
          {"partition_us", PercentileOf(partition_us, 0.5)},
          {"total_us", PercentileOf(total_us, 0.5)},
          {"max_gap_tokens", largest_gap}};
}

Json BenchPlanShape(const BenchShape& shape, const std::string& policy) {
  constexpr int kRounds = 40;
  FullPlanner planner = PlannerOf(shape);
  FullPlan plan;
  Split split;
  std::vector<double> times_ms;
  double largest = 1.0, largest_even = 1.0;
  Random random(kSeed);
  for (int round = 0; round <= kRounds; ++round) {  // the first round warms and is not counted
    std::vector<std::vector<int64_t>> loads;
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      loads.push_back(ZipfLoad(&random, shape.experts, layer));
    }
    std::vector<std::vector<int32_t>> rows(shape.layers);
    const int64_t begin = NowNs();
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      if (policy == "full") {
        planner.Plan(loads[layer], &plan);
        rows[layer] = plan.expert_of_slot;
      } else {
        rows[layer] = EplbRow(shape, loads[layer]);
      }
    }
    if (round > 0) times_ms.push_back(static_cast<double>(NowNs() - begin) * 1e-6);
    if (round > 1) continue;
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      const Placement placement = PlacementOf(shape, rows[layer]);
      std::vector<int32_t> counts(static_cast<size_t>(shape.ranks) * shape.experts, 0);
      std::copy(loads[layer].begin(), loads[layer].end(), counts.begin());
      const double mean = static_cast<double>(std::accumulate(loads[layer].begin(),
                                                              loads[layer].end(), int64_t{0})) /
                          shape.ranks;
      Splitter splitter(placement.hosts(0));
      splitter.Run(SplitMode::kExact, counts, &split);
      largest = std::max(largest, static_cast<double>(split.largest_load) / mean);
      splitter.Run(SplitMode::kEven, counts, &split);
      largest_even = std::max(largest_even, static_cast<double>(split.largest_load) / mean);
    }
  }
  const double mean = std::accumulate(times_ms.begin(), times_ms.end(), 0.0) / kRounds;
  return {{"policy", policy},
          {"layers", shape.layers},
          {"experts", shape.experts},
          {"slots", shape.slots},
          {"ranks", shape.ranks},
          {"mean_ms", mean},
          {"p50_ms", PercentileOf(times_ms, 0.5)},
          {"p99_ms", PercentileOf(times_ms, 0.99)},
          {"max_over_mean", largest},
          {"max_over_mean_even", largest_even}};
}

// A table of the rows' keys and values.
std::string TableOf(const Json& rows) {
  std::vector<std::vector<std::string>> table(1);
  for (const auto& [key, value] : rows[0].items()) table[0].push_back(key);
  for (const Json& row : rows) {
    table.emplace_back();
    for (const auto& [key, value] : row.items()) {
      table.back().push_back(value.is_number_float() ? Fixed(value.get<double>(), 4)
                             : value.is_string()     ? value.get<std::string>()
                                                     : value.dump());
    }
  }
  return FormatTable(table);
}

absl::Status RunBench(const std::string& what, const std::string& json_path) {
  BALLAST_RETURN_IF_ERROR(CheckOutputs({{"--json", json_path}}));
  Json rows = Json::array();
  if (what == "split") {
    for (const BenchShape& shape : kSplitShapes) {
      for (const char* family : {"eplb", "window"}) rows.push_back(BenchSplitShape(shape, family));
    }
  } else {
    for (const BenchShape& shape : kPlanShapes) {
      for (const char* policy : {"eplb", "full"}) rows.push_back(BenchPlanShape(shape, policy));
    }
  }
  std::cout << TableOf(rows);
  if (json_path.empty()) return absl::OkStatus();
  return WriteFile(json_path, Json{{"commit", BALLAST_COMMIT}, {what, rows}}.dump(2) + "\n");
}

void AddRebalanceFlags(CLI::App* app, RebalanceBenchFlags* f) {
  const char* group = "rebalance";
  app->add_option("--steps", f->steps, "Steps to sample of each kind")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}))
      ->group(group);
  app->add_option("--layers", f->layers, "MoE layers")->check(CLI::Range(1, 1024))->group(group);
  app->add_option("--experts-per-rank", f->experts_per_rank, "Experts of a rank in each layer")
      ->check(CLI::Range(1, 4096))
      ->group(group);
  app->add_option("--top-k", f->top_k, "Experts of a token")
      ->check(CLI::Range(1, 64))
      ->group(group);
  app->add_option("--hidden", f->hidden, "Width of a row")
      ->check(CLI::Range(1, 1 << 16))
      ->group(group);
  app->add_option("--inter", f->inter, "Inner width of an expert")
      ->check(CLI::Range(1, 1 << 16))
      ->group(group);
  app->add_option("--tokens", f->tokens, "Tokens of a rank in a step")
      ->check(CLI::Range(1, 65536))
      ->group(group);
  app->add_option("--dtype", f->dtype, "Parameters; auto: bf16 where the processor multiplies it")
      ->check(CLI::IsMember({"auto", "bf16", "fp32"}))
      ->group(group);
  app->add_option("--migration-bandwidth", f->bandwidth_mb, "As of serve")
      ->check(CLI::Range(0.0, 1e9))
      ->group(group);
  app->add_option("--migration-share", f->share, "As of serve")
      ->check(CLI::Range(0.001, 1.0))
      ->group(group);
  app->add_option("--migration-slice-bytes", f->slice_bytes, "As of serve")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(4096.0, 1e12))
      ->group(group);
  app->add_option("--migration-chunk-bytes", f->chunk_bytes, "As of serve")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(4096.0, 1e9))
      ->group(group);
}

absl::Status BenchGpu(const std::string& json) {
  if (!json.empty()) BALLAST_RETURN_IF_ERROR(CheckWritable(json));
  BALLAST_ASSIGN_OR_RETURN(const GpuBenchResult result, RunGpuBench(/*small=*/false));
  std::cout << ToTable(result);
  return json.empty() ? absl::OkStatus() : WriteFile(json, ToJson(result));
}

}  // namespace

RunCommand AddBenchCommand(CLI::App* app) {
  auto what = std::make_shared<std::string>();
  auto flags = std::make_shared<BatchBenchFlags>();
  auto rebalance = std::make_shared<RebalanceBenchFlags>();
  AddConfigFlag(app);
  app->add_option(
         "what", *what,
         "split: one exact split, on EPLB's placements and on full plans (the hardest), at "
         "loads 2 % off; plan: a plan of all layers, without renaming; batch: the predicted time "
         "of a layer under three splits at 1 to 16,384 tokens; rebalance (under mpirun -n 2 or "
         "more): steps while copies of experts move, against steps while none do; gpu: the kernels "
         "on this machine's first device, against its rate of copying")
      ->required()
      ->check(CLI::IsMember({"split", "plan", "batch", "rebalance", "gpu"}));
  app->add_option("--json", flags->json, "Write the figures to this file");
  const char* group = "batch";
  app->add_option("--trace", flags->traces,
                  "Recorded ids, .npy u8/u16 [tokens, layers, top-k], one sequence; none: drawn")
      ->delimiter(',')
      ->group(group);
  app->add_option("--constants", flags->constants,
                  "JSON file of measured times; none: an H200 with DeepSeek-V3's experts")
      ->group(group);
  app->add_option("--ranks", flags->ranks, "Ranks")->check(CLI::Range(1, 65536))->group(group);
  app->add_option("--slots", flags->slots, "Expert slots of all ranks in each layer")
      ->check(CLI::Range(1, 1 << 20))
      ->group(group);
  app->add_option("--report", flags->report, "Write a page with charts to this file (HTML)")
      ->group(group);
  AddRebalanceFlags(app, rebalance.get());
  app->footer(
      "Loads are Zipf 0.8, 1.2 and 1.6. mean_us, p50_us, p99_us: the exact solve, from the demand\n"
      "per expert to quotas and certificate. Medians: sum_us adds the counts up over the sources,\n"
      "partition_us cuts the quotas over the sources for one rank, total_us is all of it.\n"
      "max_gap_tokens: largest rank load minus what its certificate proves unavoidable.\n"
      "max_over_mean: the worst layer, under the exact split.\n"
      "batch ends with 1 if the cost split is worse than a pure one in any layer and step,\n"
      "rebalance if any output has other bits while copies move or after they have.");
  return [what, flags, rebalance](int* argc, char*** argv) {
    rebalance->json = flags->json;
    if (*what == "split" || *what == "plan") return Finish(RunBench(*what, flags->json));
    if (*what == "gpu") return Finish(BenchGpu(flags->json));
    const absl::StatusOr<int> code =
        *what == "batch" ? RunBatchBench(*flags) : RunRebalanceBench(*rebalance, argc, argv);
    return code.ok() ? *code : Finish(code.status());
  };
}

}  // namespace ballast
