#include "placement/replay.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include "absl/strings/match.h"
#include "base/check.h"
#include "base/status.h"
#include "placement/full_plan.h"
#include "placement/migration_plan.h"

namespace ballast {
namespace {

// One policy at work on one trace: holds the placement in force and changes it when asked.
class Player {
 public:
  virtual ~Player() = default;
  virtual const Placement& placement() const = 0;
  // A plan from what no server could know, before the step is split.
  virtual std::optional<MigrationPlan> Foresee(int64_t) { return std::nullopt; }
  // A plan from the step's counts and those before.
  virtual std::optional<MigrationPlan> Learn(int64_t step) = 0;
};

// What the server runs.
class ControllerPlayer : public Player {
 public:
  static absl::StatusOr<std::unique_ptr<Player>> Create(const StepTrace& trace,
                                                        ControllerOptions options,
                                                        const Topology& topology,
                                                        double copy_budget) {
    BALLAST_ASSIGN_OR_RETURN(const std::unique_ptr<Policy> policy, MakePolicy(options.policy));
    BALLAST_ASSIGN_OR_RETURN(
        Placement initial,
        Placement::Contiguous(trace.num_layers, trace.num_experts, topology,
                              policy->fills_spare_slots_at_start(), options.rules.node_local));
    if (copy_budget > 0.0) {
      options.copy_burst = std::max<double>(copy_budget, topology.num_slots());
    }
    BALLAST_ASSIGN_OR_RETURN(std::unique_ptr<Controller> controller,
                             Controller::Create(std::move(options), std::move(initial)));
    return std::make_unique<ControllerPlayer>(trace, std::move(controller), copy_budget);
  }
  ControllerPlayer(const StepTrace& trace, std::unique_ptr<Controller> controller,
                   double copy_budget)
      : trace_(trace), controller_(std::move(controller)), copy_budget_(copy_budget) {}

  const Placement& placement() const override { return controller_->placement(); }
  std::optional<MigrationPlan> Learn(int64_t step) override {
    controller_->OnStep(step, trace_.counts_of(step));
    controller_->GrantCopies(copy_budget_);
    Decision why = Decision::kNone;
    std::optional<MigrationPlan> plan = controller_->Decide(step + 1, /*force=*/false, &why);
    if (plan.has_value()) controller_->OnCommitted(plan->plan_id, step + 1);
    return plan;
  }

 private:
  const StepTrace& trace_;
  std::unique_ptr<Controller> controller_;
  double copy_budget_;
};

// Full plans of what no server can know.
class OraclePlayer : public Player {
 public:
  enum class Kind { kEveryStep, kEveryPhase };

  static absl::StatusOr<std::unique_ptr<Player>> Create(const StepTrace& trace,
                                                        const Topology& topology, Kind kind) {
    BALLAST_ASSIGN_OR_RETURN(Placement initial,
                             Placement::Contiguous(trace.num_layers, trace.num_experts, topology,
                                                   /*fill_spare=*/true));
    BALLAST_ASSIGN_OR_RETURN(FullPlanner planner, FullPlanner::Create(topology, trace.num_experts));
    return std::make_unique<OraclePlayer>(trace, std::move(initial), std::move(planner), kind);
  }
  OraclePlayer(const StepTrace& trace, Placement initial, FullPlanner planner, Kind kind)
      : trace_(trace), placement_(std::move(initial)), planner_(std::move(planner)), kind_(kind) {}

  const Placement& placement() const override { return placement_; }
  std::optional<MigrationPlan> Foresee(int64_t step) override {
    if (kind_ == Kind::kEveryStep) return PlanFrom(step, step + 1);
    const auto phase =
        std::find(trace_.phase_offsets.begin(), trace_.phase_offsets.end() - 1, step);
    if (phase == trace_.phase_offsets.end() - 1) return std::nullopt;
    return PlanFrom(step, *(phase + 1));
  }
  std::optional<MigrationPlan> Learn(int64_t) override { return std::nullopt; }

