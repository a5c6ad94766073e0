#include "deploy/bench_batch.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "deploy/charts.h"
#include "deploy/commands.h"
#include "deploy/lab.h"
#include "placement/eplb.h"
#include "placement/split_cost.h"

namespace ballast {
namespace {

constexpr int64_t kMostTokens = 16384;
constexpr int64_t kMostSteps = 128;  // per batch size, spread over the trace
constexpr int kWorse = 1;            // exit code

// Drawn traffic has the shape of DeepSeek-V2-Lite, and Zipf shares of 0.8, 1.2 and 1.6 by layer.
constexpr uint64_t kSeed = 20260802;
constexpr int64_t kDrawnTokens = 1 << 17;
constexpr int32_t kDrawnLayers = 3, kDrawnExperts = 64, kDrawnTopK = 6;

// What was predicted at one batch size; means over layers and steps, in microseconds.
struct BatchRow {
  int64_t tokens = 0;
  int64_t num_steps = 0;
  double exact_us = 0.0, activated_us = 0.0, cost_us = 0.0;
  double cost_split_us = 0.0;   // the time of one cost split on this machine
  double most_excess_us = 0.0;  // of cost over the better of the others, in any layer and step
};

// One sequence of ids [tokens, layers, top-k] from all files.
absl::StatusOr<NamedArray> ReadSequence(const std::vector<std::string>& paths) {
  NamedArray all;
  for (const std::string& path : paths) {
    BALLAST_ASSIGN_OR_RETURN(NamedArray file, ReadArray(path));
    const NpyType type = file.array.type;
    if ((type != NpyType::kU8 && type != NpyType::kU16) || file.array.shape.size() < 2) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", ShapeText(file.array.shape), " of ", NameOf(type),
                       ", allowed: ids of u8 or u16, [tokens, layers, top-k] or [tokens, layers]"));
    }
    if (all.name.empty()) {
      all = std::move(file);
      continue;
    }
    const bool alike =
        type == all.array.type && std::equal(file.array.shape.begin() + 1, file.array.shape.end(),
                                             all.array.shape.begin() + 1, all.array.shape.end());
    if (!alike) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": ", ShapeText(file.array.shape), " of ", NameOf(type), " does not go with ",
          all.name, ": ", ShapeText(all.array.shape), " of ", NameOf(all.array.type)));
    }
    all.array.shape[0] += file.array.shape[0];
    all.array.data.insert(all.array.data.end(), file.array.data.begin(), file.array.data.end());
  }
  return all;
}

// Ids of Zipf traffic; a token may choose an expert twice, which no figure here depends on.
NamedArray DrawSequence() {
  Random random(kSeed);
  std::vector<std::vector<double>> edges(kDrawnLayers, std::vector<double>(kDrawnExperts));
  for (int32_t layer = 0; layer < kDrawnLayers; ++layer) {
    for (int32_t e = 0; e < kDrawnExperts; ++e) {
      edges[layer][e] = std::pow(e + 1.0, -(0.8 + 0.4 * layer));
    }
    for (int32_t e = kDrawnExperts - 1; e > 0; --e) {
      std::swap(edges[layer][e], edges[layer][random.Below(static_cast<uint32_t>(e) + 1)]);
    }
    std::partial_sum(edges[layer].begin(), edges[layer].end(), edges[layer].begin());
  }
  NamedArray all{
      .name = "drawn",
      .array = {
          .type = NpyType::kU8, .shape = {kDrawnTokens, kDrawnLayers, kDrawnTopK}, .data = {}}};
  for (int64_t i = 0; i < kDrawnTokens * kDrawnLayers * kDrawnTopK; ++i) {
    const std::vector<double>& edge = edges[(i / kDrawnTopK) % kDrawnLayers];
    const double at = random.Uniform() * edge.back();
    const auto expert = std::lower_bound(edge.begin(), edge.end() - 1, at) - edge.begin();
    all.array.data.push_back(static_cast<std::byte>(expert));
  }
  return all;
}

// At most kMostSteps steps of `tokens` tokens, evenly spread over the sequence.
absl::StatusOr<StepTrace> SampleSteps(const NamedArray& all, int64_t tokens, int32_t num_experts) {
  const int64_t in_all = all.array.shape[0] / tokens;
  const int64_t num_steps = std::min(in_all, kMostSteps);
  const size_t step_bytes =
      all.array.data.size() / static_cast<size_t>(all.array.shape[0]) * static_cast<size_t>(tokens);
  NamedArray sample{.name = all.name,
                    .array = {.type = all.array.type, .shape = all.array.shape, .data = {}}};
  sample.array.shape[0] = num_steps * tokens;
  for (int64_t i = 0; i < num_steps; ++i) {
    const auto first = all.array.data.begin() + (i * in_all / num_steps) * step_bytes;
    sample.array.data.insert(sample.array.data.end(), first, first + step_bytes);
  }
  return CountSteps(std::span(&sample, 1), {.step_tokens = tokens, .num_experts = num_experts});
}

