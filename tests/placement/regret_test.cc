#include "placement/regret.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "base/random.h"
#include "placement/controller.h"
#include "placement/split.h"
#include "placement/water_fill.h"

namespace ballast {
namespace {

constexpr int32_t kExperts = 64, kRanks = 8, kSlots = 9;

// Copies per expert of one batch of traffic whose shares are `share`.
std::vector<int32_t> Draw(const std::vector<double>& share, int tokens, Random* random) {
  std::vector<double> sum(share.size());
  std::partial_sum(share.begin(), share.end(), sum.begin());
  std::vector<int32_t> counts(share.size());
  for (int i = 0; i < tokens; ++i) {
    const double at = random->Uniform() * sum.back();
    ++counts[static_cast<size_t>(std::lower_bound(sum.begin(), sum.end(), at) - sum.begin())];
  }
  return counts;
}

std::vector<double> SkewedShares(Random* random) {
  std::vector<double> share(kExperts);
  for (double& s : share) s = std::exp(2.0 * random->Uniform());
  return share;
}

ControllerOptions Options(double rho) {
  ControllerOptions options;
  options.policy = "regret";
  options.rho = rho;
  options.min_steps_between = 0;
  return options;
}

Placement Ring() {
  return *Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, kSlots), true);
}

double Imbalance(const Placement& placement, const std::vector<int32_t>& counts) {
  Split split;
  ExactSplitter(placement.hosts(0)).Run(counts, &split);
  return static_cast<double>(split.largest_load) * kRanks /
         std::accumulate(counts.begin(), counts.end(), 0);
}

StepCounts OneKind(int64_t num_tokens, std::span<const int32_t> counts) {
  return StepCounts::Of(TokenKind::kDecode, num_tokens, counts);
}

struct Outcome {
  double imbalance = 0;  // mean over the second half of the steps
  int copies = 0;
  int busiest_twice = 0;  // plans that brought a rank an expert that it had
};

// Runs `steps` steps from step `begin` on.
Outcome Run(Controller* controller, const std::vector<double>& share, int begin, int steps,
            Random* random) {
  Outcome outcome;
  for (int step = begin; step < begin + steps; ++step) {
    const auto counts = Draw(share, 6144, random);
    if (step >= begin + steps / 2) outcome.imbalance += Imbalance(controller->placement(), counts);
    controller->OnStep(step, OneKind(1024, counts));
    Decision why;
    const auto plan = controller->Decide(step, false, &why);
    if (!plan.has_value()) continue;
    outcome.copies += static_cast<int>(plan->moves.size());
    controller->OnCommitted(plan->plan_id, step);
    for (int32_t e = 0; e < kExperts; ++e) {
      const LayerHosts& hosts = controller->placement().hosts(0);
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        outcome.busiest_twice += hosts.host_copies[h] > 1;
      }
    }
  }
  outcome.imbalance /= steps - steps / 2;
  return outcome;
}

TEST_CASE("water-filling comes close to the exact split in every lane", "[placement][regret]") {
  Random random(3);
  const Placement placement = Ring();
  const LayerHosts& hosts = placement.hosts(0);
  std::vector<Lanes> demand(kExperts);
  std::vector<std::vector<int32_t>> counts;
  for (int lane = 0; lane < kLanes; ++lane) {
    counts.push_back(Draw(SkewedShares(&random), 6144, &random));
    for (int32_t e = 0; e < kExperts; ++e) demand[e][lane] = static_cast<float>(counts[lane][e]);
  }
  std::vector<RankList> ranks(kExperts);
  std::vector<Lanes> load(kRanks), flows(hosts.host_rank.size());
  std::vector<SharedExpert> shared;
  for (int32_t e = 0; e < kExperts; ++e) {
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      Insert(hosts.host_rank[h], &ranks[e]);
    }
    if (ranks[e].size() == 1) {
      load[ranks[e][0]] += demand[e];
    } else {
      shared.push_back({&ranks[e], &demand[e], &flows[hosts.host_offsets[e]]});
    }
  }
  WaterFill({shared, load.data()}, 50);
  for (int lane = 0; lane < kLanes; ++lane) {
    float largest = 0, total = 0;
    for (const Lanes& l : load) largest = std::max(largest, l[lane]), total += l[lane];
    CHECK(total == Approx(6144).epsilon(1e-4));
    CHECK(largest * kRanks / total ==
          Approx(Imbalance(placement, counts[lane])).margin(1.0 * kRanks / 6144 + 1e-3));
  }
}

