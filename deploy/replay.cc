// `ballast replay`: recorded routing against several policies.
#include "placement/replay.h"

#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "absl/strings/str_join.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/controller_flags.h"
#include "deploy/lab.h"
#include "deploy/replay_report.h"
#include "placement/policy.h"

namespace ballast {
namespace {

struct ReplayFlags {
  std::vector<std::string> traces;
  int32_t experts = 0;
  int32_t ranks = 0;
  int32_t nodes = 1;
  int32_t slots = 0;
  int64_t step_tokens = 1024;
  int32_t top_k = 0;
  std::vector<std::string> policies;  // none: those of kUsualPolicies that keep the rules
  std::vector<std::string> splits = {"exact"};
  std::string when = "after-step";
  std::vector<double> rhos = {0.3};
  ControllerFlags controller;
  std::string cost_constants;
  std::string cluster;
  double copy_budget = 0.0;
  std::string json;
  std::string report;
};

// --cluster and --cost-constants: the nodes, what predicts times, and what the cost split knows.
absl::Status ReadModels(const ReplayFlags& flags, ReplayOptions* options, int32_t* nodes) {
  if (!flags.cluster.empty() && !flags.cost_constants.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--cost-constants is ", flags.cost_constants,
                     ", allowed: nothing with --cluster, which has these constants"));
  }
  if (!flags.cost_constants.empty()) {
    BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.cost_constants));
    BALLAST_ASSIGN_OR_RETURN(options->constants,
                             CostConstantsFromJson(flags.cost_constants, text, flags.ranks));
  }
  if (flags.cluster.empty()) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.cluster));
  BALLAST_ASSIGN_OR_RETURN(options->cluster, ClusterModel::FromJson(flags.cluster, text));
  const int32_t ranks_per_node = options->cluster->ranks_per_node;
  if (flags.ranks % ranks_per_node != 0) {
    return absl::InvalidArgumentError(absl::StrCat(flags.cluster, ": ranks_per_node is ",
                                                   ranks_per_node,
                                                   ", allowed: a divisor of "
                                                   "--ranks, ",
                                                   flags.ranks));
  }
  options->constants = options->cluster->constants();
  const int32_t nodes_of_cluster = flags.ranks / ranks_per_node;
  if (*nodes != 1 && *nodes != nodes_of_cluster) {
    return absl::InvalidArgumentError(absl::StrCat("--nodes is ", *nodes, ", allowed with ",
                                                   flags.cluster, ": ", nodes_of_cluster));
  }
  *nodes = nodes_of_cluster;
  return absl::OkStatus();
}

constexpr const char* kUsualPolicies[] = {"never", "eplb", "regret"};

// Nobody who gave no policy should be told that one of the usual ones cannot keep a rule.
absl::StatusOr<std::vector<std::string>> PoliciesOf(const ReplayFlags& flags) {
  if (!flags.policies.empty()) return flags.policies;
  const PlacementRules& wanted = flags.controller.rules;
  std::vector<std::string> names;
  for (const char* name : kUsualPolicies) {
    BALLAST_ASSIGN_OR_RETURN(const auto policy, MakePolicy(name));
    const PlacementRules kept = policy->rules_kept();
    if (kept.coverage >= wanted.coverage && kept.node_local >= wanted.node_local) {
      names.push_back(name);
    }
  }
  return names;
}

absl::StatusOr<ReplayOptions> OptionsFromFlags(const ReplayFlags& flags, int32_t num_experts) {
  ReplayOptions options;
  BALLAST_ASSIGN_OR_RETURN(options.policies, PoliciesOf(flags));
  int32_t nodes = flags.nodes;
  BALLAST_RETURN_IF_ERROR(ReadModels(flags, &options, &nodes));
  BALLAST_ASSIGN_OR_RETURN(options.topology,
                           TopologyFromFlags(flags.ranks, flags.slots, nodes, num_experts));
  options.splits.clear();
  for (const std::string& name : flags.splits) {
    BALLAST_ASSIGN_OR_RETURN(const SplitMode split, ParseSplitMode(name));
    options.splits.push_back(split);
  }
  options.rhos = flags.rhos;
  BALLAST_ASSIGN_OR_RETURN(options.when, ParsePlanTime(flags.when));
  options.controller = flags.controller.Options();
  options.copy_budget = flags.copy_budget;
  options.now_ns = NowNs;
  return options;
}

