// `ballast plan`: a placement for a known load, for any engine.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/lab.h"
#include "placement/eplb.h"
#include "placement/full_plan.h"
#include "placement/migration_plan.h"
#include "placement/placement_formats.h"
#include "placement/replica_budget.h"
#include "placement/rules.h"
#include "placement/split.h"
#include "placement/split_exact.h"

namespace ballast {
namespace {

struct PlanFlags {
  std::string load;
  int32_t ranks = 0;
  int32_t nodes = 1;
  int32_t slots = 0;
  int32_t groups = 1;
  std::string policy = "full";
  std::string current;
  std::string format = "native";
  std::optional<int64_t> replica_budget;
  int32_t coverage = 0;
  int32_t first_layer = 0;
  std::string out;
  bool dry_run = false;
  std::string json;
};

// What the plan makes of one layer; 1 is perfect.
struct LayerOutcome {
  double max_over_mean = 1.0;
  double max_over_mean_even = 1.0;       // under the equal split, which most engines use
  double lower_bound = 1.0;              // of any placement
  double max_over_mean_uncovered = 1.0;  // before coverage; only with --coverage 1
};

struct Outcome {
  std::optional<Placement> placement;
  std::vector<LayerOutcome> layers;
  std::optional<ReplicaBudget> budget;  // with --replica-budget
  int64_t copies = 0;                   // experts that enter a rank which lacks them in --current
  double plan_ms = 0.0;
};

absl::StatusOr<std::vector<std::vector<int32_t>>> PlanRows(const PlanFlags& flags,
                                                           const LoadTable& load,
                                                           const Topology& topology) {
  std::vector<std::vector<int32_t>> rows;
  BALLAST_ASSIGN_OR_RETURN(FullPlanner planner, FullPlanner::Create(topology, load.num_experts));
  FullPlan full;
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    if (flags.policy == "full") {
      planner.Plan(load.layer(layer), &full);
      rows.push_back(full.expert_of_slot);
      continue;
    }
    BALLAST_ASSIGN_OR_RETURN(EplbResult eplb, Eplb(load.layer(layer), {.num_slots = flags.slots,
                                                                       .num_groups = flags.groups,
                                                                       .num_nodes = flags.nodes,
                                                                       .num_ranks = flags.ranks}));
    rows.push_back(std::move(eplb.expert_of_slot));
  }
  return rows;
}

absl::Status CheckCurrent(const std::string& path, const Placement& current, const LoadTable& load,
                          const Topology& topology) {
  if (current.num_layers() == load.num_layers && current.num_experts() == load.num_experts &&
      current.topology() == topology) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      path, ": ", current.num_layers(), " layers of ", current.num_experts(), " experts in ",
      current.topology().num_slots(), " slots on ", current.topology().num_ranks(), " ranks and ",
      current.topology().num_nodes(), " nodes; asked for are ", load.num_layers, " layers of ",
      load.num_experts, " in ", topology.num_slots(), " slots on ", topology.num_ranks(),
      " equal ranks and ", topology.num_nodes(), " nodes"));
}

double MeanOf(std::span<const int64_t> load, int32_t num_ranks) {
  return static_cast<double>(std::accumulate(load.begin(), load.end(), int64_t{0})) / num_ranks;
}

LayerOutcome Judge(const Placement& placement, int32_t layer, std::span<const int64_t> load) {
  const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
  if (total == 0) return {};
  const int32_t num_ranks = placement.topology().num_ranks();
  std::vector<int32_t> counts;
  const int shift = ScaleDemand(load, &counts);
  const double mean = std::accumulate(counts.begin(), counts.end(), 0.0) / num_ranks;
  counts.resize(static_cast<size_t>(num_ranks) * load.size(), 0);  // all from rank 0
  Splitter splitter(placement.hosts(layer));
  Split split;
  LayerOutcome outcome;
  splitter.Run(SplitMode::kExact, counts, &split);
  outcome.lower_bound = static_cast<double>(LoadLowerBound(placement.topology(), load)) *
                        num_ranks / static_cast<double>(total);
  outcome.max_over_mean = static_cast<double>(split.largest_load) / mean;
  // Cutting the counts to 32 bits may lose a part in a billion.
  if (shift > 0) outcome.max_over_mean = std::max(outcome.max_over_mean, outcome.lower_bound);
  splitter.Run(SplitMode::kEven, counts, &split);
  outcome.max_over_mean_even = static_cast<double>(split.largest_load) / mean;
  return outcome;
}