 private:
  // Moves to the full plan of the steps [first, end).
  std::optional<MigrationPlan> PlanFrom(int64_t first, int64_t end) {
    std::vector<Placement::LayerRow> rows;
    std::vector<int64_t> load(trace_.num_experts);
    for (int32_t layer = 0; layer < trace_.num_layers; ++layer) {
      std::fill(load.begin(), load.end(), 0);
      for (int64_t t = first; t < end; ++t) {
        const std::span<const int32_t> counts = trace_.layer(t, layer);
        for (size_t e = 0; e < counts.size(); ++e) load[e] += counts[e];
      }
      planner_.Plan(load, &plan_);
      rows.push_back(
          {.layer = layer,
           .expert_of_slot = AlignRow(placement_.topology(), placement_.expert_of_slot(layer),
                                      plan_.expert_of_slot)});
    }
    absl::StatusOr<MigrationPlan> plan =
        MakeMigrationPlan(placement_, std::move(rows), ++num_plans_);
    BALLAST_CHECK(plan.ok());  // a full plan's rows are valid
    absl::StatusOr<Placement> after = plan->Apply(placement_);
    BALLAST_CHECK(after.ok());
    placement_ = *std::move(after);
    return *std::move(plan);
  }

  const StepTrace& trace_;
  Placement placement_;
  FullPlanner planner_;
  Kind kind_;
  FullPlan plan_;
  int64_t num_plans_ = 0;
};

absl::StatusOr<std::unique_ptr<Player>> MakePlayer(const StepTrace& trace,
                                                   const ReplayOptions& options,
                                                   const std::string& policy, double rho) {
  using Kind = OraclePlayer::Kind;
  if (policy == "oracle" || policy == "oracle-switch") {
    BALLAST_RETURN_IF_ERROR(CheckRules(policy, /*kept=*/{}, options.controller.rules,
                                       options.topology, trace.num_experts));
  }
  if (policy == "oracle") return OraclePlayer::Create(trace, options.topology, Kind::kEveryStep);
  if (policy == "oracle-switch") {
    return OraclePlayer::Create(trace, options.topology, Kind::kEveryPhase);
  }
  ControllerOptions controller = options.controller;
  controller.rho = rho;
  controller.in_step = options.when == PlanTime::kInStep;
  controller.policy = policy;
  return ControllerPlayer::Create(trace, std::move(controller), options.topology,
                                  options.copy_budget);
}

// Whether the policy decides alike whatever a copy costs.
// ERRORS kInvalidArgument: no such policy
absl::StatusOr<bool> IgnoresRho(const std::string& name) {
  if (name == "oracle" || name == "oracle-switch") return true;
  absl::StatusOr<std::unique_ptr<Policy>> policy = MakePolicy(name);
  if (policy.ok()) return !(*policy)->meters_itself();
  if (absl::StartsWith(policy.status().message(), "unknown policy")) {
    return absl::InvalidArgumentError(
        absl::StrCat(policy.status().message(), ", oracle, oracle-switch"));
  }
  return policy.status();
}

// Deals the copies of a layer to the source ranks in turn, expert by expert.
void DealToSources(std::span<const int32_t> counts, int32_t num_ranks,
                   std::vector<int32_t>* dealt) {
  const size_t num_experts = counts.size();
  dealt->resize(num_ranks * num_experts);
  int32_t first = 0;  // the source that the next copy goes to
  for (size_t e = 0; e < num_experts; ++e) {
    const int32_t rest = counts[e] % num_ranks;
    for (int32_t i = 0; i < num_ranks; ++i) {
      const int32_t source = (first + i) % num_ranks;
      (*dealt)[source * num_experts + e] = counts[e] / num_ranks + (i < rest ? 1 : 0);
    }
    first = (first + rest) % num_ranks;
  }
}

// Plays the trace against one player, under all splits at once: they do not influence it.
class Run {
 public:
  Run(const StepTrace& trace, const ReplayOptions& options, Player* player)
      : trace_(trace), options_(options), player_(player), series_(options.splits.size()) {
    for (int32_t layer = 0; layer < trace.num_layers; ++layer) {
      splitters_.emplace_back(player->placement().hosts(layer), options.constants);
    }
    for (size_t i = 0; i < series_.size(); ++i) series_[i].split = options.splits[i];
    const size_t cells = static_cast<size_t>(trace.num_steps()) * trace.num_layers;
    if (options.cluster.has_value()) copy_us_.resize(static_cast<size_t>(trace.num_steps()), 0.0);
    copies_.resize(cells, 0);
    busiest_.resize(cells, 0);
  }

