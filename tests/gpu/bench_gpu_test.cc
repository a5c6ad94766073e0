#include "deploy/gpu/bench_gpu.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

TEST_CASE("the measurements launch what they say", "[device][bench]") {
  const absl::StatusOr<GpuBenchResult> result = RunGpuBench(/*small=*/true);
  INFO(result.status().message());
  REQUIRE(result.ok());
  REQUIRE(result->rows.size() == 20);
  for (const GpuBenchRow& row : result->rows) {
    CAPTURE(row.name, row.shape);
    // Every switch of the emulator takes 20 ns; its copies take none.
    REQUIRE((row.name == "copy" || row.median_us > 0.1));
    REQUIRE(row.bytes > 0);
  }
  const auto json = nlohmann::json::parse(ToJson(*result));
  REQUIRE(json.at("rows").size() == 20);
  REQUIRE(json.at("rows").at(0).at("name") == "copy");
  REQUIRE(json.at("rows").at(16).at("name") == "dispatch and expand");
  REQUIRE(json.at("rows").at(17).at("flops") == 6.0 * 6 * 64 * 32);
  // Twelve tokens of 64, eight experts of 32 of which each takes two, on one rank and on four.
  const GpuBenchRow& alone = result->rows[18];
  const GpuBenchRow& shared = result->rows[19];
  REQUIRE(alone.name + ": " + alone.shape == "layer: small 1 rank x 12 tokens");
  REQUIRE(shared.name + ": " + shared.shape == "layer: small 4 ranks x 3 tokens");
  const double expert = 3 * 2 * 64 * 32, rest = 4 * 8 * 64 + 14 * 12 * 64;
  for (const GpuBenchRow* row : {&alone, &shared}) {
    REQUIRE(row->flops == 2.0 * 12 * 8 * 64 + 6.0 * 12 * 2 * 64 * 32);
    REQUIRE(row->bytes >= rest + 2 * expert);
    REQUIRE(row->bytes <= rest + 8 * expert);
  }
  const std::string table = ToTable(*result);
  REQUIRE(std::count(table.begin(), table.end(), '\n') == 3 + 20);
}

}  // namespace
}  // namespace ballast
