#include "deploy/demo/driver/measures.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/status.h"

namespace ballast {
namespace {

using nlohmann::ordered_json;
using Load = std::vector<std::vector<int64_t>>;  // [L][R]

// A mean that is `empty` where there is nothing to average.
class Mean {
 public:
  void Add(double value) {
    sum_ += value;
    ++count_;
  }
  double Value(double empty) const { return count_ == 0 ? empty : sum_ / count_; }

 private:
  double sum_ = 0;
  int count_ = 0;
};

// Adds the imbalance of every layer that has a load.
void AddImbalance(const Load& load, Mean* mean) {
  for (const std::vector<int64_t>& ranks : load) {
    int64_t total = 0, largest = 0;
    for (const int64_t copies : ranks) {
      total += copies;
      largest = std::max(largest, copies);
    }
    if (total == 0) continue;
    mean->Add(static_cast<double>(largest) * static_cast<double>(ranks.size()) /
              static_cast<double>(total));
  }
}

void AddLoad(const Load& load, Load* sum) {
  if (sum->empty()) sum->assign(load.size(), std::vector<int64_t>(load.front().size(), 0));
  for (size_t layer = 0; layer < load.size(); ++layer) {
    for (size_t rank = 0; rank < load[layer].size(); ++rank) {
      (*sum)[layer][rank] += load[layer][rank];
    }
  }
}

// The summed loads of the windows. An unfinished last window counts only where it is the only one.
std::vector<Load> Windows(const std::vector<StepRecord>& steps) {
  std::vector<Load> windows;
  Load open;
  int64_t tokens = 0;
  for (const StepRecord& step : steps) {
    if (step.load.empty()) continue;
    AddLoad(step.load, &open);
    tokens += step.tokens;
    if (tokens < kWindowTokens) continue;
    windows.push_back(std::move(open));
    open = {};
    tokens = 0;
  }
  if (windows.empty() && !open.empty()) windows.push_back(std::move(open));
  return windows;
}

// The smallest value that is not below `share` of all (nearest rank).
double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::max<size_t>(rank, 1) - 1];
}

std::string FirstDifference(const RunRecord& fixed, const RunRecord& dynamic) {
  for (size_t p = 0; p < fixed.phases.size(); ++p) {
    const auto& a = fixed.phases[p].requests;
    const auto& b = dynamic.phases[p].requests;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].token_ids == b[i].token_ids) continue;
      const auto [at, other] = std::mismatch(a[i].token_ids.begin(), a[i].token_ids.end(),
                                             b[i].token_ids.begin(), b[i].token_ids.end());
      return absl::StrCat("phase ", fixed.phases[p].name, ", request ", a[i].index, ", token ",
                          at - a[i].token_ids.begin());
    }
  }
  return "";
}

absl::Status CheckSameRequests(const RunRecord& fixed, const RunRecord& dynamic) {
  bool same = fixed.phases.size() == dynamic.phases.size() && fixed.seed == dynamic.seed &&
              fixed.max_tokens == dynamic.max_tokens;
  for (size_t p = 0; same && p < fixed.phases.size(); ++p) {
    same = fixed.phases[p].name == dynamic.phases[p].name &&
           fixed.phases[p].requests.size() == dynamic.phases[p].requests.size();
  }
  if (!same) return absl::InvalidArgumentError("the two runs did not send the same requests");
  for (const RunRecord* run : {&fixed, &dynamic}) {
    for (const PhaseRecord& phase : run->phases) {
      if (!phase.steps.empty()) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "phase ", phase.name, " has no steps: was the server started with --step-log?"));
    }
  }
  return absl::OkStatus();
}

ordered_json MeasuresJson(const PhaseMeasures& m) {
  return {{"imbalance", m.imbalance},
          {"step_imbalance", m.step_imbalance},
          {"critical_path_ms", m.critical_path_ms},
          {"step_ms_p50", m.step_ms_p50},
          {"step_ms_p99", m.step_ms_p99},
          {"tokens_per_s", m.tokens_per_s}};
}

}  // namespace

