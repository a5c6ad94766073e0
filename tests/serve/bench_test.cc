// `ballast bench rebalance` under mpirun: its figures are there, and no output has other bits.
// Times are not asserted.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

TEST_CASE("moving copies change no bits and every figure is given", "[serve][sanitized]") {
  for (const int ranks : {2, 3}) {
    CAPTURE(ranks);
    TempDir dir;
    const Ended ended = RunBallast(
        ranks, {"bench", "rebalance", "--steps", "25", "--layers", "3", "--experts-per-rank", "4",
                "--top-k", "2", "--hidden", "32", "--inter", "48", "--tokens", "5", "--dtype",
                "fp32", "--migration-chunk-bytes", "4096", "--json", dir / "b.json"});
    INFO(ended.err);
    INFO(ended.out);
    REQUIRE(ended.code == 0);
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
      REQUIRE(positive(found.at("moving").at(key)));
      REQUIRE(positive(found.at("flip").at(key)));
    }
    for (const char* key : {"p99_ratio", "median_ratio"}) REQUIRE(positive(found.at(key)));
    // A quarter of the four experts of each rank and layer moves with every plan.
    const auto plans = found.at("flip").at("plans").get<int64_t>();
    const auto copies = found.at("copies_moved").get<int64_t>();
    REQUIRE(plans > 0);
    REQUIRE(copies == plans * 3 * ranks);
    REQUIRE(found.at("bytes_moved").get<int64_t>() ==
            copies * found.at("expert_bytes").get<int64_t>());
    for (const char* key : {"migration_ms", "moved_mb_per_s", "slice_share"}) {
      REQUIRE(positive(found.at(key)));
    }
  }
}

TEST_CASE("a bench of migrations refuses what it cannot run", "[serve]") {
  const auto refused = [](int ranks, std::vector<std::string> flags, const std::string& part) {
    flags.insert(flags.begin(), {"bench", "rebalance"});
    const Ended ended = RunBallast(ranks, flags);
    INFO(ended.err);
    REQUIRE(ended.code == 2);
    REQUIRE(ended.err.find(part) != std::string::npos);
  };
  refused(2, {"--top-k", "9"}, "--top-k is 9; allowed: up to --experts-per-rank, which is 8");
  refused(2, {"--json", "/nowhere/b.json"}, "--json: /nowhere/b.json: cannot be written");
  refused(1, {}, "on one rank, which has nobody to send copies to; allowed: two or more");
}

}  // namespace
}  // namespace ballast::testing
