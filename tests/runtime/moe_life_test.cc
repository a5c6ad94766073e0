// A sample of what moe_sweep runs by the thousand.
#include "tests/runtime/moe_life.h"

#include <catch2/catch.hpp>
#include <map>

#include "base/log.h"

namespace ballast {
namespace {

using testing::LiveMoe;
using testing::MoeLifeOutcome;

TEST_CASE("no life of the layers changes a bit", "[runtime][moe][property]") {
  SetLogLevel(LogLevel::kOff);
  MoeLifeOutcome all;
  std::map<SplitMode, int64_t> rows;
  for (uint64_t seed = 1; seed <= 180; ++seed) {
    CAPTURE(seed);
    const MoeLifeOutcome one = LiveMoe(seed);
    REQUIRE(one.failure == "");
    rows[one.split] += one.rows;
    all.flips += one.flips;
    all.aborts += one.aborts;
    all.copies += one.copies;
  }
  // It was a test of something.
  for (const SplitMode split : kAllSplitModes) REQUIRE(rows[split] > 1000);
  REQUIRE(all.flips > 200);
  REQUIRE(all.aborts > 20);
  REQUIRE(all.copies > 500);
}

TEST_CASE("forty migrations under running steps leave every copy right",
          "[runtime][moe][property]") {
  SetLogLevel(LogLevel::kOff);
  const MoeLifeOutcome life = LiveMoe(/*seed=*/5, /*flips=*/40);
  REQUIRE(life.failure == "");
  REQUIRE(life.flips == 40);
  REQUIRE(life.aborts > 0);
  REQUIRE(life.copies > 200);
}

}  // namespace
}  // namespace ballast
