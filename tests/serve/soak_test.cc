// Many requests of mixed length while experts move. The hidden cases run 1,000 and 500 of them:
//   tests/serve/long.sh soak
//   tests/serve/long.sh rebalance
#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

constexpr int kConcurrency = 16;
constexpr int kLongestAnswer = 96;

struct Soak {
  int lost = 0;
  int wrong = 0;
  int64_t epochs = 0;
  double copies = 0;
  std::vector<double> growth;  // of each rank's resident memory, from the first third to the end
};

Soak RunSoak(int num_requests) {
  const std::vector<json> requests = MixedRequests(num_requests, kLongestAnswer);
  std::vector<Answer> expected;
  {
    Server plain(1, {"--policy", "static"});
    expected = CompleteAll(plain, requests, kConcurrency);
  }
  Server server(4, {"--rebalance-every", "20"});
  const auto third = requests.begin() + num_requests / 3;
  std::vector<Answer> answers = CompleteAll(server, {requests.begin(), third}, kConcurrency);
  const std::vector<int64_t> warm = server.ResidentBytes();
  const std::vector<Answer> rest = CompleteAll(server, {third, requests.end()}, kConcurrency);
  const std::vector<int64_t> end = server.ResidentBytes();
  answers.insert(answers.end(), rest.begin(), rest.end());

  Soak soak;
  for (size_t i = 0; i < requests.size(); ++i) {
    REQUIRE(expected[i].status == 200);
    if (answers[i].status != 200) {
      ++soak.lost;
    } else if (answers[i].ids() != expected[i].ids()) {
      ++soak.wrong;
    }
  }
  soak.epochs = server.Epoch();
  soak.copies = server.MetricSum("ballast_expert_copies_total", {R"(result="applied")"});
  REQUIRE(warm.size() == 4);
  REQUIRE(end.size() == 4);
  for (size_t rank = 0; rank < end.size(); ++rank) {
    soak.growth.push_back(static_cast<double>(end[rank]) / static_cast<double>(warm[rank]) - 1);
  }
  REQUIRE(server.Stop() == 0);
  return soak;
}

TEST_CASE("sixty requests lose nothing while experts move", "[serve]") {
  const Soak soak = RunSoak(60);
  REQUIRE(soak.lost == 0);
  REQUIRE(soak.wrong == 0);
  REQUIRE(soak.epochs > 1);
  REQUIRE(soak.copies > 0);
}

TEST_CASE("a thousand requests lose nothing", "[.soak]") {
  const Soak soak = RunSoak(1000);
  WARN("lost " << soak.lost << ", wrong " << soak.wrong << ", epoch " << soak.epochs << ", copies "
               << soak.copies << ", growth of resident memory by rank " << soak.growth[0] << " "
               << soak.growth[1] << " " << soak.growth[2] << " " << soak.growth[3]);
  REQUIRE(soak.lost == 0);
  REQUIRE(soak.wrong == 0);
  REQUIRE(soak.copies > 0);
  REQUIRE(*std::max_element(soak.growth.begin(), soak.growth.end()) < 0.05);
}

TEST_CASE("five hundred requests get the same texts with and without rebalancing", "[.rebalance]") {
  const std::vector<json> requests = MixedRequests(500, kLongestAnswer);
  std::vector<Answer> still;
  {
    Server server(4, {"--policy", "never"});
    const int64_t epoch = server.Epoch();
    still = CompleteAll(server, requests, kConcurrency);
    REQUIRE(server.Epoch() == epoch);
    REQUIRE(server.Stop() == 0);
  }
  Server server(4, {"--rebalance-every", "20"});
  const int64_t epoch = server.Epoch();
  const std::vector<Answer> moved = CompleteAll(server, requests, kConcurrency);
  const int64_t flips = server.Epoch() - epoch;
  const double copies = server.MetricSum("ballast_expert_copies_total", {R"(result="applied")"});
  REQUIRE(server.Stop() == 0);
  int lost = 0, differing = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    lost += still[i].status != 200 || moved[i].status != 200;
    if (still[i].status != 200 || moved[i].status != 200) continue;
    differing += moved[i].text() != still[i].text() || moved[i].ids() != still[i].ids();
  }
  WARN("500 requests on 4 ranks: " << flips << " flips, " << copies << " copies, " << lost
                                   << " lost, " << differing << " differing texts");
  REQUIRE(lost == 0);
  REQUIRE(differing == 0);
  REQUIRE(flips > 10);
  REQUIRE(copies > 10);
}

}  // namespace
}  // namespace ballast::testing
