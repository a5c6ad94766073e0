#include "runtime/slice_budget.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <vector>

#include "base/random.h"
#include "runtime/rebalancer.h"

namespace ballast {
namespace {

constexpr int64_t kChunk = 1000;
constexpr int64_t kUs = 1000, kMs = 1'000'000;  // ns

// One poll that moved something.
struct Moved {
  int64_t at_ns, took_ns, bytes;
};

// Moves a chunk each way per poll, for as long as there is any budget. A poll takes its time on a
// clock that only the test moves.
class FakeStore : public CopyStore {
 public:
  int64_t now_ns = 5 * kMs;
  int64_t poll_ns = 0;
  bool peers_ready = true;
  std::vector<Moved> moved;

  absl::Status Stage(const MigrationPlan&, const Placement&) override { return absl::OkStatus(); }
  absl::StatusOr<bool> Poll(TransferBudget* budget) override {
    if (!peers_ready || (budget->send <= 0 && budget->receive <= 0)) return false;
    REQUIRE((budget->send > 0 && budget->receive > 0));
    budget->send -= kChunk;
    budget->receive -= kChunk;
    moved.push_back({now_ns, poll_ns, kChunk});
    now_ns += poll_ns;
    return false;
  }
  void Commit(const Placement&) override {}
  void Discard() override {}
  void Abandon() override {}
  bool staging() const override { return true; }
  bool draining() const override { return false; }
  size_t block_bytes() const override { return 1; }
};

// A rebalancer over the fake store that has just been given a plan.
struct Slicer {
  explicit Slicer(const SliceBudget::Options& slice, int64_t poll_ns)
      : rebalancer({.slice = slice, .now_ns = [this] { return store.now_ns; }}, &store,
                   *Placement::Contiguous(1, 1, Topology::Uniform(2, 1), /*fill_spare=*/false)) {
    store.poll_ns = poll_ns;
    auto plan = MakeMigrationPlan(rebalancer.placement(), {{0, {0, 0}}}, 1);
    REQUIRE(plan.ok());
    rebalancer.OnPlan(*std::move(plan));
    REQUIRE(rebalancer.vote().vote == Vote::kStaging);
  }
  int64_t bytes() const { return static_cast<int64_t>(store.moved.size()) * kChunk; }