nlohmann::ordered_json PredictedJson(const PredictedFigures& predicted) {
  return {
      {"predicted_layer_us_mean", predicted.layer_us_mean},
      {"predicted_layer_us_p99", predicted.layer_us_p99},
      {"predicted_step_us_mean", predicted.step_us_mean},
      {"predicted_step_us_p99", predicted.step_us_p99},
      {"predicted_dispatch_us_mean", predicted.dispatch_us_mean},
      {"predicted_compute_us_mean", predicted.compute_us_mean},
      {"predicted_combine_us_mean", predicted.combine_us_mean},
      {"predicted_copy_us_mean", predicted.copy_us_mean},
      {"predicted_step_us_mean_blocking", predicted.blocking_step_us_mean},
      {"predicted_step_us_mean_background", predicted.background_step_us_mean},
  };
}

std::string JsonOf(const StepTrace& trace, const ReplayOptions& options, const ReplayResult& result,
                   const std::optional<ReplayResult>& uncovered) {
  nlohmann::ordered_json json = {{"traces", trace.phase_names},
                                 {"steps", result.num_steps},
                                 {"step_tokens", trace.step_tokens},
                                 {"dropped_tokens", trace.dropped_tokens},
                                 {"layers", trace.num_layers},
                                 {"experts", trace.num_experts},
                                 {"ranks", options.topology.num_ranks()},
                                 {"slots", options.topology.num_slots()},
                                 {"policies", nlohmann::ordered_json::array()}};
  for (const ReplayFigures& f : result.figures) {
    json["policies"].push_back({{"policy", f.policy},
                                {"split", NameOf(f.split)},
                                {"when", NameOf(options.when)},
                                {"rho", f.rho},
                                {"mean_imbalance", f.mean_imbalance},
                                {"p99_imbalance", f.p99_imbalance},
                                {"mean_node_imbalance", f.mean_node_imbalance},
                                {"copies_per_layer_step", f.copies_per_layer_step},
                                {"busiest_copies_per_layer_step", f.busiest_copies_per_layer_step},
                                {"total_cost", f.total_cost},
                                {"plan_us_mean", f.plan_us_mean},
                                {"plan_us_p99", f.plan_us_p99},
                                {"split_us_mean", f.split_us_mean},
                                {"split_us_p99", f.split_us_p99},
                                {"critical_us_mean", f.critical_us_mean}});
    if (uncovered.has_value()) {
      const ReplayFigures& without = uncovered->figures[json["policies"].size() - 1];
      json["policies"].back()["without_coverage"] = {{"mean_imbalance", without.mean_imbalance},
                                                     {"total_cost", without.total_cost}};
    }
    if (f.predicted.has_value()) json["policies"].back().update(PredictedJson(*f.predicted));
  }
  if (options.cluster.has_value()) json["assumptions"] = options.cluster->Assumptions();
  return json.dump(2) + "\n";
}

std::string TableOf(const ReplayOptions& options, const ReplayResult& result) {
  std::vector<std::vector<std::string>> rows = {{"policy", "split", "when", "rho", "imbalance",
                                                 "p99", "copies", "busiest", "cost", "plan us",
                                                 "split us", "critical us"}};
  for (const ReplayFigures& f : result.figures) {
    rows.push_back({f.policy, NameOf(f.split), NameOf(options.when), absl::StrCat(f.rho),
                    Fixed(f.mean_imbalance, 3), Fixed(f.p99_imbalance, 3),
                    Fixed(f.copies_per_layer_step, 2), Fixed(f.busiest_copies_per_layer_step, 2),
                    Fixed(f.total_cost, 3), Fixed(f.plan_us_mean, 1), Fixed(f.split_us_mean, 2),
                    Fixed(f.critical_us_mean, 1)});
  }
  if (options.topology.num_nodes() > 1) {
    rows[0].push_back("nodes");
    for (size_t i = 0; i < result.figures.size(); ++i) {
      rows[i + 1].push_back(Fixed(result.figures[i].mean_node_imbalance, 3));
    }
  }
  return FormatTable(rows);
}