  void PlayStep(int64_t step) {
    Plan(step, [&] { return player_->Foresee(step); });
    const bool in_step = options_.when == PlanTime::kInStep;
    if (in_step) Plan(step, [&] { return player_->Learn(step); });
    SplitStep(step);
    if (!in_step) Plan(step + 1, [&] { return player_->Learn(step); });
  }

  // One series per split.
  std::vector<ReplaySeries> Take() {
    for (size_t i = 0; i < series_.size(); ++i) {
      series_[i].copies = copies_;
      series_[i].busiest = busiest_;
      series_[i].plan_us = plan_us_;
      series_[i].copy_us = copy_us_;
    }
    return std::move(series_);
  }

 private:
  int64_t Now() const { return options_.now_ns ? options_.now_ns() : 0; }

  // Asks for a plan, whose copies the step pays, and compiles the rows that change.
  template <typename Ask>
  void Plan(int64_t charged_step, const Ask& ask) {
    const int64_t begin = Now();
    const std::optional<MigrationPlan> plan = ask();
    plan_ns_ += Now() - begin;
    if (!plan.has_value()) return;
    for (const Placement::LayerRow& row : plan->rows) {
      splitters_[row.layer] = Splitter(player_->placement().hosts(row.layer), options_.constants);
    }
    if (charged_step == trace_.num_steps()) return;
    const Topology& topology = player_->placement().topology();
    if (options_.cluster.has_value()) {
      copy_us_[charged_step] += PredictCopiesUs(*options_.cluster, topology, plan->moves);
    }
    std::vector<int32_t> received(topology.num_ranks());
    for (size_t i = 0; i < plan->moves.size();) {
      const int32_t layer = plan->moves[i].layer;
      std::fill(received.begin(), received.end(), 0);
      const size_t first = i;
      for (; i < plan->moves.size() && plan->moves[i].layer == layer; ++i) {
        ++received[topology.rank_of_slot(plan->moves[i].to_slot)];
      }
      const size_t cell = static_cast<size_t>(charged_step) * trace_.num_layers + layer;
      copies_[cell] += static_cast<int32_t>(i - first);
      busiest_[cell] += *std::max_element(received.begin(), received.end());
    }
  }

  void SplitStep(int64_t step) {
    plan_us_.push_back(static_cast<double>(std::exchange(plan_ns_, 0)) * 1e-3 / trace_.num_layers);
    const int32_t num_ranks = options_.topology.num_ranks();
    if (options_.cluster.has_value()) {
      for (ReplaySeries& series : series_) series.steps.emplace_back();
    }
    for (int32_t layer = 0; layer < trace_.num_layers; ++layer) {
      const std::span<const int32_t> counts = trace_.layer(step, layer);
      const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
      DealToSources(counts, num_ranks, &dealt_);
      for (size_t i = 0; i < series_.size(); ++i) {
        const int64_t begin = Now();
        splitters_[layer].Run(options_.splits[i], dealt_, &split_);
        series_[i].split_us.push_back(static_cast<double>(Now() - begin) * 1e-3);
        const auto over_mean = [&](int64_t largest, int32_t parts) {
          return total == 0 ? 1.0f
                            : static_cast<float>(static_cast<double>(largest) * parts /
                                                 static_cast<double>(total));
        };
        series_[i].imbalance.push_back(over_mean(split_.largest_load, num_ranks));
        series_[i].node_imbalance.push_back(over_mean(LargestNodeLoad(), num_nodes_));
        if (options_.cluster.has_value()) Predict(layer, &series_[i]);
      }
    }
  }