// What --replica-budget and --coverage need of the other flags.
absl::Status CheckFlags(const PlanFlags& flags, const LoadTable& load, const Topology& topology) {
  if (flags.groups < 1 || load.num_experts % flags.groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--groups is ", flags.groups, ", allowed: a divisor of the experts, ", load.num_experts));
  }
  if (flags.coverage == 1 && NumHotExperts(topology, load.num_experts) == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--coverage is 1, but ", topology.num_slots(), " slots on ",
                     topology.num_ranks(), " ranks can hold each of ", load.num_experts,
                     " experts on one rank only; allowed: 0, or more --",
                     topology.num_ranks() == 1 ? "ranks" : "slots"));
  }
  if (!flags.replica_budget.has_value()) return absl::OkStatus();
  const auto excluded = [&](const char* flag, const auto& value, const char* allowed) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, " is ", value, " with --replica-budget, allowed: ", allowed));
  };
  if (flags.policy != "full") return excluded("--policy", flags.policy, "full");
  if (flags.coverage != 0) return excluded("--coverage", flags.coverage, "0");
  if (!flags.current.empty()) return excluded("--current", flags.current, "none");
  return absl::OkStatus();
}

// The rows, as the flags want them; `outcome` gets what else is known of them.
absl::StatusOr<std::vector<std::vector<int32_t>>> MakeRows(const PlanFlags& flags,
                                                           const LoadTable& load,
                                                           const Topology& topology,
                                                           Outcome* outcome) {
  if (!flags.replica_budget.has_value()) return PlanRows(flags, load, topology);
  absl::StatusOr<ReplicaBudget> budget =
      SpendReplicaBudget(load, {.num_ranks = flags.ranks,
                                .slots_per_rank = flags.slots / flags.ranks,
                                .copies = *flags.replica_budget});
  if (!budget.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--replica-budget: ", std::string(budget.status().message())));
  }
  outcome->budget = *std::move(budget);
  std::vector<std::vector<int32_t>> rows;
  const auto& all = outcome->budget->expert_of_slot;
  for (auto row = all.begin(); row != all.end(); row += flags.slots) {
    rows.emplace_back(row, row + flags.slots);
  }
  return rows;
}

// Covers the hot experts and remembers how balanced the rows were before.
absl::Status CoverRows(const LoadTable& load, const Topology& topology, Outcome* outcome,
                       std::vector<std::vector<int32_t>>* rows) {
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    std::vector<int32_t>& row = (*rows)[layer];
    BALLAST_ASSIGN_OR_RETURN(const Placement before,
                             Placement::Create(1, load.num_experts, topology, row, /*epoch=*/0));
    outcome->layers[layer].max_over_mean_uncovered =
        Judge(before, 0, load.layer(layer)).max_over_mean;
    CoverHotExperts(topology, load.layer(layer), &row);
  }
  return absl::OkStatus();
}

absl::StatusOr<Outcome> MakePlan(const PlanFlags& flags, const LoadTable& load) {
  BALLAST_ASSIGN_OR_RETURN(
      const Topology topology,
      TopologyFromFlags(flags.ranks, flags.slots, flags.nodes, load.num_experts));
  BALLAST_RETURN_IF_ERROR(CheckFlags(flags, load, topology));
  std::optional<Placement> current;
  if (!flags.current.empty()) {
    BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.current));
    BALLAST_ASSIGN_OR_RETURN(current,
                             ImportPlacement(flags.current, text, PlacementFormat::kNative, {}));
    BALLAST_RETURN_IF_ERROR(CheckCurrent(flags.current, *current, load, topology));
  }
  Outcome outcome;
  outcome.layers.resize(load.num_layers);
  const int64_t begin = NowNs();
  BALLAST_ASSIGN_OR_RETURN(std::vector<std::vector<int32_t>> rows,
                           MakeRows(flags, load, topology, &outcome));
  if (flags.coverage == 1) {
    BALLAST_RETURN_IF_ERROR(CoverRows(load, topology, &outcome, &rows));
  }
  std::vector<Placement::LayerRow> layer_rows;
  std::vector<int32_t> all;
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    if (current.has_value()) {
      rows[layer] = AlignRow(topology, current->expert_of_slot(layer), std::move(rows[layer]));
    }
    all.insert(all.end(), rows[layer].begin(), rows[layer].end());
    layer_rows.push_back({.layer = layer, .expert_of_slot = std::move(rows[layer])});
  }
  outcome.plan_ms = static_cast<double>(NowNs() - begin) * 1e-6;
  const int64_t epoch = current.has_value() ? current->epoch() + 1 : 0;
  BALLAST_ASSIGN_OR_RETURN(outcome.placement, Placement::Create(load.num_layers, load.num_experts,
                                                                topology, std::move(all), epoch));
  if (current.has_value()) {
    BALLAST_ASSIGN_OR_RETURN(const MigrationPlan plan,
                             MakeMigrationPlan(*current, std::move(layer_rows), /*plan_id=*/1));
    outcome.copies = static_cast<int64_t>(plan.moves.size());
  }
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    const double uncovered = outcome.layers[layer].max_over_mean_uncovered;
    outcome.layers[layer] = Judge(*outcome.placement, layer, load.layer(layer));
    outcome.layers[layer].max_over_mean_uncovered = uncovered;
  }
  return outcome;
}

