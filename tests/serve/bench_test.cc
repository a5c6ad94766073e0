// `ballast bench rebalance` under mpirun: its figures are there, and no output has other bits.
// Times are not asserted.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

TEST_CASE("moving copies change no bits and every figure is given", "[serve][sanitized]") {
  for (const int ranks : {1, 2, 3}) {
    CAPTURE(ranks);
    TempDir dir;
    const Ended ended = RunBallast(
        ranks, {"bench", "rebalance", "--steps", "25", "--layers", "3", "--experts-per-rank", "4",
                "--top-k", "2", "--hidden", "32", "--inter", "48", "--tokens", "5", "--dtype",
                "fp32", "--migration-chunk-bytes", "4096", "--json", dir / "b.json"});
    INFO(ended.err);
    INFO(ended.out);
    REQUIRE(ended.code == 0);
    REQUIRE((ended.out.find("one rank has nobody to send copies to") != std::string::npos) ==
            (ranks == 1));
    const json found = json::parse(ReadText(dir / "b.json"));
    REQUIRE(found.at("wrong_outputs") == 0);
    REQUIRE(found.at("ranks") == ranks);
    REQUIRE(found.at("layers") == 3);
    REQUIRE(found.at("experts") == 4 * ranks);
    REQUIRE(found.at("share") == 0.05);
    REQUIRE(found.at("bandwidth_mb") == 0.0);
    REQUIRE(found.at("machine").at("cores").get<int>() >= 1);
    REQUIRE(found.at("quiet").at("steps").get<int>() >= 25);
    const auto positive = [](const json& value) {
      return value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() > 0;
    };
    for (const char* key : {"median_us", "p99_us", "max_us"}) {
      REQUIRE(positive(found.at("quiet").at(key)));
      if (ranks > 1) REQUIRE(positive(found.at("moving").at(key)));
      if (ranks > 1) REQUIRE(positive(found.at("flip").at(key)));
    }
    for (const char* key : {"p99_ratio", "median_ratio"}) {
      REQUIRE((ranks > 1 ? positive(found.at(key)) : found.at(key).is_null()));
    }
    // A quarter of the four experts of each rank and layer moves with every plan.
    const auto plans = found.at("flip").at("plans").get<int64_t>();
    const auto copies = found.at("copies_moved").get<int64_t>();
    REQUIRE((plans > 0) == (ranks > 1));
    REQUIRE(copies == plans * 3 * ranks);
    REQUIRE(found.at("bytes_moved").get<int64_t>() ==
            copies * found.at("expert_bytes").get<int64_t>());
    for (const char* key : {"migration_ms", "moved_mb_per_s", "slice_share"}) {
      REQUIRE((ranks == 1 || positive(found.at(key))));
    }
  }
}

TEST_CASE("a bench of migrations refuses what it cannot run", "[serve]") {
  const Ended ended = RunBallast(2, {"bench", "rebalance", "--top-k", "9"});
  INFO(ended.err);
  REQUIRE(ended.code == 2);
  REQUIRE(ended.err.find("--top-k is 9; allowed: up to --experts-per-rank, which is 8") !=
          std::string::npos);
}

}  // namespace
}  // namespace ballast::testing