TEST_CASE("skewed traffic is balanced with few copies and then left alone",
          "[placement][regret]") {
  Random random(11);
  for (int i = 0; i < 5; ++i) {
    auto controller = *Controller::Create(Options(0.03), Ring());
    const auto share = SkewedShares(&random);
    const Outcome first = Run(controller.get(), share, 0, 40, &random);
    CHECK(first.copies > 0);
    CHECK(first.copies < 40);
    CHECK(first.imbalance < 1.06);
    CHECK(first.busiest_twice == 0);
    const Outcome then = Run(controller.get(), share, 40, 100, &random);
    CHECK(then.copies <= 10);
    CHECK(then.imbalance < 1.06);
  }
}

TEST_CASE("a change of traffic is answered within a few batches", "[placement][regret]") {
  Random random(12);
  auto controller = *Controller::Create(Options(0.1), Ring());
  Run(controller.get(), SkewedShares(&random), 0, 30, &random);
  const auto share = SkewedShares(&random);
  const double before = Imbalance(controller->placement(), Draw(share, 6144, &random));
  const Outcome after = Run(controller.get(), share, 30, 12, &random);
  CHECK(before > 1.1);
  CHECK(after.copies > 0);
  CHECK(after.imbalance < 1.0 + (before - 1.0) / 2);
}

TEST_CASE("nothing moves where a copy costs more than it can bring", "[placement][regret]") {
  Random random(13);
  auto controller = *Controller::Create(Options(1e4), Ring());
  CHECK(Run(controller.get(), SkewedShares(&random), 0, 50, &random).copies == 0);
}

TEST_CASE("the same batches give the same plans", "[placement][regret]") {
  std::vector<std::vector<std::byte>> plans[2];
  for (auto& of_run : plans) {
    Random random(14);
    auto controller = *Controller::Create(Options(0.05), Ring());
    for (int step = 0; step < 40; ++step) {
      controller->OnStep(step, OneKind(1024, Draw(SkewedShares(&random), 6144, &random)));
      Decision why;
      const auto plan = controller->Decide(step, step % 10 == 9, &why);
      if (!plan.has_value()) continue;
      of_run.push_back(plan->Serialize());
      controller->OnCommitted(plan->plan_id, step);
    }
  }
  CHECK(plans[0].size() > 5);
  CHECK(plans[0] == plans[1]);
}

TEST_CASE("a plan that was not adopted leaves the planner as it was", "[placement][regret]") {
  Random random(15);
  const Placement ring = Ring();
  RegretPlanner planner({.initial = ring, .rho = 0.03}, ring.expert_of_slot(0));
  const auto counts = Draw(SkewedShares(&random), 6144, &random);
  planner.OnBatch(counts, TokenKind::kPrefill, 1.0f);
  const auto once = planner.Plan({});
  REQUIRE(once.has_value());
  CHECK(planner.Plan({}) == once);
  planner.Adopt(*once);
  CHECK(planner.Plan({}) != once);
}

// Ranks that hold the expert, and on which nodes.
std::set<int32_t> RanksOf(const Placement& placement, std::span<const int32_t> row, int32_t e) {
  std::set<int32_t> ranks;
  for (size_t s = 0; s < row.size(); ++s) {
    if (row[s] == e) ranks.insert(placement.topology().rank_of_slot(static_cast<int32_t>(s)));
  }
  return ranks;
}

