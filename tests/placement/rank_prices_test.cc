#include "placement/rank_prices.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numeric>

#include "base/random.h"
#include "placement/split.h"
#include "tests/placement/split_check.h"

namespace ballast {
namespace {

Placement Ring(int32_t num_experts, int32_t num_ranks, int32_t slots_per_rank) {
  auto placement =
      Placement::Contiguous(1, num_experts, Topology::Uniform(num_ranks, slots_per_rank), true);
  REQUIRE(placement.ok());
  return *std::move(placement);
}

// Zipf 1 over the experts, the hottest at `hottest`, drawn token by token at random sources.
std::vector<int32_t> SkewedBatch(Random* random, int32_t num_ranks, int32_t num_experts,
                                 int32_t hottest, int32_t copies) {
  std::vector<double> up_to;
  double sum = 0.0;
  for (int32_t i = 0; i < num_experts; ++i) up_to.push_back(sum += 1.0 / (i + 1));
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks) * num_experts, 0);
  for (int32_t c = 0; c < copies; ++c) {
    const auto at = std::upper_bound(up_to.begin(), up_to.end() - 1, random->Uniform() * sum);
    const auto i = static_cast<int32_t>(at - up_to.begin());
    ++counts[random->Below(num_ranks) * num_experts + (i * 7 + hottest) % num_experts];
  }
  return counts;
}

TEST_CASE("prices follow the loads as on paper", "[placement][price]") {
  RankPrices prices(2);
  const auto are = [&](double a, double b) {
    return prices.prices()[0] == Approx(a) && prices.prices()[1] == Approx(b);
  };
  REQUIRE(are(1.0, 1.0));
  const std::vector<int32_t> few = {150, 50};
  prices.Learn(few);
  REQUIRE(are(1.0, 1.0));  // 200 copies are too few for two ranks
  const std::vector<int32_t> more = {450, 150};
  prices.Learn(more);  // 600 and 200: 1.5^2 and 0.5^2, then scaled to a mean of 1
  REQUIRE(are(1.8, 0.2));
  const std::vector<int32_t> nothing = {0, 0};
  prices.Learn(nothing);
  REQUIRE(are(1.8, 0.2));
  const std::vector<int32_t> other = {512, 1536};
  prices.Learn(other);  // 1.8 * 0.25 and 0.2 * 2.25
  REQUIRE(are(1.0, 1.0));
}

TEST_CASE("prices stay within their limits", "[placement][price]") {
  RankPrices prices(64);
  std::vector<int32_t> load(64, 1000);
  load[0] = 100;  // out of reach of any price
  load[1] = 30000;
  for (int i = 0; i < 20; ++i) prices.Learn(load);
  for (double price : prices.prices()) REQUIRE((price >= 1.0 / 16 && price <= 16.0));
  REQUIRE(prices.prices()[1] == 16.0);
}

TEST_CASE("a split by price is the one on paper", "[placement][split][price]") {
  // Expert 0 on ranks 0 and 1, expert 1 on rank 0, expert 2 on rank 1.
  const auto placement =
      Placement::Create(1, 3, Topology::Uniform(2, 2), {0, 1, 2, 0}, /*epoch=*/0);
  REQUIRE(placement.ok());
  Splitter splitter(placement->hosts(0));
  Split split;
  RankPart part;
  const std::vector<int32_t> counts = {401, 400, 0, 0, 0, 0};
  splitter.Run(SplitMode::kPrice, counts, &split);
  REQUIRE(split.quota == std::vector<int32_t>{201, 200, 400, 0});  // source 0's turn: rank 0
  REQUIRE(split.rank_load == std::vector<int32_t>{601, 200});
  // Prices 1.801 and 0.199 (about; 601 and 200 of 801): 401 copies at weights 2276 and 20480.
  splitter.Run(SplitMode::kPrice, counts, &split);
  REQUIRE(split.quota == std::vector<int32_t>{40, 361, 400, 0});
  splitter.Cut(SplitMode::kPrice, counts, split, 0, &part);
  REQUIRE(part.send == std::vector<int32_t>{40, 361, 400, 0});
  splitter.Cut(SplitMode::kPrice, counts, split, 1, &part);
  REQUIRE(part.receive == std::vector<int32_t>{361, 0});
}