PhaseMeasures Measure(const PhaseRecord& phase) {
  PhaseMeasures measures;
  Mean step_imbalance, critical_path_us;
  std::vector<double> step_ms;
  int64_t tokens = 0;
  for (const StepRecord& step : phase.steps) {
    measures.copies_moved += step.copies;
    if (step.tokens == 0) continue;
    tokens += step.tokens;
    AddImbalance(step.load, &step_imbalance);
    step_ms.push_back(static_cast<double>(step.wall_us) * 1e-3);
    if (!step.cpu_us.empty()) {
      critical_path_us.Add(
          static_cast<double>(*std::max_element(step.cpu_us.begin(), step.cpu_us.end())));
    }
  }
  const std::vector<Load> windows = Windows(phase.steps);
  Mean imbalance, settled;
  for (size_t w = 0; w < windows.size(); ++w) {
    AddImbalance(windows[w], &imbalance);
    if (w >= windows.size() / 2) AddImbalance(windows[w], &settled);
  }
  measures.imbalance = imbalance.Value(1);
  measures.settled_imbalance = settled.Value(1);
  measures.step_imbalance = step_imbalance.Value(1);
  measures.critical_path_ms = critical_path_us.Value(0) * 1e-3;
  measures.step_ms_p50 = Percentile(step_ms, 0.50);
  measures.step_ms_p99 = Percentile(step_ms, 0.99);
  const int64_t wall_us = std::max<int64_t>(phase.end_us - phase.begin_us, 1);
  measures.tokens_per_s = static_cast<double>(tokens) / (static_cast<double>(wall_us) * 1e-6);
  return measures;
}

absl::StatusOr<Comparison> Compare(const RunRecord& fixed, const RunRecord& dynamic) {
  BALLAST_RETURN_IF_ERROR(CheckSameRequests(fixed, dynamic));
  Comparison comparison;
  for (size_t p = 0; p < fixed.phases.size(); ++p) {
    comparison.phases.push_back(
        {fixed.phases[p].name, Measure(fixed.phases[p]), Measure(dynamic.phases[p])});
    comparison.ranks = static_cast<int64_t>(fixed.phases[p].steps.front().cpu_us.size());
  }
  comparison.first_difference = FirstDifference(fixed, dynamic);
  comparison.texts_identical = comparison.first_difference.empty();
  comparison.cores = fixed.cores;
  return comparison;
}

std::string ToJson(const Comparison& comparison) {
  ordered_json phases = ordered_json::array();
  for (const PhaseComparison& phase : comparison.phases) {
    ordered_json dynamic = MeasuresJson(phase.dynamic);
    dynamic["settled_imbalance"] = phase.dynamic.settled_imbalance;
    dynamic["copies_moved"] = phase.dynamic.copies_moved;
    phases.push_back(
        {{"name", phase.name}, {"static", MeasuresJson(phase.fixed)}, {"dynamic", dynamic}});
  }
  const ordered_json result = {{"phases", phases}, {"texts_identical", comparison.texts_identical}};
  return result.dump(2) + "\n";
}

std::optional<std::string> Oversubscribed(const Comparison& comparison) {
  if (comparison.ranks <= comparison.cores) return std::nullopt;
  return absl::StrCat("oversubscribed: ", comparison.ranks, " ranks on ", comparison.cores,
                      " cores");
}

std::string ToTable(const Comparison& comparison) {
  std::string table;
  std::array<char, 200> line;
  const auto add = [&](const char* phase, const char* run, const PhaseMeasures& m,
                       bool is_dynamic) {
    std::array<char, 32> settled = {"-"}, copies = {"-"};
    if (is_dynamic) {
      std::snprintf(settled.data(), settled.size(), "%.3f", m.settled_imbalance);
      std::snprintf(copies.data(), copies.size(), "%lld", static_cast<long long>(m.copies_moved));
    }
    std::snprintf(line.data(), line.size(),
                  "%-12s %-8s %9.3f %8s %9.3f %13.2f %9.2f %9.2f %9.0f %7s\n", phase, run,
                  m.imbalance, settled.data(), m.step_imbalance, m.critical_path_ms, m.step_ms_p50,
                  m.step_ms_p99, m.tokens_per_s, copies.data());
    table += line.data();
  };
  std::snprintf(line.data(), line.size(), "%-12s %-8s %9s %8s %9s %13s %9s %9s %9s %7s\n", "phase",
                "run", "imbalance", "settled", "per step", "crit.path ms", "p50 ms", "p99 ms",
                "tokens/s", "copies");
  table += line.data();
  for (const PhaseComparison& phase : comparison.phases) {
    add(phase.name.c_str(), "static", phase.fixed, false);
    add("", "dynamic", phase.dynamic, true);
  }
  table +=
      "imbalance: largest rank load / mean, over windows of 4,096 tokens and layers; settled: the\n"
      "second half of them; per step: plain mean over single steps and layers, however many "
      "tokens\n"
      "a step has.\n";
  if (const auto note = Oversubscribed(comparison)) {
    table += *note + ": wall times say little here; the critical path is processor time.\n";
  }
  table += comparison.texts_identical
               ? std::string("texts: identical in both runs, token by token\n")
               : "texts: DIFFERENT, first at " + comparison.first_difference + "\n";
  return table;
}

}  // namespace ballast
