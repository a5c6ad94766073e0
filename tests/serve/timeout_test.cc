// Deadlines that pass, and ranks that stop for a while: as clients and operators see it.
#include <signal.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

constexpr int kConcurrency = 12;
const Environment kRecovery = {{"OMPI_MCA_orte_enable_recovery", "1"}};

// Stops rank 2 of four while they serve, for `pause`; the answers.
std::vector<Answer> CompleteWithPause(const Server& server, const Reference& reference,
                                      milliseconds pause) {
  const pid_t pid = server.RankPid(2);
  REQUIRE(pid > 0);
  std::thread pauser([&] {
    std::this_thread::sleep_for(milliseconds(200));
    kill(pid, SIGSTOP);
    std::this_thread::sleep_for(pause);
    kill(pid, SIGCONT);
  });
  std::vector<Answer> answers = CompleteAll(server, reference.requests(), kConcurrency);
  pauser.join();
  return answers;
}

// SOURCE DeepEP#74, #137, #158, vllm#21306: time-outs where a rank was only slow.
TEST_CASE("a rank that is stopped for a moment is waited for", "[serve]") {
  const Reference reference(40, 64, kConcurrency);
  Server server(4, {"--rebalance-every", "20"}, kRecovery);
  CHECK(reference.Wrong(CompleteWithPause(server, reference, milliseconds(1500))) == 0);
  CHECK(server.AwaitState(2, "serves"));
  CHECK(server.Metrics(0).Sum("ballast_regroupings_total") == 0);
  CHECK(server.Stop() == 0);
}

// SOURCE DeepEP#274, #382; tokenspeed#251: a timeout that nobody read.
TEST_CASE("a rank that is stopped for too long is lost and costs no request", "[serve]") {
  const Reference reference(40, 64, kConcurrency);
  // By its silence, or because the others wait for it in vain.
  const bool by_silence = GENERATE(true, false);
  CAPTURE(by_silence);
  const std::vector<std::string> flags =
      by_silence ? std::vector<std::string>{"--rank-timeout-ms", "1000"}
                 : std::vector<std::string>{"--rank-timeout-ms", "0", "--step-timeout-ms", "2500"};
  Server server(4, flags, kRecovery);
  CHECK(reference.Wrong(CompleteWithPause(server, reference, milliseconds(6000))) == 0);
  CHECK(server.AwaitState(2, "lost"));
  CHECK(server.Metrics(0).Sum("ballast_ranks_serving") == 3);
  CHECK(server.Metrics(0).Sum("ballast_regroupings_total") >= 1);
  // It runs again, but nobody listens to it any more.
  CHECK(reference.Wrong(CompleteAll(server, reference.requests(), kConcurrency)) == 0);
  CHECK(server.Stop() == 0);
}

json LongRequest() {
  return {{"prompt", "Once"}, {"max_tokens", 900}, {"seed", 1}, {"return_token_ids", true}};
}

// SOURCE tokenspeed#251: a timeout that nobody read. The other two are above.
TEST_CASE("the deadlines of requests plans and drains pass", "[serve]") {
  {
    Server server(1, {"--request-timeout-ms", "40"});
    CHECK(server.Complete(LongRequest()).status == 504);
    CHECK(server.AwaitMetric("ballast_sequences_running", 0));
    CHECK(server.Stop() == 0);
  }
  {
    Server server(4, {"--plan-timeout-ms", "1", "--policy", "eplb", "--slots-per-rank", "10",
                      "--migration-slice-bytes", "4096", "--migration-chunk-bytes", "4096"});
    const int64_t epoch = server.Epoch();
    CHECK(server.Complete(LongRequest()).status == 200);
    const Answer forced = server.Request("POST", "/v1/rebalance");
    INFO(forced.body);
    CHECK(forced.json.at("planned") == true);
    bool aborted = false;
    for (int i = 0; i < 500 && !aborted; ++i) {
      std::this_thread::sleep_for(milliseconds(20));
      aborted = server.Metrics(0).Sum("ballast_rebalances_total", {R"(result="aborted")"}) > 0;
    }
    CHECK(aborted);
    CHECK(server.Epoch() == epoch);
    CHECK(server.Stop() == 0);
  }
  Server server(2, {"--drain-timeout-ms", "1"});
  const std::vector<int32_t> whole = server.Complete(LongRequest()).ids();
  Stream cut(server, LongRequest());
  CHECK(cut.Next().is_object());
  CHECK(server.Stop() == 0);
  cut.ReadAll();
  CHECK(cut.ids().size() < whole.size());
}

}  // namespace
}  // namespace ballast::testing