// Where EPLB puts the copies for the load of the whole sequence, layer by layer.
absl::StatusOr<Placement> PlaceFor(const StepTrace& trace, const Topology& topology) {
  const LoadTable load = TotalLoad(trace);
  std::vector<int32_t> rows;
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    BALLAST_ASSIGN_OR_RETURN(const EplbResult plan,
                             Eplb(load.layer(layer), {.num_slots = topology.num_slots(),
                                                      .num_groups = 1,
                                                      .num_nodes = 1,
                                                      .num_ranks = topology.num_ranks()}));
    rows.insert(rows.end(), plan.expert_of_slot.begin(), plan.expert_of_slot.end());
  }
  return Placement::Create(load.num_layers, load.num_experts, topology, std::move(rows), 0);
}

BatchRow MeasureBatch(const StepTrace& trace, const Placement& placement,
                      const CostConstants& constants) {
  BatchRow row{.tokens = trace.step_tokens, .num_steps = trace.num_steps()};
  Split split;
  int64_t ns = 0;
  for (int32_t layer = 0; layer < trace.num_layers; ++layer) {
    const LayerHosts& hosts = placement.hosts(layer);
    ExactSplitter exact(hosts);
    CostSplitter cost(hosts, constants);
    const auto predict = [&] { return cost.model().LargestUs(split.quota, hosts.host_rank); };
    for (int64_t step = 0; step < trace.num_steps(); ++step) {
      const std::span<const int32_t> demand = trace.layer(step, layer);
      exact.Run(demand, &split);
      const double exact_us = predict();
      cost.RunActivated(demand, &split);
      const double activated_us = predict();
      const int64_t begin = NowNs();
      cost.Run(demand, &split);
      ns += NowNs() - begin;
      const double cost_us = predict();
      row.exact_us += exact_us;
      row.activated_us += activated_us;
      row.cost_us += cost_us;
      row.most_excess_us = std::max(row.most_excess_us, cost_us - std::min(exact_us, activated_us));
    }
  }
  const double cells = static_cast<double>(trace.num_layers) * static_cast<double>(row.num_steps);
  for (double* sum : {&row.exact_us, &row.activated_us, &row.cost_us}) *sum /= cells;
  row.cost_split_us = static_cast<double>(ns) * 1e-3 / cells;
  return row;
}

// At which batch sizes token balance becomes better than activated experts, or worse, in words.
std::string Crossings(const std::vector<BatchRow>& rows) {
  std::string text;
  for (size_t i = 1; i < rows.size(); ++i) {
    const bool before = rows[i - 1].exact_us < rows[i - 1].activated_us;
    const bool after = rows[i].exact_us < rows[i].activated_us;
    if (before == after) continue;
    absl::StrAppend(&text, text.empty() ? "" : "; ", "between ", rows[i - 1].tokens, " and ",
                    rows[i].tokens, " tokens the exact split becomes ",
                    after ? "better" : "no better", " than whole experts");
  }
  return text.empty() ? "the exact split and whole experts do not cross" : text;
}

std::vector<std::vector<std::string>> TableOf(const std::vector<BatchRow>& rows) {
  std::vector<std::vector<std::string>> table = {
      {"tokens", "steps", "exact us", "activated us", "cost us", "of the better", "split us"}};
  for (const BatchRow& row : rows) {
    table.push_back({absl::StrCat(row.tokens), absl::StrCat(row.num_steps), Fixed(row.exact_us, 2),
                     Fixed(row.activated_us, 2), Fixed(row.cost_us, 2),
                     Fixed(row.cost_us / std::min(row.exact_us, row.activated_us), 4),
                     Fixed(row.cost_split_us, 1)});
  }
  return table;
}

