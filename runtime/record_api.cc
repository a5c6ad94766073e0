#include "runtime/record_api.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/json_depth.h"
#include "base/status.h"
#include "runtime/completions_api.h"

namespace ballast {
namespace {

using nlohmann::ordered_json;

absl::Status Reject(const std::string& field, const ordered_json& value,
                    const std::string& allowed) {
  const std::string shown = value.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", shown.substr(0, 80), ", allowed: ", allowed));
}

absl::Status Start(TraceRecorder* recorder, const std::string& body) {
  if (JsonNestsTooDeep(body)) {
    return absl::InvalidArgumentError(absl::StrCat("body: nests deeper than ", kMostJsonDepth));
  }
  const ordered_json json =
      body.empty() ? ordered_json::object() : ordered_json::parse(body, nullptr, false);
  if (!json.is_object()) return absl::InvalidArgumentError("body: allowed is a JSON object");
  auto what = TraceRecorder::What::kCounts;
  int64_t max_bytes = TraceRecorder::kDefaultBytes;
  for (const auto& [key, value] : json.items()) {
    if (key == "what") {
      if (value != "counts" && value != "ids") return Reject(key, value, "\"counts\", \"ids\"");
      if (value == "ids") what = TraceRecorder::What::kIds;
    } else if (key == "max_bytes") {
      // Beyond int64 a number is unsigned or a double.
      if (!value.is_number_integer() || value > TraceRecorder::kMostBytes || value < 1) {
        return Reject(key, value, absl::StrCat("1 to ", TraceRecorder::kMostBytes));
      }
      max_bytes = value.get<int64_t>();
    } else {
      return Reject(key, value, "the fields what and max_bytes");
    }
  }
  return recorder->Start(what, max_bytes);
}

std::string StateJson(const TraceRecorder::State& state) {
  const bool counts = state.what == TraceRecorder::What::kCounts;
  ordered_json json = {{"recording", state.started && !state.full && !state.gap},
                       {"full", state.full},
                       {"gap", state.gap},
                       {"what", counts ? "counts" : "ids"}};
  if (counts) json["steps"] = state.length;
  json["tokens"] = state.tokens;
  json["bytes"] = state.bytes;
  json["max_bytes"] = state.max_bytes;
  return json.dump();
}

}  // namespace

HttpReply AnswerRecord(TraceRecorder* recorder, const std::string& action,
                       const std::string& body) {
  absl::Status status;
  if (action == "dump") {
    absl::StatusOr<std::string> file = recorder->Dump();
    if (file.ok()) return {200, *std::move(file), "application/octet-stream"};
    status = file.status();
  } else if (action == "start") {
    status = Start(recorder, body);
  } else if (action == "stop") {
    status = recorder->Stop();
  }
  if (!status.ok()) return {HttpStatusOf(status), ErrorJson(status)};
  return {200, StateJson(recorder->state())};
}

}  // namespace ballast