  // Of the split that was just made.
  int64_t LargestNodeLoad() {
    std::fill(node_load_.begin(), node_load_.end(), 0);
    for (size_t r = 0; r < split_.rank_load.size(); ++r) {
      node_load_[options_.topology.node_of_rank[r]] += split_.rank_load[r];
    }
    return *std::max_element(node_load_.begin(), node_load_.end());
  }

  // What the cluster would take for the split that was just made.
  void Predict(int32_t layer, ReplaySeries* series) {
    splitters_[layer].AddUp(series->split, dealt_, split_, &traffic_);
    const LayerTime time = PredictLayer(*options_.cluster, split_.quota,
                                        player_->placement().hosts(layer).host_rank, traffic_);
    series->layer_us.push_back(time.us());
    series->steps.back() += time;
  }

  const StepTrace& trace_;
  const ReplayOptions& options_;
  Player* player_;
  std::vector<ReplaySeries> series_;  // [splits]
  std::vector<Splitter> splitters_;   // [layers]
  std::vector<int32_t> copies_, busiest_;
  std::vector<double> copy_us_;  // [steps], with a cluster
  std::vector<double> plan_us_;  // [steps]
  int64_t plan_ns_ = 0;          // spent on planning since the last step was split
  std::vector<int32_t> dealt_;   // [R * E] counts of one layer and step over the sources
  Split split_;
  RowTraffic traffic_;
  const int32_t num_nodes_ = options_.topology.num_nodes();
  std::vector<int64_t> node_load_ = std::vector<int64_t>(static_cast<size_t>(num_nodes_));
};

template <typename T>
double MeanOf(const std::vector<T>& values) {
  return values.empty() ? 0.0
                        : std::accumulate(values.begin(), values.end(), 0.0) /
                              static_cast<double>(values.size());
}

// Nearest rank: the smallest value that 99 of 100 do not exceed.
template <typename T>
double P99Of(std::vector<T> values) {
  if (values.empty()) return 0.0;
  const size_t rank = (values.size() * 99 + 99) / 100 - 1;
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(rank), values.end());
  return values[rank];
}

PredictedFigures PredictedOf(const ReplaySeries& series, double background_share) {
  PredictedFigures figures{.layer_us_mean = MeanOf(series.layer_us),
                           .layer_us_p99 = P99Of(series.layer_us),
                           .copy_us_mean = MeanOf(series.copy_us)};
  LayerTime sum;
  std::vector<double> step_us, background_us;
  for (size_t t = 0; t < series.steps.size(); ++t) {
    const LayerTime& step = series.steps[t];
    sum += step;
    step_us.push_back(step.us());
    const double links_us = step.dispatch_us + step.combine_us;
    const double met = step.us() > 0.0 ? links_us / step.us() : 0.0;
    background_us.push_back(step.us() + series.copy_us[t] * met / (1.0 - background_share));
  }
  const auto num_steps = static_cast<double>(series.steps.size());
  figures.step_us_mean = MeanOf(step_us);
  figures.step_us_p99 = P99Of(step_us);
  figures.dispatch_us_mean = sum.dispatch_us / num_steps;
  figures.compute_us_mean = sum.compute_us / num_steps;
  figures.combine_us_mean = sum.combine_us / num_steps;
  figures.blocking_step_us_mean = figures.step_us_mean + figures.copy_us_mean;
  figures.background_step_us_mean = MeanOf(background_us);
  return figures;
}

ReplayFigures FiguresOf(const ReplaySeries& series, double rho, PlanTime when) {
  ReplayFigures figures{.policy = series.policy, .split = series.split, .rho = rho};
  figures.mean_imbalance = MeanOf(series.imbalance);
  figures.p99_imbalance = P99Of(series.imbalance);
  figures.mean_node_imbalance = MeanOf(series.node_imbalance);
  figures.copies_per_layer_step = MeanOf(series.copies);
  figures.busiest_copies_per_layer_step = MeanOf(series.busiest);
  figures.total_cost = figures.mean_imbalance + rho * figures.busiest_copies_per_layer_step;
  figures.plan_us_mean = MeanOf(series.plan_us);
  figures.plan_us_p99 = P99Of(series.plan_us);
  figures.split_us_mean = MeanOf(series.split_us);
  figures.split_us_p99 = P99Of(series.split_us);
  figures.critical_us_mean =
      figures.split_us_mean + (when == PlanTime::kInStep ? figures.plan_us_mean : 0.0);
  return figures;
}

absl::Status CheckOptions(const StepTrace& trace, const ReplayOptions& options) {
  if (options.policies.empty() || options.splits.empty() || options.rhos.empty()) {
    return absl::InvalidArgumentError("a replay needs a policy, a split and a rho");
  }
  for (double rho : options.rhos) {
    if (!(rho >= 0.0 && rho <= 1e6)) {
      return absl::InvalidArgumentError(absl::StrCat("rho is ", rho, ", allowed: 0 to 1e6"));
    }
  }
  if (!(options.copy_budget >= 0.0 && options.copy_budget <= 1e12)) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy budget is ", options.copy_budget, ", allowed: 0 (no limit) to 1e12"));
  }
  if (trace.num_steps() == 0) return absl::InvalidArgumentError("the trace has no step");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PlanTime> ParsePlanTime(const std::string& name) {
  for (PlanTime when : {PlanTime::kAfterStep, PlanTime::kInStep}) {
    if (name == NameOf(when)) return when;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown time '", name, "'; the choices are after-step, in-step"));
}

const char* NameOf(PlanTime when) {
  return when == PlanTime::kInStep ? "in-step" : "after-step";
}

std::vector<std::string> ReplayPolicyNames() {
  std::vector<std::string> names = PolicyNames();
  for (const char* name : {"oracle", "oracle-switch"}) names.push_back(name);
  return names;
}

absl::StatusOr<ReplayResult> Replay(const StepTrace& trace, const ReplayOptions& options) {
  BALLAST_RETURN_IF_ERROR(CheckOptions(trace, options));
  struct Job {
    std::string policy;
    std::vector<double> rhos;
    std::unique_ptr<Player> player;
  };
  std::vector<Job> jobs;  // all are made before the first runs, so that a bad name costs no time
  for (const std::string& policy : options.policies) {
    BALLAST_ASSIGN_OR_RETURN(const bool ignores_rho, IgnoresRho(policy));
    const size_t num_jobs = ignores_rho ? 1 : options.rhos.size();
    for (size_t i = 0; i < num_jobs; ++i) {
      BALLAST_ASSIGN_OR_RETURN(std::unique_ptr<Player> player,
                               MakePlayer(trace, options, policy, options.rhos[i]));
      jobs.push_back({.policy = policy,
                      .rhos = num_jobs == 1 ? options.rhos : std::vector<double>{options.rhos[i]},
                      .player = std::move(player)});
    }
  }
  ReplayResult result{
      .num_steps = trace.num_steps(), .num_layers = trace.num_layers, .series = {}, .figures = {}};
  const int64_t all_steps = static_cast<int64_t>(jobs.size()) * trace.num_steps();
  int64_t done = 0;
  for (Job& job : jobs) {
    Run run(trace, options, job.player.get());
    for (int64_t step = 0; step < trace.num_steps(); ++step) {
      run.PlayStep(step);
      if (options.progress) options.progress(++done, all_steps);
    }
    for (ReplaySeries& series : run.Take()) {
      series.policy = job.policy;
      series.rhos = job.rhos;
      for (double rho : job.rhos) {
        ReplayFigures& figures = result.figures.emplace_back(FiguresOf(series, rho, options.when));
        if (!options.cluster.has_value()) continue;
        figures.predicted = PredictedOf(series, options.cluster->background_share);
        if (options.when == PlanTime::kInStep) {
          figures.predicted->blocking_step_us_mean += figures.plan_us_mean * trace.num_layers;
        }
      }
      result.series.push_back(std::move(series));
    }
    job.player.reset();
  }
  return result;
}

}  // namespace ballast
