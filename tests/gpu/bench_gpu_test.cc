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
  REQUIRE(result->rows.size() == 18);
  for (const GpuBenchRow& row : result->rows) {
    CAPTURE(row.name, row.shape);
    // Every switch of the emulator takes 20 ns; its copies take none.
    REQUIRE((row.name == "copy" || row.median_us > 0.1));
    REQUIRE(row.bytes > 0);
  }
  const auto json = nlohmann::json::parse(ToJson(*result));
  REQUIRE(json.at("rows").size() == 18);
  REQUIRE(json.at("rows").at(0).at("name") == "copy");
  REQUIRE(json.at("rows").at(16).at("name") == "dispatch and expand");
  REQUIRE(json.at("rows").at(17).at("flops") == 6.0 * 6 * 64 * 32);
  const std::string table = ToTable(*result);
  REQUIRE(std::count(table.begin(), table.end(), '\n') == 3 + 18);
}

}  // namespace
}  // namespace ballast
