// The laboratory's commands as users run them: plan, replay, convert, bench.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/npy.h"
#include "base/random.h"
#include "base/status.h"
#include "placement/placement.h"
#include "tests/deploy/lab_files.h"

namespace ballast {
namespace {

using namespace testing;  // what the tests of these commands share
using Catch::Matchers::Contains;
using nlohmann::json;

TEST_CASE("ballast plan balances a load and writes what engines read", "[deploy][lab]") {
  const Files files;
  const std::string base = "plan --load " + files.At("load.csv") + " --ranks 4 --slots 12 ";
  const Ended ended =
      Ballast(base + "--json " + files.At("plan.json") + " --out " + files.At("native.json"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  const json plan = JsonAt(files.At("plan.json"));
  REQUIRE(plan["plan_ms"].get<double>() >= 0.0);
  REQUIRE(plan["layers"].size() == 2);
  for (const json& layer : plan["layers"]) {
    REQUIRE(layer["slot_to_expert"].size() == 12);
    REQUIRE(layer["max_over_mean"].get<double>() == layer["lower_bound"].get<double>());
    REQUIRE(layer["max_over_mean"].get<double>() < 1.01);
  }
  const auto native = ReadFile(files.At("native.json"));
  REQUIRE(native.ok());
  const auto placement = Placement::FromJson(*native);
  REQUIRE(placement.ok());
  REQUIRE(std::equal(placement->expert_of_slot(0).begin(), placement->expert_of_slot(0).end(),
                     plan["layers"][0]["slot_to_expert"].begin()));
  // Planned again from there, nothing moves.
  const Ended again = Ballast(base + "--current " + files.At("native.json"));
  REQUIRE(again.exit_code == 0);
  REQUIRE_THAT(again.output, Contains("0 copies to move"));
  for (const char* format : {"eplb", "sglang", "trtllm", "ascend"}) {
    const Ended other =
        Ballast(base + "--policy eplb --format " + format + " --out " + files.At(format));
    REQUIRE(other.exit_code == 0);
    REQUIRE(ReadFile(files.At(format)).ok());
  }
  const Ended dry = Ballast(base + "--dry-run --out " + files.At("dry.json"));
  REQUIRE(dry.exit_code == 0);
  REQUIRE_FALSE(ReadFile(files.At("dry.json")).ok());
}

TEST_CASE("ballast plan refuses bad loads and shapes by name and value", "[deploy][lab][errors]") {
  const Files files;
  const std::string load = "plan --load " + files.At("load.csv");
  RequireRefused(load + " --ranks 16 --slots 12", {"--slots is 12", "at least --ranks, 16"});
  RequireRefused(load + " --ranks 4 --slots 13", {"--slots is 13", "a multiple of --ranks, 4"});
  RequireRefused(load + " --ranks 2 --slots 6", {"--slots is 6", "at least the experts, 8"});
  RequireRefused(load + " --ranks 4 --slots 12 --groups 3", {"--groups is 3", "a divisor", "8"});
  RequireRefused(load + " --ranks 4 --slots 12 --nodes 3", {"--nodes is 3", "a divisor", "4"});
  RequireRefused(load + " --ranks 4 --slots 12 --policy magic", {"--policy", "magic", "eplb,full"});
  RequireRefused(load + " --ranks 4 --slots 12 --format yaml", {"--format", "yaml", "sglang"});
  RequireRefused(load + " --ranks 4", {"--slots is required"});
  RequireRefused(load + " --ranks 4 --slots 12 --current " + files.At("load.csv"),
                 {"load.csv", "not a JSON object"});
  for (const auto& [text, part] : {std::pair("1,nan\n", "layer 0 expert 1 has load nan"),
                                   std::pair("1,2\n3,-4\n", "layer 1 expert 1 has load -4"),
                                   std::pair("1,2\n3\n", "line 2 has 1 numbers"),
                                   std::pair("1,two\n", "line 1 field 2 is 'two'")}) {
    REQUIRE(WriteFile(files.At("bad.csv"), text).ok());
    RequireRefused("plan --ranks 1 --slots 2 --load " + files.At("bad.csv"), {"bad.csv", part});
  }
  RequireRefused("plan --ranks 1 --slots 2 --load " + files.At("a.npy"),
                 {"a.npy", "[256, 2, 2]", "[layers, experts]"});
}

TEST_CASE("ballast plan spends a replica budget on the hot layer", "[deploy][lab]") {
  // Layer 0 of load.csv has 900 of 970 copies on one expert; layer 1 needs a copy or two.
  const Files files;
  const Ended ended = Ballast("plan --load " + files.At("load.csv") +
                              " --ranks 4 --slots 12 --replica-budget 4 --json " +
                              files.At("plan.json") + " --out " + files.At("native.json"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  REQUIRE_THAT(ended.output, Contains("replica budget: 4 copies"));
  const json plan = JsonAt(files.At("plan.json"));
  REQUIRE(plan["replica_budget"]["copies"] == 4);
  REQUIRE(plan["replica_budget"]["max_over_mean"].get<double>() <
          plan["replica_budget"]["max_over_mean_uniform"].get<double>());
  int64_t copies = 0;
  for (const json& layer : plan["layers"]) {
    const auto row = layer["slot_to_expert"].get<std::vector<int32_t>>();
    REQUIRE(row.size() == 12);
    const auto used = std::count_if(row.begin(), row.end(), [](int32_t e) { return e >= 0; });
    REQUIRE(used == 8 + layer["copies"].get<int64_t>());
    REQUIRE(layer["max_over_mean_uniform"].get<double>() >= 1.0);
    copies += layer["copies"].get<int64_t>();
  }
  REQUIRE(copies == 4);
  REQUIRE(plan["layers"][0]["copies"].get<int>() > plan["layers"][1]["copies"].get<int>());
  const auto native = ReadFile(files.At("native.json"));
  REQUIRE(native.ok());
  REQUIRE(Placement::FromJson(*native).ok());
}

TEST_CASE("ballast plan covers the hot experts and says what that costs", "[deploy][lab]") {
  const Files files;
  for (const char* policy : {"full", "eplb"}) {
    const Ended ended =
        Ballast("plan --load " + files.At("load.csv") + " --ranks 4 --slots 12 --coverage 1 " +
                "--policy " + policy + " --json " + files.At("plan.json"));
    INFO(ended.output);
    REQUIRE(ended.exit_code == 0);
    REQUIRE_THAT(ended.output, Contains("the 4 hottest of 8 experts") &&
                                   Contains("without coverage") && Contains("uncovered max/mean"));
    const json plan = JsonAt(files.At("plan.json"));
    // 900 of 970 on two ranks: 450 of a mean of 242.5 at least. In layer 1 experts 4 to 7 are hot.
    REQUIRE(plan["layers"][0]["max_over_mean"].get<double>() >= 450 / 242.5);
    REQUIRE(plan["layers"][0]["max_over_mean_uncovered"].get<double>() < 1.1);
    const auto row = plan["layers"][1]["slot_to_expert"].get<std::vector<int32_t>>();
    for (int32_t hot : {4, 5, 6, 7}) {
      std::vector<size_t> ranks;
      for (size_t s = 0; s < row.size(); ++s) {
        if (row[s] == hot) ranks.push_back(s / 3);
      }
      INFO("expert " << hot);
      REQUIRE(ranks.size() >= 2);
      REQUIRE(ranks.front() != ranks.back());
    }
  }
}

TEST_CASE("ballast plan refuses budgets and rules that cannot be kept by name and value",
          "[deploy][lab][errors]") {
  const Files files;
  const std::string base = "plan --load " + files.At("load.csv") + " --ranks 4 ";
  RequireRefused(base + "--slots 12 --replica-budget 9", {"--replica-budget", "is 9", "0 to 8"});
  RequireRefused(base + "--slots 12 --replica-budget -1", {"--replica-budget", "-1"});
  RequireRefused(base + "--slots 12 --replica-budget 2 --policy eplb",
                 {"--policy is eplb with --replica-budget", "full"});
  RequireRefused(base + "--slots 12 --replica-budget 2 --coverage 1",
                 {"--coverage is 1 with --replica-budget", "0"});
  RequireRefused(base + "--slots 12 --replica-budget 2 --current x.json", {"--current is x.json"});
  RequireRefused(base + "--slots 12 --coverage 2", {"--coverage", "2"});
  RequireRefused(base + "--slots 8 --coverage 1", {"--coverage is 1", "8 slots on 4 ranks"});
}

TEST_CASE("ballast replay gives a table and the same figures as JSON and a page", "[deploy][lab]") {
  const Files files;
  const std::string base = "replay --trace " + files.At("a.npy") + "," + files.At("b.npy") +
                           " --experts 16 --ranks 4 --slots 20 --step-tokens 50 ";
  const Ended ended = Ballast(base +
                              "--policy static,never,eplb-interval:2,full,oracle "
                              "--split exact,even --rho 0.1,1 --json " +
                              files.At("r.json") + " --report " + files.At("r.html"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  REQUIRE_THAT(ended.output, Contains("10 steps of 50 tokens") && Contains("12 tokens dropped") &&
                                 Contains("eplb-interval:2"));
  const json figures = JsonAt(files.At("r.json"))["policies"];
  REQUIRE(figures.size() == 5 * 2 * 2);
  for (const json& f : figures) {
    REQUIRE(f["mean_imbalance"].get<double>() >= 1.0);
    REQUIRE(f["p99_imbalance"].get<double>() >= f["mean_imbalance"].get<double>());
    REQUIRE(f["total_cost"].get<double>() ==
            Approx(f["mean_imbalance"].get<double>() +
                   f["rho"].get<double>() * f["busiest_copies_per_layer_step"].get<double>()));
    REQUIRE(f["split_us_p99"].get<double>() > 0.0);
    REQUIRE(f["when"] == "after-step");
  }
  REQUIRE(figures[0]["copies_per_layer_step"] == 0.0);
  REQUIRE(figures[16]["policy"] == "oracle");
  REQUIRE(figures[16]["mean_imbalance"].get<double>() == 1.0);
  const auto page = ReadFile(files.At("r.html"));
  REQUIRE(page.ok());
  REQUIRE_THAT(*page, Contains("viewport") && Contains("<svg") && Contains("oracle, even") &&
                          !Contains("http") && !Contains("nan"));
  // The same run again gives the same figures, but for the times.
  const Ended again = Ballast(base + "--policy full --json " + files.At("again.json"));
  REQUIRE(again.exit_code == 0);
  REQUIRE(JsonAt(files.At("again.json"))["policies"][0]["mean_imbalance"] ==
          figures[12]["mean_imbalance"]);
}

TEST_CASE("ballast replay keeps rules and says what coverage costs", "[deploy][lab]") {
  const Files files;
  const std::string base = "replay --trace " + files.At("a.npy") + "," + files.At("b.npy") +
                           " --ranks 4 --slots 24 --step-tokens 16 ";
  const Ended covered = Ballast(base + "--policy regret --coverage 1 --json " + files.At("r.json"));
  INFO(covered.output);
  REQUIRE(covered.exit_code == 0);
  REQUIRE_THAT(covered.output, Contains("the 8 hottest of 16 experts"));
  const json figures = JsonAt(files.At("r.json"))["policies"][0];
  REQUIRE(Ballast(base + "--policy regret --json " + files.At("plain.json")).exit_code == 0);
  const json plain = JsonAt(files.At("plain.json"))["policies"][0];
  REQUIRE(figures["without_coverage"]["mean_imbalance"] == plain["mean_imbalance"]);
  REQUIRE(figures["without_coverage"]["total_cost"] == plain["total_cost"]);
  REQUIRE(figures["mean_imbalance"] != plain["mean_imbalance"]);
  REQUIRE_FALSE(plain.contains("without_coverage"));
  const Ended local =
      Ballast(base + "--policy regret --nodes 2 --node-local --json " + files.At("local.json"));
  INFO(local.output);
  REQUIRE(local.exit_code == 0);
  REQUIRE(JsonAt(files.At("local.json"))["policies"][0]["mean_imbalance"] !=
          plain["mean_imbalance"]);
  for (const char* policy : {"static", "never", "eplb", "full", "oracle", "oracle-switch"}) {
    RequireRefused(base + "--coverage 1 --policy " + policy,
                   {absl::StrCat("policy ", policy, " "), "coverage 1", "regret"});
  }
  // Nobody who named no policy is told that one of the usual ones cannot keep the rule.
  REQUIRE(Ballast(base + "--coverage 1 --json " + files.At("usual.json")).exit_code == 0);
  const json usual = JsonAt(files.At("usual.json"))["policies"];
  REQUIRE(usual.size() == 1);
  REQUIRE(usual[0]["policy"] == "regret");
  REQUIRE(Ballast(base + "--json " + files.At("usual.json")).exit_code == 0);
  REQUIRE(JsonAt(files.At("usual.json"))["policies"].size() == 3);
  // At a rate that never lets more than the first slots of a layer go, there are fewer copies.
  const auto copies = [&](const std::string& flags) {
    REQUIRE(
        Ballast(base + "--policy eplb-interval:1 --json " + files.At("c.json") + flags).exit_code ==
        0);
    return JsonAt(files.At("c.json"))["policies"][0]["copies_per_layer_step"].get<double>();
  };
  REQUIRE(copies(" --copy-budget 0.001") * 32 * 2 <= 24.1);  // 32 steps of 2 layers
  REQUIRE(copies(" --copy-budget 0.001") > 0.0);
  REQUIRE(copies("") * 32 * 2 > 24.1);
  REQUIRE(copies(" --copy-budget 1e6") == copies(""));
  RequireRefused(base + "--copy-budget -1", {"--copy-budget", "-1"});
  RequireRefused(base + "--policy eplb --node-local", {"policy eplb ", "node-local"});
  RequireRefused(base + "--policy regret --nodes 2 --coverage 1 --node-local",
                 {"coverage 1 and node-local"});
  RequireRefused(base + "--coverage 3", {"--coverage", "3"});
  RequireRefused(base + "--nodes 3", {"--nodes is 3", "divisor"});
}

TEST_CASE("ballast replay refuses bad traces and flags by name and value",
          "[deploy][lab][errors]") {
  const Files files;
  const std::string shape = " --ranks 4 --slots 20 --step-tokens 50 ";
  const std::string a = "replay --trace " + files.At("a.npy");
  RequireRefused(a + shape + "--experts 8", {"a.npy: token 0 layer 0 has expert 15", "0 to 7"});
  RequireRefused(a + shape + "--policy magic", {"unknown policy 'magic'", "eplb, eplb-interval:N"});
  RequireRefused(a + shape + "--policy eplb-interval:0", {"eplb-interval:0", "1 to"});
  RequireRefused(a + shape + "--split fair",
                 {"unknown split mode 'fair'", "exact, cost, price, even"});
  RequireRefused(a + shape + "--rho -1", {"--rho", "-1", "0.000000 to 1000000.000000"});
  RequireRefused(a + shape + "--rho x", {"--rho", "x", "0.000000 to 1000000.000000"});
  // Before the work: the table is not there.
  for (const char* flag : {"--json", "--report"}) {
    const Ended ended = Ballast(a + shape + flag + " /nowhere/x");
    REQUIRE(ended.exit_code == 2);
    REQUIRE_THAT(ended.output, Contains(absl::StrCat(flag, ": /nowhere/x: cannot be written: No")));
    REQUIRE_THAT(ended.output, !Contains("imbalance"));
  }
  RequireRefused(a + shape + "--when never", {"--when", "never", "after-step"});
  RequireRefused(a + " --ranks 32 --slots 20 --step-tokens 50",
                 {"--slots is 20", "at least --ranks, 32"});
  RequireRefused(a + " --ranks 4 --slots 8 --step-tokens 50",
                 {"--slots is 8", "at least the experts, 16"});
  RequireRefused(a + " --ranks 4 --slots 20 --step-tokens 1000", {"a.npy", "256 tokens", "1000"});
  RequireRefused(a + shape + "--unknown 3", {"--unknown"});
  RequireRefused("replay --trace " + files.At("none.npy") + shape, {"none.npy: cannot be read"});

  const auto bytes = ReadFile(files.At("a.npy"));
  REQUIRE(bytes.ok());
  REQUIRE(WriteFile(files.At("cut.npy"), bytes->substr(0, 500)).ok());
  RequireRefused("replay --trace " + files.At("cut.npy") + shape,
                 {"cut.npy: has 372 bytes of data", "needs 1024 (cut off)"});
  RequireRefused(a + shape + "--experts 8",
                 {"a.npy: token 0 layer 0 has expert 15, allowed: 0 to 7"});
  const std::vector<int64_t> counts = {1, -2, 3, 1};
  REQUIRE(WriteNpy(files.At("n.npy"), MakeNpyArray(NpyType::kI32, {1, 2, 2}, counts)).ok());
  RequireRefused("replay --ranks 1 --slots 2 --trace " + files.At("n.npy"),
                 {"n.npy: step 0 layer 0 expert 1 has count -2, allowed: 0 and more"});
  REQUIRE(WriteNpy(files.At("l.npy"), MakeNpyArray(NpyType::kI32, {2, 2}, counts)).ok());
  RequireRefused("plan --ranks 1 --slots 2 --load " + files.At("l.npy"),
                 {"l.npy: layer 0 expert 1 has load -2, allowed: numbers from 0"});
  // A short file that would fill the memory.
  const std::vector<int64_t> many(40'000, 1);
  REQUIRE(WriteNpy(files.At("m.npy"), MakeNpyArray(NpyType::kU16, {40'000, 1, 1}, many)).ok());
  RequireRefused(
      "replay --ranks 1 --slots 65536 --experts 65536 --step-tokens 1 --trace " + files.At("m.npy"),
      {"m.npy: 40000 steps", "65536 experts, allowed: 2147483648 counts in all"});
  const std::vector<int64_t> zeros(256 * 3 * 2, 0);
  REQUIRE(WriteNpy(files.At("c.npy"), MakeNpyArray(NpyType::kU8, {256, 3, 2}, zeros)).ok());
  RequireRefused(a + "," + files.At("c.npy") + shape,
                 {"c.npy: [256, 3, 2] of u8 does not go with", "a.npy: [256, 2, 2] of u8"});
}

TEST_CASE("ballast convert goes from routing text to ids to counts to loads", "[deploy][lab]") {
  const Files files;
  const std::string text1 = "0\t1\t2\t3\t\t0.5\t0.25\t0.5\t0.25\n1\t3\t\t0.5\t0.5\n";
  const std::string text2 = "3\t2\t1\t0\t\t0.5\t0.25\t0.5\t0.25\n1\t2\t\t0.5\t0.5\n";
  REQUIRE(WriteFile(files.At("expert_weights_1.txt"), text1).ok());
  REQUIRE(WriteFile(files.At("expert_weights_2.txt"), text2).ok());
  const auto run = [&](const std::string& arguments) {
    const Ended ended = Ballast("convert " + arguments);
    INFO(arguments << "\n" << ended.output);
    REQUIRE(ended.exit_code == 0);
  };
  run("--from esft --top-k 2 --in " + files.At("") + " --to ids --out " + files.At("ids.npy") +
      " --weights-out " + files.At("weights.npy"));
  const auto ids = ReadNpy(files.At("ids.npy"));
  REQUIRE(ids.ok());
  REQUIRE(*ids == MakeNpyArray(NpyType::kU8, {3, 2, 2},
                               std::vector<int64_t>{0, 1, 3, 2, 2, 3, 1, 0, 1, 3, 1, 2}));
  REQUIRE(ReadNpy(files.At("weights.npy"))->IntegerAt(1) == 2500);
  run("--from ids --step-tokens 1 --in " + files.At("ids.npy") + " --to steps --out " +
      files.At("steps.npy"));
  REQUIRE(ReadNpy(files.At("steps.npy"))->shape == std::vector<int64_t>{3, 2, 4});
  run("--from ids --in " + files.At("ids.npy") + " --to load --out " + files.At("one.csv"));
  run("--from steps --in " + files.At("steps.npy") + " --to load --out " + files.At("two.npy"));
  run("--from load --in " + files.At("two.npy") + " --to load --out " + files.At("two.csv"));
  REQUIRE(*ReadFile(files.At("one.csv")) == "1,2,1,2\n1,2,2,1\n");
  REQUIRE(*ReadFile(files.At("two.csv")) == *ReadFile(files.At("one.csv")));
  // Step counts replay as the ids that they were counted from.
  const std::string shape = " --ranks 2 --slots 6 --step-tokens 1 --json ";
  REQUIRE(Ballast("replay --trace " + files.At("ids.npy") + shape + files.At("i.json")).exit_code ==
          0);
  REQUIRE(
      Ballast("replay --trace " + files.At("steps.npy") + shape + files.At("s.json")).exit_code ==
      0);
  REQUIRE(JsonAt(files.At("i.json"))["policies"][2]["mean_imbalance"] ==
          JsonAt(files.At("s.json"))["policies"][2]["mean_imbalance"]);

  run("--from csv --to sglang --in " +
      [&] {
        REQUIRE(WriteFile(files.At("p.csv"), "layer,rank,experts\n0,0,0 1\n0,1,2 1\n").ok());
        return files.At("p.csv");
      }() +
      " --out " + files.At("p.json"));
  REQUIRE(*ReadFile(files.At("p.json")) == "{\"physical_to_logical_map\":[[0,1,2,1]]}\n");
}

TEST_CASE("counts by kind replay with separate and joint windows and add up to loads",
          "[deploy][lab]") {
  const Files files;
  // Four prefill steps, then twelve decode steps, three times: prefill is busy with the first
  // experts, decode with the last.
  constexpr int64_t kSteps = 48, kExperts = 16;
  Random random(4);
  std::vector<int64_t> by_kind, sums, load(kExperts);
  for (int64_t step = 0; step < kSteps; ++step) {
    const int64_t kind = step % 16 < 4 ? 0 : 1;
    for (int64_t i = 0; i < 2 * kExperts; ++i) {
      const int64_t e = i % kExperts;
      const bool busy = kind == 0 ? e < 4 : e >= 12;
      const int64_t count = i / kExperts == kind ? (busy ? 300 : 40) + random.Below(20) : 0;
      by_kind.push_back(count);
      load[static_cast<size_t>(e)] += count;
      if (i / kExperts == kind) sums.push_back(count);
    }
  }
  const std::string four = files.At("four.npy"), three = files.At("three.npy");
  REQUIRE(WriteNpy(four, MakeNpyArray(NpyType::kI32, {kSteps, 2, 1, kExperts}, by_kind)).ok());
  REQUIRE(WriteNpy(three, MakeNpyArray(NpyType::kI64, {kSteps, 1, kExperts}, sums)).ok());
  const auto figures = [&](const std::string& trace, const std::string& more) {
    const Ended ended = Ballast(
        "replay --ranks 4 --slots 20 --policy never,regret --rho .1 "
        "--trace " +
        trace + more + " --json " + files.At("r.json"));
    INFO(ended.output);
    REQUIRE(ended.exit_code == 0);
    std::vector<double> costs;
    const json result = JsonAt(files.At("r.json"));
    for (const json& f : result["policies"]) costs.push_back(f["total_cost"]);
    return costs;
  };
  const auto plain = figures(three, "");
  REQUIRE(figures(three, " --windows joint") == plain);
  REQUIRE(figures(four, " --windows joint") == plain);
  const auto separate = figures(four, "");
  REQUIRE(separate[0] == plain[0]);  // imbalance is that of the sums
  REQUIRE(separate[1] != plain[1]);

  REQUIRE(Ballast("convert --from steps --to load --in " + four + " --out " + files.At("load.npy"))
              .exit_code == 0);
  const auto total = ReadNpy(files.At("load.npy"));
  REQUIRE(total.ok());
  REQUIRE(*total == MakeNpyArray(NpyType::kI64, {1, kExperts}, load));

  const std::string shape = "replay --ranks 4 --slots 20 --trace ";
  // Counts do not say how many tokens made them.
  REQUIRE_THAT(Ballast(shape + three).output,
               Contains("48 steps of counts (--top-k would say of how many tokens"));
  const std::vector<int64_t> even = {3, 1, 0, 2, 2, 4};  // 4 and 8 copies
  REQUIRE(WriteNpy(files.At("even.npy"), MakeNpyArray(NpyType::kI32, {2, 1, 3}, even)).ok());
  const std::string of_even = "replay --ranks 1 --slots 3 --trace " + files.At("even.npy");
  REQUIRE_THAT(Ballast(of_even + " --top-k 4").output,
               Contains("2 steps of counts of 3 tokens in all, 1 layers"));
  RequireRefused(of_even + " --top-k 8",
                 {"--top-k is 8, but ", "even.npy has 4 copies in step 0 layer 0"});
  RequireRefused(shape + four + " --windows both", {"--windows", "both", "separate", "joint"});
  RequireRefused(shape + four + "," + three, {"three.npy: [48, 1, 16] of i64 does not go with"});
  REQUIRE(WriteNpy(files.At("bad.npy"), MakeNpyArray(NpyType::kI32, {16, 3, 2, 16}, by_kind)).ok());
  RequireRefused(shape + files.At("bad.npy"),
                 {"bad.npy: [16, 3, 2, 16] of i32, allowed: [steps, layers, experts] or [steps, 2, "
                  "layers, experts]"});
}

TEST_CASE("ballast convert refuses what it cannot do", "[deploy][lab][errors]") {
  const Files files;
  const std::string out = " --out " + files.At("out");
  RequireRefused("convert --from load --to ids --in x.csv" + out, {"--from load --to ids"});
  RequireRefused("convert --from ids --to esft --in x.npy" + out, {"--to is esft"});
  RequireRefused("convert --from steps --to load --in " + files.At("a.npy") + out,
                 {"a.npy: u8, allowed with --from steps: i32, i64"});
  RequireRefused("convert --from sglang --to native --in " + files.At("load.csv") + out,
                 {"load.csv: no list \"physical_to_logical_map\""});
  const std::string nest(100'000, '[');
  REQUIRE(WriteFile(files.At("nest.json"),
                    "{\"physical_to_logical_map\": [" + nest + std::string(nest.size(), ']') + "]}")
              .ok());
  RequireRefused("convert --from sglang --to native --in " + files.At("nest.json") + out,
                 {"nest.json: nests deeper than 64"});
  RequireRefused("convert --from ids --to load --in " + files.At("a.npy") + " --out /nowhere/x",
                 {"/nowhere/x", "cannot be written"});
  RequireRefused("convert --from esft --to ids --in " + files.At("") + out,
                 {"a folder without expert_weights_<layer>.txt"});
}

TEST_CASE("ballast bench measures planners and splits without a gap", "[deploy][lab]") {
  const Files files;
  for (const std::string what : {"split", "plan"}) {
    const Ended ended = Ballast("bench " + what + " --json " + files.At("bench.json"));
    INFO(ended.output);
    REQUIRE(ended.exit_code == 0);
    const json rows = JsonAt(files.At("bench.json"))[what];
    REQUIRE(rows.size() == (what == "split" ? 8 : 6));
    for (const json& row : rows) {
      if (what == "split") REQUIRE(row["max_gap_tokens"] == 0);
      if (what == "plan" && row["policy"] == "full") {
        REQUIRE(row["max_over_mean"].get<double>() < 1.002);
      }
    }
  }
  RequireRefused("bench nothing", {"nothing", "split,plan"});
}

TEST_CASE("a configuration file may give what is required, and lists", "[deploy][lab]") {
  const Files files;
  REQUIRE(WriteFile(files.At("c.json"),
                    "{\"ranks\": 4, \"slots\": 20, \"step-tokens\": 50,\n"
                    "\"policy\": \"never,full\", \"rho\": \"0.1,0.2\"}")
              .ok());
  const Ended ended = Ballast("replay --config " + files.At("c.json") + " --trace " +
                              files.At("a.npy") + " --json " + files.At("r.json"));
  INFO(ended.output);
  REQUIRE(ended.exit_code == 0);
  const json figures = JsonAt(files.At("r.json"))["policies"];
  REQUIRE(figures.size() == 4);
  REQUIRE(figures[3]["policy"] == "full");
  REQUIRE(figures[3]["rho"] == 0.2);
}

TEST_CASE("every command of the laboratory helps", "[deploy][lab]") {
  for (const char* command : {"plan", "replay", "convert", "bench"}) {
    const Ended ended = Ballast(std::string(command) + " --help");
    REQUIRE(ended.exit_code == 0);
    REQUIRE_THAT(ended.output, Contains("--config") && Contains("Usage: ballast"));
  }
  REQUIRE_THAT(Ballast("convert --help").output, Contains("an empty column"));
}

}  // namespace
}  // namespace ballast
