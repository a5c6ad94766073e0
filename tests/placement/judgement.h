// What the default policy must be worth on traffic that is drawn from recorded routing.
#ifndef BALLAST_TESTS_PLACEMENT_JUDGEMENT_H_
#define BALLAST_TESTS_PLACEMENT_JUDGEMENT_H_

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/npy.h"
#include "base/random.h"
#include "base/status.h"
#include "placement/replay.h"

namespace ballast::testing {

// The three recorded tasks, ids [tokens, layers, top-k].
inline absl::StatusOr<std::vector<NamedArray>> ReadTasks(const std::string& folder) {
  std::vector<NamedArray> tasks;
  for (const char* task : {"intent", "law", "summary"}) {
    const std::string path = absl::StrCat(folder, "/esft_deepseek_v2_lite/ids_", task, ".npy");
    BALLAST_ASSIGN_OR_RETURN(NpyArray array, ReadNpy(path));
    tasks.push_back({.name = path, .array = std::move(array)});
  }
  return tasks;
}

// Counts what tokens ask for, step by step.
class TraceBuilder {
 public:
  TraceBuilder(int32_t num_experts, int64_t step_tokens)
      : trace_{.num_experts = num_experts,
               .step_tokens = step_tokens,
               .phase_offsets = {},
               .phase_names = {}} {}

  void BeginPhase(const std::string& name) {
    trace_.phase_names.push_back(name);
    trace_.phase_offsets.push_back(steps_);
  }
  // `tokens`: rows of the task that make the step.
  void AddStep(const NpyArray& task, const std::vector<int64_t>& tokens) {
    const int64_t layers = task.shape[1], top_k = task.shape[2];
    trace_.num_layers = static_cast<int32_t>(layers);
    const size_t first = trace_.counts.size();
    trace_.counts.resize(first + layers * trace_.num_experts);
    for (int64_t token : tokens) {
      for (int64_t i = 0; i < layers * top_k; ++i) {
        const int64_t id = task.IntegerAt(token * layers * top_k + i);
        ++trace_.counts[first + i / top_k * trace_.num_experts + id];
      }
    }
    ++steps_;
  }
  StepTrace Take() {
    trace_.phase_offsets.push_back(steps_);
    return std::move(trace_);
  }

 private:
  StepTrace trace_;
  int64_t steps_ = 0;
};

// Phases of one task after another; each step is a window of 512 tokens at a random start.
inline StepTrace DrawPhases(const std::vector<NamedArray>& tasks, int phases, int steps_per_phase,
                            uint64_t seed) {
  constexpr int64_t kTokens = 512;
  Random random(seed);
  TraceBuilder builder(64, kTokens);
  for (int phase = 0; phase < phases; ++phase) {
    const NpyArray& task = tasks[phase % tasks.size()].array;
    builder.BeginPhase(tasks[phase % tasks.size()].name);
    for (int step = 0; step < steps_per_phase; ++step) {
      std::vector<int64_t> tokens(kTokens);
      const int64_t first = static_cast<int64_t>(random.Below(task.shape[0] - kTokens + 1));
      for (int64_t i = 0; i < kTokens; ++i) tokens[i] = first + i;
      builder.AddStep(task, tokens);
    }
  }
  return builder.Take();
}

// Steps of 1,024 tokens drawn one by one from one task.
inline StepTrace DrawStationary(const NamedArray& task, int steps, uint64_t seed) {
  Random random(seed);
  TraceBuilder builder(64, 1024);
  builder.BeginPhase(task.name);
  for (int step = 0; step < steps; ++step) {
    std::vector<int64_t> tokens(1024);
    for (int64_t& token : tokens) {
      token = static_cast<int64_t>(random.Below(task.array.shape[0]));
    }
    builder.AddStep(task.array, tokens);
  }
  return builder.Take();
}

inline ReplayOptions JudgedOptions(std::vector<std::string> policies, std::vector<double> rhos) {
  ReplayOptions options{.topology = Topology::Uniform(8, 9), .policies = std::move(policies)};
  options.rhos = std::move(rhos);
  options.controller.min_steps_between = 0;
  return options;
}

struct Verdict {
  std::string table;   // a line per rho
  double worst = 0.0;  // largest cost of regret over the best of the others
};

// Compares the default policy with the best of the others, rho by rho.
inline absl::StatusOr<Verdict> JudgeAgainstOthers(const StepTrace& trace,
                                                  std::vector<double> rhos) {
  BALLAST_ASSIGN_OR_RETURN(
      const ReplayResult result,
      Replay(trace, JudgedOptions({"never", "eplb-interval:8", "eplb-interval:64", "oracle-switch",
                                   "regret"},
                                  rhos)));
  Verdict verdict;
  for (double rho : rhos) {
    double regret = 0.0;
    std::pair<double, std::string> best = {1e30, ""};
    for (const ReplayFigures& figures : result.figures) {
      if (figures.rho != rho) continue;
      if (figures.policy == "regret") {
        regret = figures.total_cost;
      } else {
        best = std::min(best, {figures.total_cost, figures.policy});
      }
    }
    verdict.worst = std::max(verdict.worst, regret / best.first);
    absl::StrAppend(&verdict.table, "rho ", rho, ": regret ", regret, ", best other ", best.first,
                    " (", best.second, "), ratio ", regret / best.first, "\n");
  }
  return verdict;
}

// Copies per layer-step on stationary traffic, after the first 50 steps, at rho 0.3.
inline absl::StatusOr<double> CopiesWhenStationary(const NamedArray& task, int steps) {
  const StepTrace trace = DrawStationary(task, steps, /*seed=*/1);
  BALLAST_ASSIGN_OR_RETURN(const ReplayResult result,
                           Replay(trace, JudgedOptions({"regret"}, {0.3})));
  constexpr int64_t kSettled = 50;
  const std::vector<int32_t>& copies = result.series[0].copies;
  int64_t late = 0;
  for (size_t i = kSettled * trace.num_layers; i < copies.size(); ++i) late += copies[i];
  return static_cast<double>(late) / static_cast<double>((steps - kSettled) * trace.num_layers);
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_PLACEMENT_JUDGEMENT_H_
