#include "runtime/server_state.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/file.h"
#include "base/json_depth.h"
#include "base/log.h"
#include "base/status.h"

namespace ballast {
namespace {

using nlohmann::ordered_json;

constexpr int kSchema = 1;
constexpr int64_t kMostWindowTokens = int64_t{1} << 40;
constexpr int64_t kMostWindowLoad = kMostWindowTokens << 10;  // a thousand experts per token
constexpr const char* kKeys[] = {"schema",        "model",       "coverage", "node_local",
                                 "window_tokens", "window_load", "placement"};

absl::Status Bad(const char* key, const std::string& allowed) {
  return absl::InvalidArgumentError(absl::StrCat("state: ", key, ": allowed: ", allowed));
}

absl::Status DoNotFit(const auto&... what) {
  return absl::FailedPreconditionError(absl::StrCat(what...));
}

absl::StatusOr<int64_t> NumberAt(const ordered_json& json, const char* key, int64_t most) {
  const ordered_json& value = json[key];
  if (!value.is_number_integer() || value.get<int64_t>() < 0 || value.get<int64_t>() > most) {
    return Bad(key, absl::StrCat("an integer from 0 to ", most));
  }
  return value.get<int64_t>();
}

// One row of the window. ERRORS kInvalidArgument
absl::Status AppendRow(const ordered_json& row, int32_t experts, std::vector<int64_t>* load) {
  const std::string allowed = absl::StrCat("a row of ", experts, " counts per layer");
  if (!row.is_array() || row.size() != static_cast<size_t>(experts)) {
    return Bad("window_load", allowed);
  }
  for (const ordered_json& count : row) {
    if (!count.is_number_integer() || count.get<int64_t>() < 0 ||
        count.get<int64_t>() > kMostWindowLoad) {
      return Bad("window_load", absl::StrCat(allowed, ", each from 0 to ", kMostWindowLoad));
    }
    load->push_back(count.get<int64_t>());
  }
  return absl::OkStatus();
}

}  // namespace

std::string ToJson(const ServerState& state) {
  const size_t experts = static_cast<size_t>(state.placement.num_experts());
  ordered_json load = ordered_json::array();
  for (size_t begin = 0; begin + experts <= state.window_load.size(); begin += experts) {
    const auto row = state.window_load.begin() + static_cast<std::ptrdiff_t>(begin);
    load.push_back(std::vector<int64_t>(row, row + static_cast<std::ptrdiff_t>(experts)));
  }
  return ordered_json{{"schema", kSchema},
                      {"model", state.model},
                      {"coverage", state.rules.coverage},
                      {"node_local", state.rules.node_local},
                      {"window_tokens", state.window_tokens},
                      {"window_load", std::move(load)},
                      {"placement", ordered_json::parse(state.placement.ToJson())}}
      .dump();
}

absl::StatusOr<ServerState> ParseServerState(const std::string& text) {
  if (JsonNestsTooDeep(text)) return Bad("JSON", absl::StrCat("nested at most ", kMostJsonDepth));
  const ordered_json json = ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Bad("JSON", "an object");
  for (const auto& [key, value] : json.items()) {
    if (std::ranges::find(kKeys, key) == std::end(kKeys)) {
      return absl::InvalidArgumentError(absl::StrCat("state: unknown key '", key, "'"));
    }
  }
  for (const char* key : kKeys) {
    if (!json.contains(key)) return Bad(key, "a value");
  }
  if (json["schema"] != kSchema) return Bad("schema", "1");
  if (!json["model"].is_string()) return Bad("model", "a string");
  BALLAST_ASSIGN_OR_RETURN(const int64_t coverage, NumberAt(json, "coverage", 1));
  if (!json["node_local"].is_boolean()) return Bad("node_local", "true, false");
  BALLAST_ASSIGN_OR_RETURN(const int64_t tokens,
                           NumberAt(json, "window_tokens", kMostWindowTokens));
  BALLAST_ASSIGN_OR_RETURN(Placement placement, Placement::FromJson(json["placement"].dump()));
  std::vector<int64_t> load;
  if (!json["window_load"].is_array() ||
      json["window_load"].size() != static_cast<size_t>(placement.num_layers())) {
    return Bad("window_load", absl::StrCat("an array of ", placement.num_layers(), " rows"));
  }
  for (const ordered_json& row : json["window_load"]) {
    BALLAST_RETURN_IF_ERROR(AppendRow(row, placement.num_experts(), &load));
  }
  return ServerState{.model = json["model"].get<std::string>(),
                     .rules = {.coverage = static_cast<int32_t>(coverage),
                               .node_local = json["node_local"].get<bool>()},
                     .placement = std::move(placement),
                     .window_tokens = tokens,
                     .window_load = std::move(load)};
}

absl::Status CheckFits(const ServerState& state, const ServerState& fresh) {
  const Placement& before = state.placement;
  const Placement& after = fresh.placement;
  if (state.model != fresh.model) {
    return DoNotFit("it is of model ", state.model, ", this is ", fresh.model);
  }
  if (before.num_layers() != after.num_layers() || before.num_experts() != after.num_experts()) {
    return DoNotFit("it has ", before.num_layers(), " layers of ", before.num_experts(),
                    " experts, the model has ", after.num_layers(), " of ", after.num_experts());
  }
  if (fresh.rules.coverage > state.rules.coverage) {
    return DoNotFit("it was made without --coverage ", fresh.rules.coverage);
  }
  if (fresh.rules.node_local && !state.rules.node_local) {
    return DoNotFit("it was made without --node-local");
  }
  const Topology& then = before.topology();
  const Topology& now = after.topology();
  if (then.num_ranks() != now.num_ranks()) {
    return DoNotFit("it is of ", then.num_ranks(), " ranks, here are ", now.num_ranks());
  }
  for (int32_t r = 0; r < now.num_ranks(); ++r) {
    if (then.slots_on(r) != now.slots_on(r)) {
      return DoNotFit("rank ", r, " had ", then.slots_on(r), " slots, it now has ",
                      now.slots_on(r));
    }
    if (then.node_of_rank[r] != now.node_of_rank[r]) {
      return DoNotFit("rank ", r, " was on node ", then.node_of_rank[r], ", it now is on node ",
                      now.node_of_rank[r]);
    }
  }
  return absl::OkStatus();
}

StateKeeper::StateKeeper(Options options)
    : options_(std::move(options)), thread_(&StateKeeper::Loop, this) {}

StateKeeper::~StateKeeper() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void StateKeeper::Loop() {
  for (bool stop = false; !stop;) {
    {
      std::unique_lock lock(mutex_);
      stop = wake_.wait_for(lock, std::chrono::milliseconds(options_.period_ms),
                            [this] { return stop_; });
    }
    Write();
  }
}

void StateKeeper::Write() {
  std::shared_ptr<const ServerState> state = options_.state();
  if (state == nullptr || state == written_) return;
  const absl::Status status = WriteFile(options_.path, ToJson(*state));
  if (status.ok()) written_ = std::move(state);
  if (!status.ok()) LogWarning("state", std::string(status.message()));
  if (options_.on_written) options_.on_written(status);
}

}  // namespace ballast