TEST_CASE("with coverage the hottest experts survive the loss of any rank",
          "[placement][regret][coverage]") {
  Random random(17);
  const Placement ring = Ring();
  const auto share = SkewedShares(&random);
  RegretPlanner planner({.initial = ring, .rho = 1.0, .rules = {.coverage = 1}},
                        ring.expert_of_slot(0));
  std::vector<int32_t> row(ring.expert_of_slot(0).begin(), ring.expert_of_slot(0).end());
  std::vector<double> seen(kExperts, 1.0);
  for (int batch = 0; batch < 40; ++batch) {
    planner.OnBatch(Draw(share, 6144, &random), TokenKind::kPrefill, 1.0f);
    if (const auto plan = planner.Plan({})) {
      row = *plan;
      planner.Adopt(row);
    }
  }
  // Eight slots are spare: the eight hottest experts. Close to the eighth the memory and the shares
  // may differ, so the test asks for the first six.
  std::vector<int32_t> hottest(kExperts);
  std::iota(hottest.begin(), hottest.end(), 0);
  std::sort(hottest.begin(), hottest.end(), [&](int a, int b) { return share[a] > share[b]; });
  for (int i = 0; i < 6; ++i) {
    INFO("the expert with place " << i << " by load");
    CHECK(RanksOf(ring, row, hottest[i]).size() >= 2);
  }
  for (int32_t e = 0; e < kExperts; ++e) CHECK(RanksOf(ring, row, e).size() >= 1);
}

TEST_CASE("node-local copies stay where the expert is at home", "[placement][regret]") {
  Topology topology = Topology::Uniform(kRanks, kSlots);
  for (int32_t r = 0; r < kRanks; ++r) topology.node_of_rank[r] = r / 4;
  const Placement start = *Placement::Contiguous(1, kExperts, topology, /*fill_spare=*/false);
  Random random(18);
  RegretPlanner planner({.initial = start, .rho = 0.03, .rules = {.node_local = true}},
                        start.expert_of_slot(0));
  const auto share = SkewedShares(&random);
  int plans = 0;
  for (int batch = 0; batch < 20; ++batch) {
    planner.OnBatch(Draw(share, 6144, &random), TokenKind::kPrefill, 1.0f);
    const auto plan = planner.Plan({});
    if (!plan.has_value()) continue;
    ++plans;
    planner.Adopt(*plan);
    for (int32_t e = 0; e < kExperts; ++e) {
      for (int32_t r : RanksOf(start, *plan, e)) CHECK(r / 4 == e / 32);
    }
  }
  CHECK(plans > 0);
}

TEST_CASE("noisier batches of the same traffic are no change of traffic",
          "[placement][regret]") {
  Random random(20);
  const auto share = SkewedShares(&random);
  TrafficMemory memory(kExperts, kRanks, 1.0f);
  for (int batch = 0; batch < 60; ++batch)
    memory.Add(Draw(share, 24576, &random), TokenKind::kPrefill);
  int changes = 0;
  for (int batch = 0; batch < 200; ++batch) {
    memory.Add(Draw(share, 3072, &random),
               TokenKind::kPrefill);  // an eighth of the tokens: 2.8 times the noise
    changes += memory.batches_since_change(TokenKind::kPrefill) == 1;
  }
  CHECK(changes <= 20);
  for (int batch = 0; batch < 20; ++batch)
    memory.Add(Draw(share, 3072, &random), TokenKind::kPrefill);
  memory.Add(Draw(SkewedShares(&random), 3072, &random), TokenKind::kPrefill);
  CHECK(memory.batches_since_change(TokenKind::kPrefill) == 1);  // and a change still is one
}

TEST_CASE("a second copy on one rank counts as room", "[placement][regret]") {
  // Two ranks of three slots; rank 1 holds expert 2 twice, and only expert 0 is busy.
  const Placement start =
      *Placement::Create(1, 4, Topology::Uniform(2, 3), {0, 1, kNoExpert, 2, 2, 3}, 0);
  RegretPlanner planner({.initial = start, .rho = 0.03}, start.expert_of_slot(0));
  planner.OnBatch(std::vector<int32_t>{1000, 10, 10, 10}, TokenKind::kPrefill, 1.0f);
  const auto plan = planner.Plan({});
  REQUIRE(plan.has_value());
  CHECK(RanksOf(start, *plan, 0) == std::set<int32_t>{0, 1});
  for (int32_t e = 0; e < 4; ++e) CHECK(!RanksOf(start, *plan, e).empty());
}

