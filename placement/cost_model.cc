#include "placement/cost_model.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr double kMostRowUs = 1000.0;  // 2^31 rows of both parts at a speed of 1/16 stay below 2^63
constexpr double kMostUs = 1e6;
constexpr double kFastest = 16.0;

int64_t TicksOf(double us) {
  return std::llround(us * kTicksPerUs);
}

absl::Status CheckTime(const char* key, double value, double most) {
  if (value >= 0.0 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is ", value, ", allowed: 0 to ", most, " microseconds"));
}

// The number at `key`, or `otherwise` where it is null or absent.
absl::Status ReadNumber(const nlohmann::json& json, const char* key, double otherwise,
                        double* value) {
  const auto at = json.find(key);
  *value = otherwise;
  if (at == json.end() || at->is_null()) return absl::OkStatus();
  if (!at->is_number()) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, " is ", at->dump(), ", allowed: a number or null"));
  }
  *value = at->get<double>();
  return absl::OkStatus();
}

absl::Status ReadSpeeds(const nlohmann::json& json, std::vector<double>* speed) {
  const auto at = json.find("speed");
  if (at == json.end() || at->is_null()) return absl::OkStatus();
  const auto is_number = [](const nlohmann::json& value) { return value.is_number(); };
  if (!at->is_array() || !std::all_of(at->begin(), at->end(), is_number)) {
    return absl::InvalidArgumentError(
        absl::StrCat("speed is ", at->dump(), ", allowed: a list of numbers, one per rank"));
  }
  *speed = at->get<std::vector<double>>();
  return absl::OkStatus();
}

absl::StatusOr<CostConstants> ConstantsOf(const nlohmann::json& json, int32_t num_ranks) {
  if (!json.is_object()) return absl::InvalidArgumentError("not a JSON object");
  constexpr const char* kKeys[] = {"expert_read_us",      "token_us",   "row_block", "block_us",
                                   "link_us_per_token",   "message_us", "copy_us",   "speed",
                                   "network_us_per_token"};
  // What `ballast doctor --constants` says of its measurement, beside the constants.
  constexpr const char* kNotes[] = {"commit",     "machine",       "ranks",        "hidden",
                                    "intermediate", "dtype",       "read_bytes",   "read_gb_per_s",
                                    "expert_bytes", "gflop_per_s", "step_tokens",  "top_k",
                                    "rho",          "note"};
  for (const auto& [key, value] : json.items()) {
    if (std::find(std::begin(kKeys), std::end(kKeys), key) != std::end(kKeys)) continue;
    if (std::find(std::begin(kNotes), std::end(kNotes), key) != std::end(kNotes)) continue;
    std::string allowed;
    for (const char* name : kKeys) absl::StrAppend(&allowed, allowed.empty() ? "" : ", ", name);
    return absl::InvalidArgumentError(
        absl::StrCat("unknown key \"", key, "\", allowed: ", allowed));
  }
  CostConstants constants;
  double row_block = 0.0, block_us = 0.0, copy_us = 0.0;
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "expert_read_us", 0.0, &constants.expert_read_us));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "row_block", 1.0, &row_block));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "block_us", 0.0, &block_us));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "copy_us", 0.0, &copy_us));
  if (!(row_block >= 1.0 && row_block <= 65536.0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("row_block is ", row_block, ", allowed: 1 to 65536"));
  }
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "token_us", block_us / row_block, &constants.token_us));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "link_us_per_token", 0.0, &constants.link_us_per_token));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "network_us_per_token", constants.link_us_per_token,
                                     &constants.network_us_per_token));
  BALLAST_RETURN_IF_ERROR(ReadNumber(json, "message_us", 0.0, &constants.message_us));
  BALLAST_RETURN_IF_ERROR(ReadSpeeds(json, &constants.speed));
  BALLAST_RETURN_IF_ERROR(CheckCostConstants(constants, num_ranks));
  return constants;
}

}  // namespace