  FakeStore store;
  Rebalancer rebalancer;
};

// The most by which the sum of `amount` over the polls between any two of them exceeds `rate` times
// the time between them.
template <typename Amount>
double MostAbove(const std::vector<Moved>& polls, double rate, const Amount& amount) {
  double most = 0.0, above = 0.0;  // largest suffix sum so far
  for (size_t i = 0; i < polls.size(); ++i) {
    if (i > 0) above -= rate * static_cast<double>(polls[i].at_ns - polls[i - 1].at_ns);
    above = std::max(above, 0.0) + amount(polls[i]);
    most = std::max(most, above);
  }
  return most;
}

TEST_CASE("no stretch of time carries more than the bandwidth allows", "[runtime][slice]") {
  // 2 MB/s is a chunk in 500 us; the burst is 20 chunks.
  const double rate = 2e6;
  Slicer slicer({.slice_bytes = 1 << 20, .bytes_per_second = rate}, /*poll_ns=*/0);
  Random random(1);
  const double most_saved_ns = SliceBudget::kBurst * 1e9;
  double granted_ns = 0.0;
  for (int i = 0; i < 20'000; ++i) {
    // Pauses from none to 40 ms, after which there is a burst to be had.
    const int64_t pause = random.Below(100) == 0 ? 40 * kMs : random.Below(300) * kUs;
    slicer.store.now_ns += pause;
    granted_ns += std::min(static_cast<double>(pause), most_saved_ns);
    slicer.rebalancer.Slice(random.Below(2) == 0 ? SliceOf::kRest : SliceOf::kStep);
  }
  const std::vector<Moved>& polls = slicer.store.moved;
  const auto bytes = [](const Moved& m) { return static_cast<double>(m.bytes); };
  const double burst = SliceBudget::kBurst * rate;
  REQUIRE(MostAbove(polls, rate * 1e-9, bytes) <= burst + kChunk);
  REQUIRE(MostAbove(polls, rate * 1e-9, bytes) >= burst);
  // And what is allowed is used, but for what long pauses let go to waste.
  REQUIRE(static_cast<double>(slicer.bytes()) >= 0.9 * rate * granted_ns * 1e-9);
}

TEST_CASE("slices of steps take no more than their share of time and make progress",
          "[runtime][slice]") {
  constexpr double kShare = 0.05;
  constexpr int64_t kPoll = 300 * kUs;
  Slicer slicer({.slice_bytes = 1 << 20, .step_share = kShare}, kPoll);
  // Layers of 1 to 3 ms; a poll is more than the share of any of them.
  Random random(2);
  int64_t longest_gap = 0;
  for (int i = 0; i < 5'000; ++i) {
    const int64_t gap = (1000 + random.Below(2000)) * kUs;
    longest_gap = std::max(longest_gap, gap);
    slicer.store.now_ns += gap;
    slicer.rebalancer.Slice(SliceOf::kStep);
  }
  const std::vector<Moved>& polls = slicer.store.moved;
  const auto took = [](const Moved& m) { return static_cast<double>(m.took_ns); };
  const double saved = kShare * static_cast<double>(longest_gap + kPoll);
  REQUIRE(MostAbove(polls, kShare, took) <= static_cast<double>(kPoll) + saved);
  const double wall = static_cast<double>(slicer.store.now_ns - polls[0].at_ns);
  REQUIRE(static_cast<double>(polls.size()) * kPoll >= 0.9 * kShare * wall);
}

TEST_CASE("a quiet time before a slice does not make it longer", "[runtime][slice]") {
  Slicer slicer({.slice_bytes = 1 << 20, .step_share = 0.1}, /*poll_ns=*/100 * kUs);
  // A step that lasts 10 ms earns ten polls, once.
  slicer.store.now_ns += 10 * kMs;
  slicer.rebalancer.Slice(SliceOf::kStep);
  REQUIRE(slicer.store.moved.size() == 10);
  slicer.store.now_ns += 100 * kUs;
  slicer.rebalancer.Slice(SliceOf::kStep);
  // The 1.1 ms since it began earn one poll and the beginning of another.
  REQUIRE(slicer.store.moved.size() == 12);
  // Time without slices, then a new plan: it begins with nothing.
  slicer.store.now_ns += 1000 * kMs;
  auto next = MakeMigrationPlan(slicer.rebalancer.placement(), {{0, {0, 0}}}, 2);
  slicer.rebalancer.OnPlan(*std::move(next));
  const size_t before = slicer.store.moved.size();
  slicer.store.now_ns += 900 * kUs;
  slicer.rebalancer.Slice(SliceOf::kStep);
  REQUIRE(slicer.store.moved.size() == before + 1);
  // Nor do slices that found nothing to move save up for one that does.
  slicer.store.peers_ready = false;
  for (int i = 0; i < 100; ++i) {
    slicer.store.now_ns += 900 * kUs;
    slicer.rebalancer.Slice(SliceOf::kStep);
  }
  slicer.store.peers_ready = true;
  slicer.store.now_ns += 900 * kUs;
  slicer.rebalancer.Slice(SliceOf::kStep);
  REQUIRE(slicer.store.moved.size() == before + 2);
}

TEST_CASE("slices at rest are bounded by their bytes alone", "[runtime][slice]") {
  Slicer slicer({.slice_bytes = 7 * kChunk, .step_share = 0.001}, /*poll_ns=*/10 * kMs);
  for (int i = 1; i <= 5; ++i) {
    slicer.rebalancer.Slice(SliceOf::kRest);
    REQUIRE(slicer.bytes() == i * 7 * kChunk);
  }
  // Nor do they count against steps.
  slicer.store.now_ns += 10 * kMs;
  slicer.rebalancer.Slice(SliceOf::kStep);
  REQUIRE(slicer.bytes() == 36 * kChunk);
}

}  // namespace
}  // namespace ballast