// Sum over layers of the largest rank loads over the sum of the means, and 1 without load.
double WeightedImbalance(const std::vector<int64_t>& largest, const LoadTable& load,
                         int32_t num_ranks) {
  const double mean = MeanOf(load.load, num_ranks);
  return mean == 0.0 ? 1.0 : std::accumulate(largest.begin(), largest.end(), 0.0) / mean;
}

// Largest rank load of a layer with equally many copies per layer, over the mean.
double UniformImbalance(const ReplicaBudget& budget, const LoadTable& load, int32_t num_ranks,
                        int32_t layer) {
  return WeightedImbalance({budget.uniform_largest_load[layer]},
                           {.num_layers = 1,
                            .num_experts = load.num_experts,
                            .load = {load.layer(layer).begin(), load.layer(layer).end()}},
                           num_ranks);
}

std::string JsonOf(const PlanFlags& flags, const LoadTable& load, const Outcome& outcome) {
  nlohmann::ordered_json json = {{"policy", flags.policy},
                                 {"plan_ms", outcome.plan_ms},
                                 {"copies_moved", outcome.copies},
                                 {"layers", nlohmann::ordered_json::array()}};
  if (outcome.budget.has_value()) {
    json["replica_budget"] = {
        {"copies", *flags.replica_budget},
        {"max_over_mean", WeightedImbalance(outcome.budget->largest_load, load, flags.ranks)},
        {"max_over_mean_uniform",
         WeightedImbalance(outcome.budget->uniform_largest_load, load, flags.ranks)}};
  }
  for (int32_t layer = 0; layer < outcome.placement->num_layers(); ++layer) {
    const std::span<const int32_t> row = outcome.placement->expert_of_slot(layer);
    const LayerOutcome& l = outcome.layers[layer];
    json["layers"].push_back({{"slot_to_expert", std::vector<int32_t>(row.begin(), row.end())},
                              {"max_over_mean", l.max_over_mean},
                              {"max_over_mean_even", l.max_over_mean_even},
                              {"lower_bound", l.lower_bound}});
    nlohmann::ordered_json& of_layer = json["layers"].back();
    if (flags.coverage == 1) of_layer["max_over_mean_uncovered"] = l.max_over_mean_uncovered;
    if (!outcome.budget.has_value()) continue;
    of_layer["copies"] = outcome.budget->copies[layer];
    of_layer["max_over_mean_uniform"] = UniformImbalance(*outcome.budget, load, flags.ranks, layer);
  }
  return json.dump() + "\n";
}

std::string TableOf(const PlanFlags& flags, const LoadTable& load, const Outcome& outcome) {
  std::vector<std::vector<std::string>> rows = {{"layer", "max/mean", "even split", "lower bound"}};
  if (outcome.budget.has_value()) rows[0].insert(rows[0].end(), {"copies", "uniform max/mean"});
  if (flags.coverage == 1) rows[0].push_back("uncovered max/mean");
  for (size_t layer = 0; layer < outcome.layers.size(); ++layer) {
    const LayerOutcome& l = outcome.layers[layer];
    rows.push_back({absl::StrCat(layer), Fixed(l.max_over_mean, 4), Fixed(l.max_over_mean_even, 4),
                    Fixed(l.lower_bound, 4)});
    if (outcome.budget.has_value()) {
      rows.back().push_back(absl::StrCat(outcome.budget->copies[layer]));
      rows.back().push_back(Fixed(
          UniformImbalance(*outcome.budget, load, flags.ranks, static_cast<int32_t>(layer)), 4));
    }
    if (flags.coverage == 1) rows.back().push_back(Fixed(l.max_over_mean_uncovered, 4));
  }
  return FormatTable(rows);
}

