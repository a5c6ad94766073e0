// `ballast doctor`: what it finds is not asserted, that it finds something is.
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

json Constants(int ranks, std::vector<std::string> arguments) {
  TempDir dir;
  arguments.insert(arguments.begin(), {"doctor", "--constants", "--json", dir / "c.json"});
  const Ended ended = RunBallast(ranks, arguments);
  INFO(ended.err);
  REQUIRE(ended.code == 0);
  return json::parse(ReadText(dir / "c.json"));
}

TEST_CASE("the constants of the machine are positive numbers", "[serve]") {
  const char* of_rank[] = {"read_bytes", "read_gb_per_s", "expert_bytes", "expert_read_us",
                           "block_us",   "token_us",      "gflop_per_s"};
  const char* of_link[] = {"message_us", "link_us_per_token", "copy_us", "rho"};
  const auto is_positive = [](const json& value) {
    return value.is_number() && std::isfinite(value.get<double>()) && value.get<double>() > 0;
  };
  for (const int ranks : {1, 2}) {
    const json found = Constants(ranks, {"--hidden", "64", "--intermediate", "128", "--dtype",
                                         "fp32", "--step-tokens", "256", "--top-k", "4"});
    INFO(found.dump());
    for (const char* key : of_rank) REQUIRE(is_positive(found.at(key)));
    for (const char* key : of_link) {
      REQUIRE((ranks > 1 ? is_positive(found.at(key)) : found.at(key).is_null()));
    }
    REQUIRE(found.contains("note") == (ranks == 1));
    REQUIRE(found.at("ranks") == ranks);
    REQUIRE(found.at("row_block") == 16);
    REQUIRE(found.at("expert_bytes").get<int64_t>() >= 3 * 64 * 128 * 4);
    REQUIRE(found.at("machine").at("cores").get<int>() >= 1);
    REQUIRE_FALSE(found.at("machine").at("cpu").get<std::string>().empty());
    if (ranks > 1) {
      const double ideal = 256.0 * 4 / ranks * found.at("token_us").get<double>();
      REQUIRE(found.at("rho").get<double>() == Approx(found.at("copy_us").get<double>() / ideal));
    }
  }
  const json of_model = Constants(1, {"--model", DemoModel(), "--dtype", "auto"});
  REQUIRE(of_model.at("hidden") == 128);
  REQUIRE(of_model.at("intermediate") == 64);
  REQUIRE(of_model.at("top_k") == 4);
}

TEST_CASE("the doctor names flags that cannot be used", "[serve]") {
  const auto refused = [](const std::vector<std::string>& arguments, const std::string& part) {
    std::vector<std::string> all = {"doctor"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Ended ended = RunBallast(1, all);
    INFO(ended.err);
    REQUIRE(ended.code == 2);
    REQUIRE(ended.err.find(part) != std::string::npos);
  };
  refused({"--constants"}, "--constants needs --model, or --hidden and --intermediate");
  refused({"--constants", "--hidden", "64"}, "they are 64 and 0");
  refused({"--constants", "--hidden", "-1", "--intermediate", "8"}, "--hidden");
  refused({"--constants", "--hidden", "8", "--intermediate", "8", "--dtype", "f16"}, "--dtype");
  refused({"--constants", "--model", "/nowhere"}, "/nowhere/config.json");
  refused({"--constants", "--model", DemoModel(), "--hidden", "8"}, "--model gives the sizes");
  refused({"--step-tokens", "0"}, "--step-tokens");
  refused({"--constants", "--model", DemoModel(), "--json", "/nowhere/c.json"},
          "--json: /nowhere/c.json: cannot be written");
}

TEST_CASE("the doctor looks at the machine and says what it saw", "[serve]") {
  TempDir dir;
  // Not under mpirun, which the doctor itself tries.
  Process process({"bash", "-c", ". " BALLAST_SOURCE_DIR "/deploy/environment.sh; exec \"$@\"",
                   "bash", BALLAST_COMMAND, "doctor", "--ranks", "1", "--json", dir / "d.json"},
                  {}, dir / "out", dir / "err");
  REQUIRE(process.Wait(60'000) == 0);
  const json checks = json::parse(ReadText(dir / "d.json")).at("checks");
  REQUIRE(checks.size() == 8);
  for (const json& check : checks) {
    INFO(check.dump());
    REQUIRE((check.at("result") == "ok" || check.at("result") == "warn"));
    REQUIRE_FALSE(check.at("seen").get<std::string>().empty());
    REQUIRE((check.at("result") == "ok") == check.at("fix").get<std::string>().empty());
  }
  REQUIRE(ReadText(dir / "out").find("ok\tmpirun: ") != std::string::npos);
  // A machine without Open MPI is not fit.
  Process without({"env", "PATH=/nowhere", BALLAST_COMMAND, "doctor"}, {}, dir / "out2",
                  dir / "err2");
  REQUIRE(without.Wait(60'000) == 1);
  REQUIRE(ReadText(dir / "out2").find("fail\tmpirun: ") != std::string::npos);
}

}  // namespace
}  // namespace ballast::testing