TEST_CASE("at equal prices single copies go round by their source", "[placement][split][price]") {
  const auto placement =
      Placement::Create(1, 1, Topology::Uniform(4, 1), {0, 0, 0, 0}, /*epoch=*/0);
  REQUIRE(placement.ok());
  Splitter splitter(placement->hosts(0));
  Split split;
  splitter.Run(SplitMode::kPrice, std::vector<int32_t>{1, 1, 1, 1}, &split);
  REQUIRE(split.quota == std::vector<int32_t>{1, 1, 1, 1});
}

TEST_CASE("what a source sends depends on its own counts and past loads alone",
          "[placement][split][price]") {
  Random random(1);
  const Placement placement = Ring(24, 6, 6);
  const LayerHosts& hosts = placement.hosts(0);
  Splitter splitter(hosts), same_past(hosts);
  Split split;
  for (int step = 0; step < 5; ++step) {
    const auto counts = SkewedBatch(&random, 6, 24, 0, 6000);
    splitter.Run(SplitMode::kPrice, counts, &split);
    same_past.Run(SplitMode::kPrice, counts, &split);
    same_past.Run(SplitMode::kEven, counts, &split);  // leaves no trace
  }
  std::vector<int32_t> mine = SkewedBatch(&random, 6, 24, 0, 6000);
  std::vector<int32_t> others = SkewedBatch(&random, 6, 24, 9, 6000);
  std::copy(mine.begin() + 2 * 24, mine.begin() + 3 * 24, others.begin() + 2 * 24);  // source 2
  RankPart part, part_among_others;
  splitter.Run(SplitMode::kPrice, mine, &split);
  splitter.Cut(SplitMode::kPrice, mine, split, 2, &part);
  same_past.Run(SplitMode::kPrice, others, &split);
  same_past.Cut(SplitMode::kPrice, others, split, 2, &part_among_others);
  REQUIRE(part.send == part_among_others.send);
  REQUIRE(std::accumulate(part.send.begin(), part.send.end(), 0) > 900);
  // A past with other loads gives other prices.
  Splitter fresh(hosts);
  fresh.Run(SplitMode::kPrice, mine, &split);
  fresh.Cut(SplitMode::kPrice, mine, split, 2, &part_among_others);
  REQUIRE(part.send != part_among_others.send);
}

TEST_CASE("prices close half the gap to the exact split in steady traffic",
          "[placement][split][price]") {
  for (const auto& [ranks, experts, slots, copies] :
       {std::tuple{8, 64, 10, 6000}, std::tuple{16, 96, 8, 20000}, std::tuple{8, 64, 10, 400}}) {
    Random random(7);
    const Placement placement = Ring(experts, ranks, slots);
    Splitter splitter(placement.hosts(0));
    Split split;
    int64_t price = 0, even = 0, exact = 0;
    for (int step = 0; step < 120; ++step) {
      const auto counts = SkewedBatch(&random, ranks, experts, 5, copies);
      const auto largest = [&](SplitMode mode) {
        splitter.Run(mode, counts, &split);
        return split.largest_load;
      };
      const int32_t by_price = largest(SplitMode::kPrice);
      if (step < 40) continue;
      price += by_price;
      even += largest(SplitMode::kEven);
      exact += largest(SplitMode::kExact);
    }
    CAPTURE(ranks, copies, exact, price, even);
    REQUIRE(exact <= price);
    REQUIRE(price - exact < (even - exact) / 2);
  }
}

TEST_CASE("after a shift the next batch is divided without prices", "[placement][split][price]") {
  Random random(11);
  const Placement placement = Ring(64, 8, 10);
  Splitter splitter(placement.hosts(0));
  const auto run = [&](Splitter* with, int32_t hottest, uint64_t seed) {
    Random batch(seed);
    Split split;
    with->Run(SplitMode::kPrice, SkewedBatch(&batch, 8, 64, hottest, 8000), &split);
    return split.quota;
  };
  const auto fresh = [&](int32_t hottest, uint64_t seed) {
    Splitter unlearnt(placement.hosts(0));
    return run(&unlearnt, hottest, seed);
  };
  uint64_t seed = 0;
  for (; seed < 30; ++seed) {
    const auto quota = run(&splitter, 5, seed);
    if (seed > 0) REQUIRE(quota != fresh(5, seed));  // steady traffic sets nothing off
  }
  REQUIRE(run(&splitter, 40, 100) != fresh(40, 100));  // nobody could know
  REQUIRE(run(&splitter, 40, 101) == fresh(40, 101));  // the loads told
  REQUIRE(run(&splitter, 40, 102) != fresh(40, 102));  // and learning goes on
}

}  // namespace
}  // namespace ballast