std::string Page(const std::string& heading, const std::vector<BatchRow>& rows) {
  std::vector<Curve> times, ratios;
  const char* names[] = {"exact (token balance)", "activated experts", "cost"};
  for (int i = 0; i < 3; ++i) {
    times.push_back({.label = names[i], .colour = ColourOf(i), .dash = "", .points = {}});
    ratios.push_back(times.back());
  }
  std::vector<std::pair<double, std::string>> marks;
  for (size_t k = 0; k < rows.size(); ++k) {
    const BatchRow& row = rows[k];
    const double x =
        static_cast<double>(k) / static_cast<double>(std::max<size_t>(rows.size() - 1, 1));
    if (k % 2 == 0) marks.emplace_back(x, absl::StrCat(row.tokens));
    const double us[] = {row.exact_us, row.activated_us, row.cost_us};
    for (int i = 0; i < 3; ++i) {
      times[i].points.emplace_back(x, us[i]);
      ratios[i].points.emplace_back(x, us[i] / std::min(row.exact_us, row.activated_us));
    }
  }
  std::string table = "<div class=\"scroll\"><table>";
  for (const std::vector<std::string>& row : TableOf(rows)) {
    const char* cell = table.ends_with("<table>") ? "th" : "td";
    table += "<tr>";
    for (const std::string& text : row) {
      absl::StrAppend(&table, "<", cell, ">", Escape(text), "</", cell, ">");
    }
    table += "</tr>\n";
  }
  return absl::StrCat(PageHead("Ballast: splits by batch size"), "<h1>Splits by batch size</h1><p>",
                      Escape(heading), "</p><p>", Escape(Crossings(rows)),
                      ".</p>\n<h2>Predicted time of the ",
                      "slowest rank in a layer, microseconds, over tokens of a step</h2>",
                      Chart(times, AxisOf(times, true, false), marks, "predicted time"),
                      "<h2>Over the better of the two pure splits</h2>",
                      Chart(ratios, AxisOf(ratios, false, false), marks, "ratio"), table,
                      "</table></div></body></html>\n");
}

std::string JsonOf(const std::string& heading, const std::vector<BatchRow>& rows) {
  nlohmann::ordered_json json = {{"commit", BALLAST_COMMIT},
                                 {"assumptions", heading},
                                 {"crossings", Crossings(rows)},
                                 {"batch", nlohmann::ordered_json::array()}};
  for (const BatchRow& row : rows) {
    json["batch"].push_back({{"tokens", row.tokens},
                             {"steps", row.num_steps},
                             {"exact_us", row.exact_us},
                             {"activated_us", row.activated_us},
                             {"cost_us", row.cost_us},
                             {"most_excess_us", row.most_excess_us},
                             {"cost_split_us", row.cost_split_us}});
  }
  return json.dump(2) + "\n";
}

absl::StatusOr<CostConstants> ConstantsFromFlags(const BatchBenchFlags& flags) {
  if (flags.constants.empty()) return CostConstants{};
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.constants));
  return CostConstantsFromJson(flags.constants, text, flags.ranks);
}

}  // namespace

absl::StatusOr<int> RunBatchBench(const BatchBenchFlags& flags) {
  BALLAST_RETURN_IF_ERROR(CheckOutputs({{"--json", flags.json}, {"--report", flags.report}}));
  BALLAST_ASSIGN_OR_RETURN(const CostConstants constants, ConstantsFromFlags(flags));
  NamedArray all = DrawSequence();
  if (!flags.traces.empty()) {
    BALLAST_ASSIGN_OR_RETURN(all, ReadSequence(flags.traces));
  }
  BALLAST_ASSIGN_OR_RETURN(const StepTrace whole,
                           CountSteps(std::span(&all, 1), {.step_tokens = all.array.shape[0]}));
  BALLAST_ASSIGN_OR_RETURN(const Topology topology,
                           TopologyFromFlags(flags.ranks, flags.slots, 1, whole.num_experts));
  BALLAST_ASSIGN_OR_RETURN(const Placement placement, PlaceFor(whole, topology));
  std::vector<BatchRow> rows;
  double most_excess_us = 0.0;
  ProgressBar bar("bench batch");
  for (int64_t tokens = 1; tokens <= std::min(kMostTokens, all.array.shape[0]); tokens *= 2) {
    bar.Show(tokens, kMostTokens);
    BALLAST_ASSIGN_OR_RETURN(const StepTrace trace, SampleSteps(all, tokens, whole.num_experts));
    rows.push_back(MeasureBatch(trace, placement, constants));
    most_excess_us = std::max(most_excess_us, rows.back().most_excess_us);
  }
  const std::string heading = absl::StrCat(
      flags.traces.empty() ? "drawn traffic (Zipf 0.8, 1.2, 1.6)" : "recorded traffic", ", ",
      whole.num_layers, " layers, ", whole.num_experts, " experts in ", flags.slots, " slots on ",
      flags.ranks, " ranks of one node, placed by EPLB for the whole; expert read ",
      constants.expert_read_us, " us, row ", constants.token_us, " us, link ",
      constants.link_us_per_token, " us per row, message ", constants.message_us, " us");
  std::cout << heading << "\n" << FormatTable(TableOf(rows)) << Crossings(rows) << "\n";
  if (!flags.json.empty()) BALLAST_RETURN_IF_ERROR(WriteFile(flags.json, JsonOf(heading, rows)));
  if (!flags.report.empty()) BALLAST_RETURN_IF_ERROR(WriteFile(flags.report, Page(heading, rows)));
  if (most_excess_us == 0.0) return int{kExitOk};
  std::cerr << "ballast: the cost split is worse than a pure one by up to " << most_excess_us
            << " us\n";
  return kWorse;
}

}  // namespace ballast