// What a cluster would take; empty without one.
std::string PredictionOf(const ReplayOptions& options, const ReplayResult& result) {
  if (!options.cluster.has_value()) return "";
  return absl::StrCat("\nPredicted, in microseconds of a step (all layers). ",
                      options.cluster->Assumptions(), "\n", FormatTable(PredictedTable(result)));
}

// What coverage costs: the same replay with and without.
std::string CoverageTable(const ReplayOptions& options, const ReplayResult& with,
                          const ReplayResult& without, int32_t num_experts) {
  std::vector<std::vector<std::string>> rows = {
      {"policy", "split", "rho", "imbalance", "without coverage", "cost", "without coverage"}};
  for (size_t i = 0; i < with.figures.size(); ++i) {
    const ReplayFigures &a = with.figures[i], &b = without.figures[i];
    rows.push_back({a.policy, NameOf(a.split), absl::StrCat(a.rho), Fixed(a.mean_imbalance, 3),
                    Fixed(b.mean_imbalance, 3), Fixed(a.total_cost, 3), Fixed(b.total_cost, 3)});
  }
  return absl::StrCat("coverage of the ", NumHotExperts(options.topology, num_experts),
                      " hottest of ", num_experts, " experts, as many as there are spare slots:\n",
                      FormatTable(rows));
}

