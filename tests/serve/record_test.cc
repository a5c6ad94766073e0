// Recording the routing of a running server, and replaying it.
#include <catch2/catch.hpp>
#include <chrono>
#include <numeric>
#include <thread>

#include "base/npy.h"
#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

constexpr int64_t kTopK = 4;
constexpr int64_t kLayers = 4;
constexpr int64_t kExperts = 32;

// `ballast record` against the server.
Ended Record(const Server& server, const std::string& action,
             const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments = {"record", action, "--url",
                                        "http://127.0.0.1:" + std::to_string(server.port())};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return RunBallast(1, arguments);
}

json Done(const Ended& ended) {
  INFO(ended.err);
  REQUIRE(ended.code == 0);
  return json::parse(ended.out, nullptr, /*allow_exceptions=*/false);
}

void Refused(const Ended& ended, int code, const std::string& part) {
  INFO(ended.err);
  REQUIRE(ended.code == code);
  REQUIRE(ended.err.find(part) != std::string::npos);
}

// A step is recorded a moment after its answers: waits for the tokens.
void Await(const Server& server, int64_t tokens) {
  json status;
  for (int i = 0; i < 500 && status["tokens"] != tokens; ++i) {
    status = server.Request("POST", "/v1/record/status").json;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  INFO(status.dump());
  REQUIRE(status["tokens"] == tokens);
}

NpyArray Dumped(const Server& server, const std::string& path) {
  Done(Record(server, "dump", {"--out", path}));
  const auto array = ReadNpy(path);
  REQUIRE(array.ok());
  return *array;
}

struct Run {
  std::vector<std::vector<int32_t>> ids;  // of the answers
  int64_t tokens = 0;                     // that went through the layers
};

Run Serve(const Server& server) {
  Run run;
  for (const Answer& answer : CompleteAll(server, MixedRequests(16, 24), 4)) {
    REQUIRE(answer.status == 200);
    run.ids.push_back(answer.ids());
    run.tokens += answer.json.at("usage").at("total_tokens").get<int64_t>() -
                  (answer.finish() == "length" ? 1 : 0);
  }
  return run;
}

// [layers * experts], over all steps and kinds.
std::vector<int64_t> SumOfSteps(const NpyArray& counts) {
  std::vector<int64_t> sums(kLayers * kExperts);
  for (int64_t i = 0; i < counts.num_elements(); ++i) {
    sums[static_cast<size_t>(i % (kLayers * kExperts))] += counts.IntegerAt(i);
  }
  return sums;
}

// Every layer of a step has the same number of copies, top-k of each token; returns the tokens.
int64_t TokensOf(const NpyArray& counts) {
  int64_t tokens = 0;
  constexpr int64_t kStep = 2 * kLayers * kExperts;
  for (int64_t step = 0; step < counts.shape[0]; ++step) {
    std::vector<int64_t> copies(kLayers);
    for (int64_t i = 0; i < kStep; ++i) {
      copies[static_cast<size_t>(i / kExperts % kLayers)] += counts.IntegerAt(step * kStep + i);
    }
    for (const int64_t of_layer : copies) REQUIRE(of_layer == copies[0]);
    REQUIRE(copies[0] > 0);
    REQUIRE(copies[0] % kTopK == 0);
    tokens += copies[0] / kTopK;
  }
  return tokens;
}

void Replays(const std::string& trace, const std::string& step_tokens) {
  const Ended ended =
      RunBallast(1, {"replay", "--trace", trace, "--ranks", "4", "--slots", "40", "--experts", "32",
                     "--step-tokens", step_tokens, "--policy", "never,eplb"});
  INFO(ended.err);
  REQUIRE(ended.code == 0);
  REQUIRE(ended.out.find("32 experts in 40 slots") != std::string::npos);
}

TEST_CASE("what is recorded is what was routed and changes no answer", "[serve][sanitized]") {
  Server server(2, {"--rebalance-every", "20"});
  TempDir dir;
  const Run plain = Serve(server);

  REQUIRE(Done(Record(server, "start"))["recording"] == true);
  const Run counted = Serve(server);
  REQUIRE(counted.ids == plain.ids);
  REQUIRE(counted.tokens == plain.tokens);
  Await(server, counted.tokens);
  // A snapshot while it records, and more after it.
  const NpyArray early = Dumped(server, dir / "early.npy");
  REQUIRE(Serve(server).ids == plain.ids);
  Await(server, 2 * counted.tokens);
  REQUIRE(Done(Record(server, "stop"))["recording"] == false);
  Serve(server);
  const NpyArray counts = Dumped(server, dir / "counts.npy");
  REQUIRE(counts.type == NpyType::kI32);
  REQUIRE(counts.shape == std::vector<int64_t>{counts.shape[0], 2, kLayers, kExperts});
  REQUIRE(TokensOf(early) == counted.tokens);
  REQUIRE(TokensOf(counts) == 2 * counted.tokens);
  REQUIRE(std::equal(early.data.begin(), early.data.end(), counts.data.begin()));
  // The same prompts choose the same experts again.
  std::vector<int64_t> twice = SumOfSteps(early);
  for (int64_t& count : twice) count *= 2;
  REQUIRE(SumOfSteps(counts) == twice);
  Replays(dir / "counts.npy", "1");

  REQUIRE(Done(Record(server, "start", {"--what", "ids"}))["what"] == "ids");
  REQUIRE(Serve(server).ids == plain.ids);
  Await(server, counted.tokens);
  Done(Record(server, "stop"));
  const NpyArray ids = Dumped(server, dir / "ids.npy");
  REQUIRE(ids.type == NpyType::kU8);
  REQUIRE(ids.shape == std::vector<int64_t>{counted.tokens, kLayers, kTopK});
  std::vector<int64_t> chosen(kLayers * kExperts);
  for (int64_t i = 0; i < ids.num_elements(); ++i) {
    ++chosen[static_cast<size_t>(i / kTopK % kLayers * kExperts + ids.IntegerAt(i))];
  }
  REQUIRE(chosen == SumOfSteps(early));
  Replays(dir / "ids.npy", "64");
  REQUIRE(server.Stop() == 0);
}

TEST_CASE("a recording is refused with what to do", "[serve]") {
  TempDir dir;
  std::string url;
  {
    Server server(1, {});
    url = "http://127.0.0.1:" + std::to_string(server.port());
    Refused(Record(server, "stop"), 2, "record stop: no recording is under way: start one first");
    Refused(Record(server, "dump", {"--out", dir / "x.npy"}), 2, "start a recording first");
    Refused(Record(server, "dump"), 2, "--out is required");
    Refused(Record(server, "start", {"--max-bytes", "100"}), 2,
            "max_bytes: 100, allowed: 1024 (one step");
    Refused(Record(server, "start", {"--what", "all"}), 2, "--what");
    Refused(Record(server, "start", {"--out", dir / "x.npy"}), 2, "--out: allowed with");
    Refused(RunBallast(1, {"record", "start", "--url", "ftp://x:1"}), 2, "--url is 'ftp://x:1'");
    Refused(RunBallast(1, {"record", "start", "--url", "http://nowhere:80"}), 2, "'nowhere'");
    // Two steps fit.
    REQUIRE(Done(Record(server, "start", {"--max-bytes", "2KiB"}))["max_bytes"] == 2048);
    Refused(Record(server, "start"), 2, "stop it first");
    REQUIRE(server.Complete({{"prompt", "a"}, {"max_tokens", 20}}).status == 200);
    const json status = Done(Record(server, "status"));
    INFO(status.dump());
    REQUIRE(status["full"] == true);
    REQUIRE(status["steps"] == 2);
    REQUIRE(server.Log().find("recorder: the recording has ended, it is full: it holds 2 steps") !=
            std::string::npos);
    REQUIRE(server.Request("GET", "/v1/record/status").status == 405);
    REQUIRE(server.Request("POST", "/v1/record/erase").status == 404);
  }
  Refused(RunBallast(1, {"record", "status", "--url", url}), 1, "no server answers at --url");
}

}  // namespace
}  // namespace ballast::testing
