// What a server remembers over a restart, and how it is asked whether it is sound.
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <thread>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

constexpr int kRanks = 2;

// Serves some requests and moves experts, so that there is something to remember. The placement in
// force at the end.
json ServeAndMove(Server& server) {
  for (const Answer& answer : CompleteAll(server, MixedRequests(6, 8), 6)) {
    REQUIRE(answer.status == 200);
  }
  const int64_t epoch = server.Epoch();
  for (int i = 0; i < 100 && server.Epoch() == epoch; ++i) {
    server.Request("POST", "/v1/rebalance");
    CompleteAll(server, MixedRequests(1, 4), 1);
  }
  REQUIRE(server.Epoch() > epoch);
  // A plan that was asked for last may still be under way.
  for (int64_t last = -1; last != server.Epoch();) {
    last = server.Epoch();
    std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  return server.Request("GET", "/v1/placement").json;
}

TEST_CASE("a restart goes on from the placement that was in force", "[serve]") {
  TempDir dir;
  const std::string file = dir / "state.json";
  const std::vector<std::string> flags = {"--policy", "eplb", "--state-file", file};
  json before;
  {
    Server server(kRanks, flags);
    // The first time there is nothing to go on from, which is as it should be.
    CHECK(server.Log().find("there is no --state-file " + file + " yet") != std::string::npos);
    CHECK(server.Log().find("warning") == std::string::npos);
    CHECK(std::filesystem::exists(server.ready_path()));
    before = ServeAndMove(server);
    REQUIRE(server.Stop() == 0);
    CHECK_FALSE(std::filesystem::exists(server.ready_path()));
  }
  const json kept = json::parse(ReadText(file));
  CHECK(kept["placement"]["layers"] == before["layers"]);
  CHECK(kept["window_tokens"].get<int64_t>() > 0);
  {
    Server server(kRanks, flags);
    CHECK(server.Log().find("goes on from " + file) != std::string::npos);
    const json after = server.Request("GET", "/v1/placement").json;
    CHECK(after["epoch"] == before["epoch"]);
    CHECK(after["fingerprint"] == before["fingerprint"]);
    CHECK(after["layers"] == before["layers"]);
    CHECK(server.Complete({{"prompt", "def f(x):"}, {"max_tokens", 8}}).status == 200);
    REQUIRE(server.Stop() == 0);
  }
  // The wrong number of ranks: the file does not fit, which is said, and is not lost by it.
  const std::string kept_text = ReadText(file);
  {
    Server other(1, flags);
    CHECK(other.Log().find("it is of 2 ranks, here are 1") != std::string::npos);
    CHECK(other.Log().find("which is now " + file + ".rejected") != std::string::npos);
    CHECK(other.Epoch() == 0);
    REQUIRE(other.Stop() == 0);
  }
  CHECK(ReadText(file + ".rejected") == kept_text);
}

TEST_CASE("a state file that is broken is said to be, and serving starts afresh",
          "[serve][fault]") {
  TempDir dir;
  PutText(dir / "state.json", "{\"schema\":1,\"model\":");
  Server server(1, {"--state-file", dir / "state.json"});
  CHECK(server.Log().find("state: JSON: allowed: an object") != std::string::npos);
  CHECK(server.Epoch() == 0);
  REQUIRE(server.Stop() == 0);
  CHECK(ReadText(dir / "state.json.rejected") == "{\"schema\":1,\"model\":");
  // At the end there is a sound one in its place.
  const json kept = json::parse(ReadText(dir / "state.json"), nullptr, /*allow_exceptions=*/false);
  REQUIRE(kept.is_object());
  CHECK(kept["window_load"].size() == kept["placement"]["layers"].size());
}

TEST_CASE("a server is asked whether it is sound", "[serve][sanitized]") {
  Server server(kRanks, {"--policy", "eplb", "--verify-every-s", "1"});
  ServeAndMove(server);
  const Answer answer = server.Request("GET", "/v1/verify");
  INFO(answer.body);
  REQUIRE(answer.status == 200);
  CHECK(answer.json["ok"] == true);
  CHECK(answer.json["findings"].empty());
  CHECK(answer.json["ranks"].size() == kRanks);
  for (const json& rank : answer.json["ranks"]) {
    CHECK(rank["epoch"] == server.Epoch());
    CHECK(rank["placement"] == server.Request("GET", "/v1/placement").json["fingerprint"]);
    CHECK(rank["copies"].get<int>() > 0);
  }
  CHECK(server.MetricSum("ballast_copies_verified_total") >= answer.json["copies"].get<double>());
  CHECK(server.MetricSum("ballast_verify_failures_total") == 0);
  REQUIRE(server.Stop() == 0);
}

}  // namespace
}  // namespace ballast::testing
