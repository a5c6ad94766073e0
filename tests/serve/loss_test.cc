// Ranks that are killed, that leave and that come back, as clients and operators see it. The hidden
// cases kill ninety ranks:
//   tests/serve/long.sh kill
#include <signal.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <sstream>
#include <thread>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr int kConcurrency = 12;
const Environment kRecovery = {{"OMPI_MCA_orte_enable_recovery", "1"}};

// The longest time between two steps in the step log, in milliseconds.
double LongestGapMs(const std::string& log) {
  std::istringstream lines(ReadText(log));
  int64_t last = 0, longest = 0;
  for (std::string line; std::getline(lines, line);) {
    const json step = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!step.is_object()) continue;
    const int64_t end = step["unix_us"].get<int64_t>();
    if (last > 0) longest = std::max(longest, end - step["wall_us"].get<int64_t>() - last);
    last = end;
  }
  return static_cast<double>(longest) / 1000;
}

struct Killing {
  int wrong = 0;
  double gap_ms = 0;
  double reloads = 0;
};

// Serves the requests on `ranks` ranks while `victims` are killed, `apart` from each other.
Killing KillWhileServing(const Reference& reference, int ranks, const std::vector<int>& victims,
                         milliseconds after, milliseconds apart) {
  TempDir dir;
  Server server(ranks, {"--rebalance-every", "20", "--step-log", dir / "steps"}, kRecovery);
  std::thread killer([&] {
    std::this_thread::sleep_for(after);
    for (const int victim : victims) {
      const pid_t pid = server.RankPid(victim);
      if (pid > 0) kill(pid, SIGKILL);
      std::this_thread::sleep_for(apart);
    }
  });
  const std::vector<Answer> answers = CompleteAll(server, reference.requests(), kConcurrency);
  killer.join();
  Killing killing{.wrong = reference.Wrong(answers)};
  for (const int victim : victims) REQUIRE(server.AwaitState(victim, "lost"));
  killing.gap_ms = LongestGapMs(dir / "steps");
  killing.reloads = server.Metrics(0).Sum("ballast_expert_reloads_total");
  REQUIRE(server.Metrics(0).Sum("ballast_ranks_serving") ==
          ranks - static_cast<int>(victims.size()));
  REQUIRE(server.Metrics(0).Sum("ballast_regroupings_total") >= 1);
  REQUIRE(server.Stop() == 0);
  return killing;
}

TEST_CASE("a rank that is killed costs no request", "[serve]") {
  const Reference reference(40, 64, kConcurrency);
  const Killing one = KillWhileServing(reference, 4, {2}, milliseconds(300), milliseconds(0));
  CHECK(one.wrong == 0);
  CHECK(one.reloads > 0);
  const Killing two = KillWhileServing(reference, 4, {1, 3}, milliseconds(300), milliseconds(20));
  CHECK(two.wrong == 0);
}

TEST_CASE("a rank is drained and taken back under load", "[serve]") {
  const Reference reference(40, 64, kConcurrency);
  // Two ranks have slots for all experts.
  Server server(3, {"--slots-per-rank", "20"});
  std::vector<Answer> answers;
  std::thread load([&] { answers = CompleteAll(server, reference.requests(), kConcurrency); });
  std::this_thread::sleep_for(milliseconds(200));
  const auto post = [&](const std::string& path, const std::string& body) {
    return server.Request("POST", path, body).status;
  };
  CHECK(post("/v1/drain", R"({"rank":1})") == 202);
  CHECK(post("/v1/drain", R"({"rank":1})") == 409);
  CHECK(post("/v1/drain", R"({"rank":0})") == 400);
  CHECK(post("/v1/drain", R"({"rank":3})") == 400);
  CHECK(post("/v1/drain", R"({"rank":"one"})") == 400);
  CHECK(post("/v1/undrain", R"({"rank":2})") == 409);
  CHECK(server.AwaitState(1, "left"));
  const auto ranks = [&] { return server.Request("GET", "/v1/placement").json.at("ranks"); };
  for (int i = 0; i < 100 && ranks() != json::array({0, 2}); ++i) {
    std::this_thread::sleep_for(milliseconds(20));
  }
  CHECK(ranks() == json::array({0, 2}));
  // It hears a moment later than the others that it is not among them any more.
  CHECK(server.AwaitMetric("ballast_rank_serving", 2));
  CHECK(server.Metrics(1).Sum("ballast_rank_serving") == 0);
  CHECK(post("/v1/undrain", R"({"rank":1})") == 202);
  CHECK(server.AwaitState(1, "serves"));
  load.join();
  CHECK(reference.Wrong(answers) == 0);
  // What it alone held was moved first: nothing had to be read again.
  CHECK(server.Metrics(0).Sum("ballast_expert_reloads_total") == 0);
  CHECK(server.Metrics(0).Sum("ballast_ranks_serving") == 3);
  CHECK(server.AwaitMetric("ballast_rank_serving", 3));
  CHECK(server.Stop() == 0);
}

// Starts a server of four ranks so many times, each of which loses `num_victims` ranks at another
// moment, 20 ms apart.
void KillManyTimes(int times, int num_victims) {
  const Reference reference(60, 64, kConcurrency);
  std::vector<double> gaps;
  int wrong = 0;
  for (int i = 0; i < times; ++i) {
    std::vector<int> victims;
    for (int v = 0; v < num_victims; ++v) victims.push_back(1 + (i + v) % 3);
    const Killing killing =
        KillWhileServing(reference, 4, victims, milliseconds(50 + 37 * i % 900), milliseconds(20));
    wrong += killing.wrong;
    gaps.push_back(killing.gap_ms);
  }
  std::sort(gaps.begin(), gaps.end());
  const size_t p99 = (gaps.size() * 99 + 99) / 100 - 1;
  WARN(times << " servers of 4 ranks, each losing " << num_victims << ", 60 requests each: "
             << wrong << " answers lost or wrong; longest pause between steps, median "
             << gaps[gaps.size() / 2] << " ms, p99 " << gaps[p99] << " ms");
  CHECK(wrong == 0);
  CHECK(gaps[p99] < 3000);
}

TEST_CASE("fifty kills lose nothing", "[.kill]") {
  KillManyTimes(50, 1);
}

TEST_CASE("twenty times two kills 20 ms apart lose nothing", "[.kill]") {
  KillManyTimes(20, 2);
}

}  // namespace
}  // namespace ballast::testing