// The gain per copy of the best row that one change leads to, by trying all; whether it is a copy.
struct BestChange {
  float gain = 0.0f;
  bool is_copy = false;
};
BestChange TryAllChanges(const std::vector<int32_t>& row, int32_t slots_per_rank,
                         const std::function<float(std::span<const int32_t>)>& objective) {
  const float before = objective(row);
  BestChange best;
  const auto consider = [&](std::vector<int32_t> changed, int copies) {
    for (size_t s = 0; s < changed.size(); s += slots_per_rank) {  // no expert twice on a rank
      const auto rank = std::span(changed).subspan(s, slots_per_rank);
      if (std::set<int32_t>(rank.begin(), rank.end()).size() < rank.size()) return;
    }
    for (int32_t e : row) {
      if (std::count(changed.begin(), changed.end(), e) == 0) return;
    }
    const float gain = (before - objective(changed)) / static_cast<float>(copies);
    if (gain > best.gain) best = {gain, copies == 1};
  };
  for (size_t slot = 0; slot < row.size(); ++slot) {
    for (size_t other = 0; other < row.size(); ++other) {
      std::vector<int32_t> copy = row, exchange = row;
      copy[slot] = row[other];
      std::swap(exchange[slot], exchange[other]);
      consider(std::move(copy), 1);
      consider(std::move(exchange), 2);
    }
  }
  return best;
}

TEST_CASE("the first change of a search is nearly always the best there is",
          "[placement][regret][property]") {
  Random random(19);
  constexpr int kTrials = 1000;
  int changed = 0, missed = 0, missed_copies = 0;
  for (int trial = 0; trial < kTrials; ++trial) {
    TrafficMemory memory(5, 3, 1.0f);
    std::vector<int32_t> counts(5);
    for (int32_t& n : counts) n = 1 + static_cast<int32_t>(random.Below(1000));
    memory.Add(counts, TokenKind::kPrefill);
    const std::vector<int32_t> row = {0, 1, 2, 3, 4, static_cast<int32_t>(random.Below(4))};
    RowSearch search(Topology::Uniform(3, 2), 5, &memory, /*node_local=*/false);
    const auto objective = [&](std::span<const int32_t> r) {
      search.SetRow(r);
      return search.ObjectiveOf();
    };
    const BestChange best = TryAllChanges(row, 2, objective);
    const float before = objective(row);
    search.StartCounting();
    const int32_t copies = search.ImproveOnce(1, 1e-3f);
    const float gain =
        copies == 0 ? 0.0f : (before - search.ObjectiveOf()) / static_cast<float>(copies);
    changed += copies > 0;
    if (gain >= best.gain - 4e-3f) continue;  // three sweeps in the search, six here
    ++missed;
    missed_copies += best.is_copy;
  }
  CHECK(changed > kTrials / 2);
  CHECK(missed <= kTrials * 3 / 100);  // exchanges whose estimate is wrong
  CHECK(missed_copies == 0);
}

TEST_CASE("batches are added up from steps", "[placement][regret]") {
  Random random(16);
  ControllerOptions options = Options(0.03);
  options.batch_tokens = 1024;
  auto controller = *Controller::Create(options, Ring());
  const auto share = SkewedShares(&random);
  Decision why;
  for (int step = 0; step < 15; ++step) {
    controller->OnStep(step, OneKind(64, Draw(share, 384, &random)));
    CHECK_FALSE(controller->Decide(step, false, &why).has_value());
    CHECK(why == Decision::kWindowNotFull);
  }
  controller->OnStep(15, OneKind(64, Draw(share, 384, &random)));
  CHECK(controller->Decide(15, false, &why).has_value());
}

}  // namespace
}  // namespace ballast
