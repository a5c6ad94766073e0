#include "runtime/ranks_api.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/json_depth.h"
#include "base/status.h"
#include "runtime/completions_api.h"

namespace ballast {
namespace {

using nlohmann::ordered_json;

absl::StatusOr<int> RankOf(const std::string& body) {
  if (JsonNestsTooDeep(body)) {
    return absl::InvalidArgumentError(absl::StrCat("body: nests deeper than ", kMostJsonDepth));
  }
  const ordered_json json = ordered_json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.size() != 1 || !json.contains("rank") ||
      !json["rank"].is_number_integer()) {
    return absl::InvalidArgumentError("body: allowed is {\"rank\": number of a rank}");
  }
  const auto rank = json["rank"].get<int64_t>();
  // Out of range for any job; the front end knows which ranks this one has.
  return static_cast<int>(std::clamp<int64_t>(rank, -1, INT32_MAX));
}

const char* NameOf(Frontend::RankState state) {
  switch (state) {
    case Frontend::RankState::kServes:
      return "serves";
    case Frontend::RankState::kLeaving:
      return "leaving";
    case Frontend::RankState::kLeft:
      return "left";
    case Frontend::RankState::kLost:
      return "lost";
  }
  return "unknown";
}

HttpReply Answer(const absl::Status& status, int rank, const char* state) {
  if (!status.ok()) return {HttpStatusOf(status), ErrorJson(status)};
  return {202, ordered_json{{"rank", rank}, {"state", state}}.dump()};
}

}  // namespace

HttpReply AnswerRanks(const Frontend& frontend) {
  ordered_json ranks = ordered_json::array();
  for (const Frontend::RankState state : frontend.rank_states()) {
    ranks.push_back({{"rank", ranks.size()}, {"state", NameOf(state)}});
  }
  return {200, ordered_json{{"ranks", std::move(ranks)}}.dump()};
}

HttpReply AnswerVerify(Verification* verification) {
  const absl::StatusOr<std::string> answer = verification->Run();
  if (!answer.ok()) return {HttpStatusOf(answer.status()), ErrorJson(answer.status())};
  return {200, *answer};
}

HttpReply AnswerDrain(Frontend* frontend, const std::function<void(int rank)>& vacate,
                      const std::string& body) {
  const absl::StatusOr<int> rank = RankOf(body);
  absl::Status status = rank.status();
  if (status.ok() && frontend->rank_states().size() == 1) {
    status = absl::InvalidArgumentError(
        "rank: there is none to drain: this server has rank 0 alone, which takes the requests");
  }
  if (status.ok()) status = frontend->BeginLeaving(*rank);
  if (status.ok()) vacate(*rank);
  return Answer(status, rank.value_or(-1), "leaving");
}

HttpReply AnswerUndrain(Frontend* frontend, const std::string& body) {
  const absl::StatusOr<int> rank = RankOf(body);
  absl::Status status = rank.status();
  if (status.ok()) status = frontend->Return(*rank);
  return Answer(status, rank.value_or(-1), "serves");
}

}  // namespace ballast
