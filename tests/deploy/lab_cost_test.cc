// The laboratory's commands that know times: bench batch, doctor --constants, replay --cluster.
#include "tests/deploy/lab_files.h"

namespace ballast {
namespace {

using namespace testing;  // what the tests of these commands share
using Catch::Matchers::Contains;
using nlohmann::json;

TEST_CASE("ballast bench batch compares three splits at every batch size", "[deploy][lab]") {
  const Files files;
  const Ended ended = Ballast("bench batch --trace " + files.At("a.npy") + "," + files.At("b.npy") +
                              " --ranks 4 --slots 20 --json " + files.At("b.json") + " --report " +
                              files.At("b.html"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  const json rows = JsonAt(files.At("b.json"))["batch"];
  REQUIRE(rows.size() == 10);  // 512 tokens in all
  for (size_t i = 0; i < rows.size(); ++i) {
    REQUIRE(rows[i]["tokens"] == int64_t{1} << i);
    REQUIRE(rows[i]["most_excess_us"].get<double>() <= 0.0);
    REQUIRE(rows[i]["cost_us"].get<double>() <= rows[i]["exact_us"].get<double>());
    REQUIRE(rows[i]["cost_us"].get<double>() <= rows[i]["activated_us"].get<double>());
  }
  // One token of two experts: one of them is read, or both on one rank.
  REQUIRE(rows[0]["exact_us"].get<double>() > 9.2);
  REQUIRE(rows[0]["exact_us"].get<double>() < 2 * (9.2 + 2 * 0.068));
  const auto page = ReadFile(files.At("b.html"));
  REQUIRE(page.ok());
  REQUIRE_THAT(*page, Contains("<svg") && Contains("activated experts") && !Contains("http") &&
                          !Contains("nan"));
  REQUIRE(WriteFile(files.At("c.json"), R"({"token_us": 1, "reads": 2})").ok());
  const std::string base = "bench batch --ranks 4 --slots 20 --trace ";
  RequireRefused(base + files.At("a.npy") + " --constants " + files.At("c.json"),
                 {"c.json: unknown key \"reads\"", "expert_read_us"});
  RequireRefused(base + files.At("a.npy") + " --constants none.json", {"none.json"});
  RequireRefused(base + files.At("load.csv"), {"load.csv"});
  RequireRefused("bench batch --ranks 4 --slots 22", {"--slots is 22", "a multiple of --ranks, 4"});
}

TEST_CASE("what doctor measures is what the cost split reads", "[deploy][lab]") {
  const Files files;
  // Open MPI does not give back all it took: a sanitizer would end doctor with 1 for that.
  const Ended doctor = Ballast(
      "doctor --constants --hidden 64 --intermediate 128 --json " + files.At("constants.json"),
      "LSAN_OPTIONS=detect_leaks=0");
  INFO(doctor.output);
  REQUIRE(doctor.exit_code == 0);
  const Ended bench = Ballast("bench batch --ranks 4 --slots 20 --trace " + files.At("a.npy") +
                              " --constants " + files.At("constants.json"));
  INFO(bench.output);
  REQUIRE(bench.exit_code == 0);
}

TEST_CASE("ballast replay predicts the time of steps on a cluster", "[deploy][lab]") {
  const Files files;
  const auto sample = ReadFile(std::string(BALLAST_SOURCE_DIR) + "/docs/cluster-320.json");
  REQUIRE(sample.ok());
  std::string small = *sample;
  small.replace(small.find("\"ranks_per_node\": 8"), 19, "\"ranks_per_node\": 2");
  REQUIRE(WriteFile(files.At("c.json"), small).ok());
  const std::string base = "replay --trace " + files.At("a.npy") + " --experts 16 --ranks 4 " +
                           "--slots 20 --step-tokens 50 --policy static,oracle --split exact,cost ";
  const Ended ended = Ballast(base + "--cluster " + files.At("c.json") + " --json " +
                              files.At("r.json") + " --report " + files.At("r.html"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  REQUIRE_THAT(ended.output, Contains("Nodes of 2 ranks") && Contains("background_share 0.2"));
  const json result = JsonAt(files.At("r.json"));
  REQUIRE_THAT(result["assumptions"].get<std::string>(), Contains("Nodes of 2 ranks"));
  for (const json& f : result["policies"]) {
    const auto at = [&](const char* key) { return f[key].get<double>(); };
    const double step = at("predicted_step_us_mean");
    REQUIRE(step == Approx(2 * at("predicted_layer_us_mean")));  // two layers
    REQUIRE(step == Approx(at("predicted_dispatch_us_mean") + at("predicted_compute_us_mean") +
                           at("predicted_combine_us_mean")));
    REQUIRE(at("predicted_compute_us_mean") >= 2 * 9.2);
    REQUIRE(at("predicted_step_us_p99") >= step);
    REQUIRE(at("predicted_step_us_mean_blocking") == Approx(step + at("predicted_copy_us_mean")));
    REQUIRE((at("predicted_copy_us_mean") > 0.0) == (f["policy"] == "oracle"));
    REQUIRE((at("predicted_step_us_mean_background") > step) == (f["policy"] == "oracle"));
  }
  const auto page = ReadFile(files.At("r.html"));
  REQUIRE(page.ok());
  REQUIRE_THAT(*page, Contains("Predicted time of a step") && Contains("Nodes of 2 ranks"));
  // Without a cluster there is nothing of it.
  REQUIRE(Ballast(base + "--json " + files.At("r.json")).exit_code == 0);
  REQUIRE_FALSE(JsonAt(files.At("r.json"))["policies"][0].contains("predicted_step_us_mean"));

  small.replace(small.find("\"link_gb_per_s\": 320"), 20, "\"link_gb_per_s\": -20");
  REQUIRE(WriteFile(files.At("bad.json"), small).ok());
  RequireRefused(base + "--cluster " + files.At("bad.json"),
                 {"bad.json: link_gb_per_s is -20, allowed: 0.5 to"});
  REQUIRE(WriteFile(files.At("eight.json"), *sample).ok());
  RequireRefused(base + "--cluster " + files.At("eight.json"),
                 {"eight.json: ranks_per_node is 8, allowed: a divisor of --ranks, 4"});
  RequireRefused(base + "--cluster none.json", {"none.json"});
  RequireRefused(base + "--cluster x --cost-constants y", {"--cost-constants is y", "--cluster"});
}

}  // namespace
}  // namespace ballast
