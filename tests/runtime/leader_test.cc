#include "runtime/leader.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "tests/support/test_metrics.h"

namespace ballast {
namespace {

constexpr int32_t kExperts = 16, kRanks = 4;
constexpr int64_t kSecond = 1'000'000'000;

// A leader of one layer that plans only when told to, and the plans that it sends.
class Bench {
 public:
  explicit Bench(double copy_bytes_per_second) {
    auto metrics = testing::TestMetrics({.num_experts = kExperts, .num_ranks = kRanks});
    REQUIRE(metrics.ok());
    metrics_ = *std::move(metrics);
    Leader::Options options;
    options.loop.controller = {.policy = "eplb", .window_tokens = 100, .min_gain = 100.0};
    options.loop.copy_bytes_per_second = copy_bytes_per_second;
    options.loop.copy_bytes = 1000;
    options.loop.now_ns = [this] { return now_ns_.load(); };
    auto leader = Leader::Create(options, placement_, RankObserver(0, kRanks, 1, metrics_.get()),
                                 metrics_.get(), [this](std::vector<std::byte> bytes) {
                                   plan_ = *MigrationPlan::Deserialize(bytes);
                                   return absl::OkStatus();
                                 });
    REQUIRE(leader.ok());
    leader_ = *std::move(leader);
  }

  // Two hundred tokens that go to experts `first` and the next one, then a forced plan. Returns the
  // copies it makes, or -1 if the budget holds it back.
  int64_t Rebalance(int32_t first) {
    StepRecord record;
    record.step = ++step_;
    record.num_tokens[TokenKind::kPrefill] = 80;
    record.num_tokens[TokenKind::kDecode] = 120;
    record.layers.resize(1);
    for (auto& counts : record.layers[0].counts) counts.assign(kExperts, 0);
    record.layers[0].counts[TokenKind::kDecode][first] = 120;
    record.layers[0].counts[TokenKind::kPrefill][first + 1] = 80;
    record.layers[0].rank_load.assign(kRanks, 50);
    leader_->OnStep(record);
    const auto answer = nlohmann::json::parse(leader_->Rebalance());
    INFO(answer.dump());
    if (!answer["planned"].get<bool>()) {
      REQUIRE(answer["reason"] == "over_budget");
      return -1;
    }
    auto after = plan_.Apply(placement_);
    REQUIRE(after.ok());
    placement_ = *std::move(after);
    leader_->OnPlanEnded({.done = Command::kFlip, .plan_id = plan_.plan_id}, placement_);
    return answer["copies"].get<int64_t>();
  }

  void Sleep(int64_t ns) { now_ns_ += ns; }
  bool Shows(const std::string& line) const {
    const auto text = metrics_->Render();
    return text.ok() && text->find(line) != std::string::npos;
  }

 private:
  Placement placement_ = *Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, 6), true);
  std::atomic<int64_t> now_ns_ = 5 * kSecond;
  int64_t step_ = 0;
  std::unique_ptr<RankMetrics> metrics_;
  MigrationPlan plan_;
  std::unique_ptr<Leader> leader_;
};

TEST_CASE("a budget in bytes per second holds plans back until the clock has granted them",
          "[leader][budget]") {
  Bench bench(/*copy_bytes_per_second=*/2000);  // two copies; 24 slots of a layer to begin with
  int64_t spent = 0;
  int32_t round = 0;
  int64_t copies = 0;
  while ((copies = bench.Rebalance(2 * (round % 8))) >= 0) {
    spent += copies;
    REQUIRE(spent <= 24);
    REQUIRE(++round < 24);
  }
  CHECK(spent > 0);
  CHECK(
      bench.Shows("ballast_rebalances_total{rank=\"0\",result=\"over_budget\","
                  "trigger=\"manual\"} 1"));
  // The same plan half a second at a time: it comes once credit lasts, not before.
  int64_t half_seconds = 0;
  while ((copies = bench.Rebalance(2 * (round % 8))) < 0) {
    bench.Sleep(kSecond / 2);
    REQUIRE(++half_seconds <= 24);
  }
  CHECK(half_seconds > 0);
  CHECK(spent + copies <= 24 + half_seconds);
  CHECK(spent + copies > 24 + half_seconds - 1);
}

TEST_CASE("a load that no step can count is known in proportion", "[leader]") {
  auto metrics = testing::TestMetrics({.num_experts = 4, .num_ranks = 2});
  REQUIRE(metrics.ok());
  LeaderHost host;
  host.metrics = metrics->get();
  LeaderLoopOptions options;
  options.controller = {.policy = "eplb", .window_tokens = 100};
  options.num_job_ranks = 2;
  constexpr int64_t kBillion = 1'000'000'000;
  LeaderLoop loop(
      options,
      {.placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 2), false),
       .ranks = {0, 1},
       .window = {.num_tokens = 9 * kBillion, .load = {6 * kBillion, 3 * kBillion, 0, 9}}},
      std::make_shared<Tether>(&host));
  REQUIRE(loop.Begin().ok());
  // By three, the least that brings the largest under 2^31.
  CHECK(loop.window().num_tokens == 3 * kBillion);
  CHECK(loop.window().load == std::vector<int64_t>{2 * kBillion, kBillion, 0, 3});
}

TEST_CASE("a rank that is parked does not serve until it is back", "[observer]") {
  const auto metrics = testing::TestMetrics({.num_experts = kExperts, .num_ranks = kRanks});
  REQUIRE(metrics.ok());
  RankObserver observer(0, kRanks, 1, metrics->get());
  const auto serving = [&] {
    return (*metrics)->Render()->find("\nballast_rank_serving{rank=\"0\"} 1\n") !=
           std::string::npos;
  };
  CHECK(serving());
  observer.OnRest(3, 2, 100);
  observer.OnParked();
  CHECK_FALSE(serving());
  CHECK((*metrics)->Render()->find("ballast_sequences_running{rank=\"0\"} 0\n") !=
        std::string::npos);
  const Placement placement =
      *Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, 6), true);
  Regrouping how;
  how.group = {.generation = 1, .member = 0, .ranks = {0, 1, 2, 3}};
  observer.OnRegrouped(how, placement);
  CHECK(serving());
}

TEST_CASE("without a budget no plan waits", "[leader][budget]") {
  Bench bench(/*copy_bytes_per_second=*/0);
  int64_t copies = 0;
  for (int32_t round = 0; round < 16; ++round) {
    const int64_t more = bench.Rebalance(2 * (round % 8));
    REQUIRE(more >= 0);
    copies += more;
  }
  CHECK(copies > 24);
}

}  // namespace
}  // namespace ballast
