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
#include "placement/split.h"

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
  int32_t first_layer = 0;
  std::string out;
  bool dry_run = false;
  std::string json;
};

// What the plan makes of one layer; 1 is perfect.
struct LayerOutcome {
  double max_over_mean = 1.0;
  double max_over_mean_even = 1.0;  // under the equal split, which most engines use
  double lower_bound = 1.0;         // of any placement
};

struct Outcome {
  std::optional<Placement> placement;
  std::vector<LayerOutcome> layers;
  int64_t copies = 0;  // experts that enter a rank which lacks them in --current
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

LayerOutcome Judge(const Placement& placement, int32_t layer, std::span<const int64_t> load) {
  const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
  if (total == 0) return {};
  int shift = 0;  // the splitter counts in 32 bits
  while ((total >> shift) >= (int64_t{1} << 30)) ++shift;
  const int32_t num_ranks = placement.topology().num_ranks();
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks) * load.size(), 0);
  double mean = 0.0;
  for (size_t e = 0; e < load.size(); ++e) {
    counts[e] = static_cast<int32_t>(load[e] >> shift);
    mean += static_cast<double>(counts[e]) / num_ranks;
  }
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

absl::StatusOr<Outcome> MakePlan(const PlanFlags& flags, const LoadTable& load) {
  if (flags.groups < 1 || load.num_experts % flags.groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--groups is ", flags.groups, ", allowed: a divisor of the experts, ", load.num_experts));
  }
  BALLAST_ASSIGN_OR_RETURN(
      const Topology topology,
      TopologyFromFlags(flags.ranks, flags.slots, flags.nodes, load.num_experts));
  std::optional<Placement> current;
  if (!flags.current.empty()) {
    BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.current));
    BALLAST_ASSIGN_OR_RETURN(current,
                             ImportPlacement(flags.current, text, PlacementFormat::kNative, {}));
    BALLAST_RETURN_IF_ERROR(CheckCurrent(flags.current, *current, load, topology));
  }
  Outcome outcome;
  const int64_t begin = NowNs();
  BALLAST_ASSIGN_OR_RETURN(std::vector<std::vector<int32_t>> rows, PlanRows(flags, load, topology));
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
    outcome.layers.push_back(Judge(*outcome.placement, layer, load.layer(layer)));
  }
  return outcome;
}

std::string JsonOf(const PlanFlags& flags, const Outcome& outcome) {
  nlohmann::ordered_json json = {{"policy", flags.policy},
                                 {"plan_ms", outcome.plan_ms},
                                 {"copies_moved", outcome.copies},
                                 {"layers", nlohmann::ordered_json::array()}};
  for (int32_t layer = 0; layer < outcome.placement->num_layers(); ++layer) {
    const std::span<const int32_t> row = outcome.placement->expert_of_slot(layer);
    const LayerOutcome& l = outcome.layers[layer];
    json["layers"].push_back({{"slot_to_expert", std::vector<int32_t>(row.begin(), row.end())},
                              {"max_over_mean", l.max_over_mean},
                              {"max_over_mean_even", l.max_over_mean_even},
                              {"lower_bound", l.lower_bound}});
  }
  return json.dump() + "\n";
}

absl::Status RunPlan(const PlanFlags& flags) {
  BALLAST_ASSIGN_OR_RETURN(const PlacementFormat format, ParsePlacementFormat(flags.format));
  BALLAST_ASSIGN_OR_RETURN(const LoadTable load, ReadLoad(flags.load));
  BALLAST_ASSIGN_OR_RETURN(const Outcome outcome, MakePlan(flags, load));
  std::vector<std::vector<std::string>> rows = {{"layer", "max/mean", "even split", "lower bound"}};
  for (size_t layer = 0; layer < outcome.layers.size(); ++layer) {
    const LayerOutcome& l = outcome.layers[layer];
    rows.push_back({absl::StrCat(layer), Fixed(l.max_over_mean, 4), Fixed(l.max_over_mean_even, 4),
                    Fixed(l.lower_bound, 4)});
  }
  std::cout << FormatTable(rows) << flags.policy << ": " << Fixed(outcome.plan_ms, 2) << " ms";
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
    BALLAST_RETURN_IF_ERROR(WriteFile(flags.json, JsonOf(flags, outcome)));
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