// --top-k says how many tokens made the counts of a step, so it divides them.
absl::Status CheckTopK(const StepTrace& trace) {
  for (size_t phase = 0; phase < trace.phase_names.size(); ++phase) {
    for (int64_t t = trace.phase_offsets[phase]; t < trace.phase_offsets[phase + 1]; ++t) {
      for (int32_t layer = 0; layer < trace.num_layers; ++layer) {
        const auto counts = trace.layer(t, layer);
        const int64_t copies = std::accumulate(counts.begin(), counts.end(), int64_t{0});
        if (copies % trace.top_k == 0) continue;
        return absl::InvalidArgumentError(absl::StrCat(
            "--top-k is ", trace.top_k, ", but ", trace.phase_names[phase], " has ", copies,
            " copies in step ", t - trace.phase_offsets[phase], " layer ", layer,
            "; allowed: what divides them, the experts of a token in the model that made them"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RunReplay(const ReplayFlags& flags) {
  BALLAST_RETURN_IF_ERROR(CheckOutputs({{"--json", flags.json}, {"--report", flags.report}}));
  std::vector<NamedArray> phases;
  for (const std::string& path : flags.traces) {
    BALLAST_ASSIGN_OR_RETURN(NamedArray phase, ReadArray(path));
    phases.push_back(std::move(phase));
  }
  BALLAST_ASSIGN_OR_RETURN(const StepTrace trace,
                           CountSteps(phases, {.step_tokens = flags.step_tokens,
                                               .num_experts = flags.experts,
                                               .top_k = flags.top_k}));
  if (trace.top_k > 0) BALLAST_RETURN_IF_ERROR(CheckTopK(trace));
  BALLAST_ASSIGN_OR_RETURN(ReplayOptions options, OptionsFromFlags(flags, trace.num_experts));
  ProgressBar bar("replay");
  options.progress = [&](int64_t done, int64_t all) { bar.Show(done, all); };
  BALLAST_ASSIGN_OR_RETURN(const ReplayResult result, Replay(trace, options));
  const NpyType type = phases[0].array.type;
  const std::string steps = StepsText(trace, type == NpyType::kI32 || type == NpyType::kI64);
  std::cout << steps << ", " << trace.num_layers << " layers, " << trace.num_experts
            << " experts in " << flags.slots << " slots on " << flags.ranks << " ranks; "
            << trace.dropped_tokens << " tokens dropped at the ends of the files\n"
            << TableOf(options, result) << PredictionOf(options, result);
  std::optional<ReplayResult> uncovered;
  if (flags.controller.rules.coverage == 1) {
    ReplayOptions without = options;
    without.controller.rules.coverage = 0;
    BALLAST_ASSIGN_OR_RETURN(uncovered, Replay(trace, without));
    std::cout << CoverageTable(options, result, *uncovered, trace.num_experts);
  }
  if (!flags.json.empty()) {
    BALLAST_RETURN_IF_ERROR(WriteFile(flags.json, JsonOf(trace, options, result, uncovered)));
  }
  if (!flags.report.empty()) {
    BALLAST_RETURN_IF_ERROR(WriteFile(flags.report, ReplayReport(steps, trace, options, result)));
  }
  return absl::OkStatus();
}

void AddFlags(CLI::App* app, ReplayFlags* f) {
  std::string policies;
  for (const std::string& name : ReplayPolicyNames()) {
    absl::StrAppend(&policies, policies.empty() ? "" : ", ", name);
  }
  app->add_option(
         "--trace", f->traces,
         "Recorded routing, one file per phase: .npy ids u8/u16 [tokens, layers, top-k] or "
         "counts i32/i64 [steps, layers, experts] or [steps, 2, layers, experts] (prefill, "
         "decode)")
      ->required()
      ->delimiter(',');
  app->add_option("--experts", f->experts,
                  "Logical experts of a layer; 0: as the trace says (the largest id and one more)")
      ->check(CLI::Range(0, 65536));
  app->add_option("--ranks", f->ranks, "Ranks")->required()->check(CLI::Range(1, 65536));
  app->add_option("--nodes", f->nodes, "Nodes, equal blocks of ranks")->check(CLI::Range(1, 65536));
  app->add_option("--slots", f->slots, "Expert slots of all ranks in each layer")
      ->required()
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--step-tokens", f->step_tokens, "Tokens of one step, over all ranks")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30));
  app->add_option("--top-k", f->top_k,
                  "Experts of a token, which says how many tokens made counts; 0: not "
                  "known, every step counts as --step-tokens")
      ->check(CLI::Range(0, 65536));
  app->add_option("--policy", f->policies,
                  absl::StrCat("Policies, of: ", policies, "; none: those of ",
                               absl::StrJoin(kUsualPolicies, ", "),
                               " that keep --coverage and --node-local"))
      ->delimiter(',');
  app->add_option("--split", f->splits, "Splits, of: " + absl::StrJoin(SplitModeNames(), ", "))
      ->delimiter(',');
  app->add_option("--when", f->when,
                  "after-step: a plan serves the next step; in-step: the step whose counts made it")
      ->check(CLI::IsMember({"after-step", "in-step"}));
  app->add_option("--rho", f->rhos, "Time to receive one copy over the ideal time of a layer-step")
      ->check(CLI::Range(0.0, 1e6))
      ->delimiter(',');
  app->add_option("--cost-constants", f->cost_constants,
                  "JSON file of measured times for --split cost; none: an H200's");
  app->add_option(
      "--cluster", f->cluster,
      "JSON file of a cluster (docs/cluster-320.json): predict the time of steps there");
  const char* group = "Controller (as in serve)";
  AddControllerFlags(app, group, &f->controller);
  app->add_option("--copy-budget", f->copy_budget,
                  "Copies per step, over all layers and ranks, that the controller may make; 0: no "
                  "limit")
      ->check(CLI::Range(0.0, 1e12))
      ->group(group);
  app->add_option("--json", f->json, "Write the figures to this file");
  app->add_option("--report", f->report, "Write a page with charts to this file (HTML)");
}

}  // namespace

RunCommand AddReplayCommand(CLI::App* app) {
  auto flags = std::make_shared<ReplayFlags>();
  AddConfigFlag(app);
  AddFlags(app, flags.get());
  app->footer(
      "cost = mean over layers and steps of imbalance + rho * copies received by the busiest rank\n"
      "With --coverage 1 everything is replayed without coverage too, to see what it costs.\n"
      "Example: ballast replay --trace monday.npy,friday.npy --ranks 8 --slots 72 \\\n"
      "           --policy never,eplb-interval:8,regret --split exact,even --rho .03,.3,3");
  return [flags](int*, char***) { return Finish(RunReplay(*flags)); };
}

}  // namespace ballast
