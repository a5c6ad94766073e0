#include "deploy/demo/driver/run_record.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "base/status.h"

namespace ballast {

using nlohmann::json;

// By field name, for nlohmann (the macro's functions have to be in the types' namespace).
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(StepRecord, step, unix_us, wall_us, tokens, epoch, copies,
                                   cpu_us, load)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RequestRecord, index, latency_ms, token_ids)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(PhaseRecord, name, begin_us, end_us, tokens_per_s, requests,
                                   steps)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RunRecord, cores, seed, concurrency, max_tokens, phases)

namespace {

// Every step of a log has the same ranks and layers.
absl::Status CheckShape(const StepRecord& step, const StepRecord& first) {
  bool same = step.cpu_us.size() == first.cpu_us.size() && step.load.size() == first.load.size();
  for (const auto& layer : step.load) same = same && layer.size() == step.cpu_us.size();
  if (same) return absl::OkStatus();
  return absl::InvalidArgumentError("the numbers of ranks or layers do not agree");
}

}  // namespace

absl::StatusOr<std::vector<StepRecord>> ParseStepLog(std::string_view text) {
  std::vector<StepRecord> steps;
  int64_t line_number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    if (end == std::string_view::npos) break;
    const std::string_view line = text.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (line.empty()) continue;
    absl::Status status;
    try {
      steps.push_back(json::parse(line).get<StepRecord>());
      status = CheckShape(steps.back(), steps.front());
    } catch (const json::exception& error) {
      status = absl::InvalidArgumentError(error.what());
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("step log, line ", line_number, ": ", status.message()));
    }
  }
  return steps;
}

void AssignSteps(const std::vector<StepRecord>& steps, std::vector<PhaseRecord>* phases) {
  for (const StepRecord& step : steps) {
    PhaseRecord* home = nullptr;
    for (PhaseRecord& phase : *phases) {
      if (phase.begin_us <= step.unix_us) home = &phase;
    }
    if (home != nullptr) home->steps.push_back(step);
  }
}

std::string ToJson(const RunRecord& run) {
  return json(run).dump() + "\n";
}

absl::StatusOr<RunRecord> ParseRunRecord(std::string_view text) {
  try {
    auto run = json::parse(text).get<RunRecord>();
    const StepRecord* first = nullptr;
    for (const PhaseRecord& phase : run.phases) {
      for (const StepRecord& step : phase.steps) {
        if (first == nullptr) first = &step;
        BALLAST_RETURN_IF_ERROR(CheckShape(step, *first));
      }
    }
    return run;
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a record of a run: ", error.what()));
  }
}

}  // namespace ballast