absl::Status CheckCostConstants(const CostConstants& constants, int32_t num_ranks) {
  BALLAST_RETURN_IF_ERROR(CheckTime("expert_read_us", constants.expert_read_us, kMostUs));
  BALLAST_RETURN_IF_ERROR(CheckTime("token_us", constants.token_us, kMostRowUs));
  BALLAST_RETURN_IF_ERROR(CheckTime("link_us_per_token", constants.link_us_per_token, kMostRowUs));
  BALLAST_RETURN_IF_ERROR(
      CheckTime("network_us_per_token", constants.network_us_per_token, kMostRowUs));
  BALLAST_RETURN_IF_ERROR(CheckTime("message_us", constants.message_us, kMostUs));
  if (constants.expert_read_us == 0.0 && constants.token_us == 0.0) {
    return absl::InvalidArgumentError(
        "expert_read_us is 0 and token_us is 0, allowed: one of them above 0");
  }
  if (!constants.speed.empty() && constants.speed.size() != static_cast<size_t>(num_ranks)) {
    return absl::InvalidArgumentError(absl::StrCat("speed has ", constants.speed.size(),
                                                   " numbers, allowed: none or one for each of ",
                                                   num_ranks, " ranks"));
  }
  for (size_t r = 0; r < constants.speed.size(); ++r) {
    if (constants.speed[r] >= 1.0 / kFastest && constants.speed[r] <= kFastest) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("speed of rank ", r, " is ", constants.speed[r], ", allowed: 0.0625 to 16"));
  }
  return absl::OkStatus();
}

absl::StatusOr<CostConstants> CostConstantsFromJson(const std::string& name,
                                                    const std::string& json, int32_t num_ranks) {
  if (JsonNestsTooDeep(json)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": nests deeper than ", kMostJsonDepth));
  }
  const nlohmann::json parsed = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false,
                                                      /*ignore_comments=*/true);
  absl::StatusOr<CostConstants> constants = ConstantsOf(parsed, num_ranks);
  if (constants.ok()) return constants;
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", constants.status().message()));
}

int64_t CostModel::OnRank::MostWithin(int64_t ticks) const {
  if (ticks < 0) return -1;
  int64_t most = std::numeric_limits<int32_t>::max();
  if (row + link > 0) most = std::min(most, ticks / (row + link));
  if (ticks < read) return 0;
  if (link > 0) most = std::min(most, (ticks - read) / link);
  return most;
}

CostModel::CostModel(const CostConstants& constants, const LayerHosts& hosts)
    : on_rank_(hosts.num_ranks), base_(TicksOf(constants.message_us) * (hosts.num_ranks - 1)) {
  BALLAST_CHECK(CheckCostConstants(constants, hosts.num_ranks).ok());
  for (int32_t r = 0; r < hosts.num_ranks; ++r) {
    const auto ranks_of_node =
        std::count(hosts.node_of_rank.begin(), hosts.node_of_rank.end(), hosts.node_of_rank[r]);
    const double link =
        (constants.link_us_per_token * static_cast<double>(ranks_of_node - 1) +
         constants.network_us_per_token * static_cast<double>(hosts.num_ranks - ranks_of_node)) /
        hosts.num_ranks;
    const double speed = constants.speed.empty() ? 1.0 : constants.speed[r];
    on_rank_[r] = {.read = TicksOf(constants.expert_read_us / speed),
                   .row = TicksOf(constants.token_us / speed),
                   .link = TicksOf(link)};
  }
}

void CostModel::RankTicks(std::span<const int32_t> quota, std::span<const int32_t> host_rank,
                          std::span<int64_t> ticks) const {
  BALLAST_CHECK(quota.size() == host_rank.size() && ticks.size() == on_rank_.size());
  std::fill(ticks.begin(), ticks.end(), base_);
  for (size_t h = 0; h < quota.size(); ++h) {
    ticks[host_rank[h]] += on_rank_[host_rank[h]].Of(quota[h]);
  }
}

double CostModel::LargestUs(std::span<const int32_t> quota,
                            std::span<const int32_t> host_rank) const {
  std::vector<int64_t> ticks(on_rank_.size());
  RankTicks(quota, host_rank, ticks);
  return static_cast<double>(*std::max_element(ticks.begin(), ticks.end())) / kTicksPerUs;
}

}  // namespace ballast