// What the rules and the budget came to over all layers, a line each.
std::string SummaryOf(const PlanFlags& flags, const LoadTable& load, const Outcome& outcome) {
  std::string text;
  if (outcome.budget.has_value()) {
    absl::StrAppend(
        &text, "replica budget: ", *flags.replica_budget, " copies; max/mean ",
        Fixed(WeightedImbalance(outcome.budget->largest_load, load, flags.ranks), 4),
        " over all layers, with equally many per layer ",
        Fixed(WeightedImbalance(outcome.budget->uniform_largest_load, load, flags.ranks), 4), "\n");
  }
  if (flags.coverage == 1) {
    double with = 0.0, without = 0.0;
    for (const LayerOutcome& l : outcome.layers) {
      with += l.max_over_mean;
      without += l.max_over_mean_uncovered;
    }
    const double layers = static_cast<double>(outcome.layers.size());
    absl::StrAppend(&text, "coverage: the ",
                    NumHotExperts(outcome.placement->topology(), load.num_experts), " hottest of ",
                    load.num_experts, " experts, as many as there are spare slots, are on two ",
                    "ranks; mean of max/mean ", Fixed(with / layers, 4), ", without coverage ",
                    Fixed(without / layers, 4), "\n");
  }
  return text;
}

absl::Status RunPlan(const PlanFlags& flags) {
  BALLAST_ASSIGN_OR_RETURN(const PlacementFormat format, ParsePlacementFormat(flags.format));
  BALLAST_RETURN_IF_ERROR(
      CheckOutputs({{"--out", flags.dry_run ? "" : flags.out}, {"--json", flags.json}}));
  BALLAST_ASSIGN_OR_RETURN(const LoadTable load, ReadLoad(flags.load));
  BALLAST_ASSIGN_OR_RETURN(const Outcome outcome, MakePlan(flags, load));
  std::cout << TableOf(flags, load, outcome) << SummaryOf(flags, load, outcome) << flags.policy
            << ": " << Fixed(outcome.plan_ms, 2) << " ms";
  if (!flags.current.empty()) std::cout << ", " << outcome.copies << " copies to move";
  std::cout << "\n";
  BALLAST_ASSIGN_OR_RETURN(const std::string text,
                           ExportPlacement(*outcome.placement, format, flags.first_layer));
  if (flags.dry_run) {
    std::cout << "dry run: no placement was written\n";
  } else if (!flags.out.empty()) {
    BALLAST_RETURN_IF_ERROR(WriteFile(flags.out, text));
  }
  if (!flags.json.empty()) {
    BALLAST_RETURN_IF_ERROR(WriteFile(flags.json, JsonOf(flags, load, outcome)));
  }
  return absl::OkStatus();
}

}  // namespace

RunCommand AddPlanCommand(CLI::App* app) {
  auto flags = std::make_shared<PlanFlags>();
  PlanFlags* f = flags.get();
  AddConfigFlag(app);
  app->add_option("--load", f->load,
                  "Copies per layer and expert: .npy [layers, experts], or text with a line of "
                  "numbers per layer, separated by commas")
      ->required();
  app->add_option("--ranks", f->ranks, "Ranks")->required()->check(CLI::Range(1, 65536));
  app->add_option("--nodes", f->nodes, "Nodes, equal blocks of ranks")->check(CLI::Range(1, 65536));
  app->add_option("--slots", f->slots, "Expert slots of all ranks in each layer")
      ->required()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--groups", f->groups,
                  "Expert groups of the model; eplb keeps a group on one node where they divide")
      ->check(CLI::Range(1, 65536));
  app->add_option("--policy", f->policy,
                  "full: perfect balance where every rank has a spare slot, whatever the nodes; "
                  "eplb: what everybody knows")
      ->check(CLI::IsMember({"eplb", "full"}));
  app->add_option("--replica-budget", f->replica_budget,
                  "Copies beyond the first of an expert, over all layers together: each layer gets "
                  "as many as pay there (at most --slots), the other slots stay empty. Policy full")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  app->add_option("--coverage", f->coverage,
                  "1: the loss of any one rank leaves each of the hottest experts, as many as "
                  "there are spare slots, a copy")
      ->check(CLI::Range(0, 1));
  app->add_option("--current", f->current,
                  "Placement in force (native format): the plan is renamed for the fewest copies");
  app->add_option("--format", f->format, "Format of --out")
      ->check(CLI::IsMember(PlacementFormatNames()));
  app->add_option("--first-layer", f->first_layer,
                  "What trtllm calls the first MoE layer: the number of dense layers before it")
      ->check(CLI::Range(0, 65536));
  app->add_option("--out", f->out, "Write the placement to this file");
  app->add_flag("--dry-run", f->dry_run, "Plan and print, but do not write --out");
  app->add_option("--json", f->json, "Write slots and figures of each layer to this file");
  app->footer(
      "max/mean is the largest rank load over the mean under the exact split; no placement goes\n"
      "below the lower bound.\n"
      "Example: ballast plan --load load.npy --ranks 32 --slots 288 --format sglang --out "
      "map.json");
  return [flags](int*, char***) { return Finish(RunPlan(*flags)); };
}

}  // namespace ballast
