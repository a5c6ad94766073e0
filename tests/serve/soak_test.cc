// Many requests of mixed length while experts move. The hidden case runs 1,000 of them:
//   tests/serve/soak.sh
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

}  // namespace
}  // namespace ballast::testing
