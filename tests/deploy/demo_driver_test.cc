#include <catch2/catch.hpp>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "deploy/demo/driver/drive.h"
#include "deploy/demo/driver/measures.h"
#include "deploy/demo/driver/report.h"
#include "deploy/demo/driver/run_record.h"
#include "runtime/http_server.h"
#include "tests/support/fake_ranks.h"

namespace ballast {
namespace {

using nlohmann::json;

// Two ranks, two MoE layers. Tokens 2048 + 2048 | 4096 | 100: two windows, the last one dropped.
constexpr char kStepLog[] =
    R"({"step":1,"unix_us":1000,"wall_us":3000,"tokens":2048,"epoch":0,"copies":0,)"
    R"("cpu_us":[900,500],"load":[[30,10],[20,20]]})"
    "\n"
    R"({"step":2,"unix_us":2000,"wall_us":1000,"tokens":2048,"epoch":0,"copies":0,)"
    R"("cpu_us":[100,700],"load":[[10,30],[40,0]]})"
    "\n"
    R"({"step":3,"unix_us":3000,"wall_us":2000,"tokens":4096,"epoch":1,"copies":3,)"
    R"("cpu_us":[400,400],"load":[[50,50],[60,40]]})"
    "\n"
    R"({"step":4,"unix_us":3500,"wall_us":9000,"tokens":0,"epoch":1,"copies":2,)"
    R"("cpu_us":[5,5],"load":[[0,0],[0,0]]})"
    "\n"
    R"({"step":5,"unix_us":4000,"wall_us":4000,"tokens":100,"epoch":1,"copies":0,)"
    R"("cpu_us":[200,100],"load":[[4,0],[0,0]]})"
    "\n";

std::vector<StepRecord> Steps() {
  const auto steps = ParseStepLog(kStepLog);
  REQUIRE(steps.ok());
  return *steps;
}

RunRecord Run() {
  RunRecord run{.cores = 1, .seed = 1, .concurrency = 2, .max_tokens = 8, .phases = {}};
  run.phases.push_back({.name = "mix",
                        .begin_us = 500,
                        .end_us = 2'000'500,
                        .tokens_per_s = 7,
                        .requests = {{0, 1.5, {1, 2, 3}}, {1, 2.5, {4, 5}}},
                        .steps = Steps()});
  return run;
}

TEST_CASE("a step log is read line by line", "[deploy][unit]") {
  const auto steps = Steps();
  REQUIRE(steps.size() == 5);
  REQUIRE(steps[2].epoch == 1);
  REQUIRE(steps[2].copies == 3);
  REQUIRE(steps[0].load[0] == std::vector<int64_t>{30, 10});
  // The server may be writing the last line.
  REQUIRE(ParseStepLog(std::string(kStepLog) + R"({"step":6,"uni)")->size() == 5);
  const auto bad = ParseStepLog(std::string(kStepLog) + "{}\n");
  REQUIRE(std::string(bad.status().message()).find("line 6") != std::string::npos);
  const auto ragged = ParseStepLog(std::string(kStepLog) +
                                   R"({"step":6,"unix_us":1,"wall_us":1,"tokens":1,"epoch":0,)" +
                                   R"("copies":0,"cpu_us":[1],"load":[]})" + "\n");
  REQUIRE_FALSE(ragged.ok());
}

TEST_CASE("the figures of a phase follow their definitions", "[deploy][unit][golden]") {
  const PhaseMeasures m = Measure(Run().phases[0]);
  // Windows: steps 1 and 2 with [40 40] and [60 20], then step 3 with [50 50] and [60 40].
  REQUIRE(m.imbalance == Approx((1.0 + 1.5 + 1.0 + 1.2) / 4));
  REQUIRE(m.settled_imbalance == Approx((1.0 + 1.2) / 2));
  // Steps: [30 10] [20 20], [10 30] [40 0], [50 50] [60 40], [4 0] and a layer without load.
  REQUIRE(m.step_imbalance == Approx((1.5 + 1.0 + 1.5 + 2.0 + 1.0 + 1.2 + 2.0) / 7));
  REQUIRE(m.critical_path_ms == Approx((0.9 + 0.7 + 0.4 + 0.2) / 4));
  REQUIRE(m.step_ms_p50 == 2.0);  // of 1, 2, 3, 4: the idle step does not count
  REQUIRE(m.step_ms_p99 == 4.0);
  REQUIRE(m.tokens_per_s == Approx(8292 / 2.0));
  REQUIRE(m.copies_moved == 5);
}

TEST_CASE("an unfinished window counts only where it is the only one", "[deploy][unit]") {
  PhaseRecord phase = Run().phases[0];
  phase.steps.erase(phase.steps.begin() + 1, phase.steps.end());
  const PhaseMeasures m = Measure(phase);
  REQUIRE(m.imbalance == Approx((1.5 + 1.0) / 2));
  REQUIRE(m.settled_imbalance == Approx((1.5 + 1.0) / 2));
}

TEST_CASE("steps belong to the phase in which they end", "[deploy][unit]") {
  std::vector<PhaseRecord> phases(2);
  phases[0].begin_us = 1500;
  phases[1].begin_us = 3200;
  AssignSteps(Steps(), &phases);
  REQUIRE(phases[0].steps.size() == 2);  // the step before the first phase is nobody's
  REQUIRE(phases[1].steps.size() == 2);
}

TEST_CASE("a run survives its file", "[deploy][unit]") {
  const std::string text = ToJson(Run());
  const auto run = ParseRunRecord(text);
  REQUIRE(run.ok());
  REQUIRE(ToJson(*run) == text);
  REQUIRE_FALSE(ParseRunRecord("{}").ok());
  REQUIRE_FALSE(ParseRunRecord("nonsense").ok());
}

TEST_CASE("the comparison has exactly its fields", "[deploy][unit][golden]") {
  const auto comparison = Compare(Run(), Run());
  REQUIRE(comparison.ok());
  REQUIRE(comparison->texts_identical);
  const json result = json::parse(ToJson(*comparison));
  const auto keys = [](const json& object) {
    std::vector<std::string> names;
    for (const auto& item : object.items()) names.push_back(item.key());
    return names;
  };
  using Names = std::vector<std::string>;
  REQUIRE(keys(result) == Names{"phases", "texts_identical"});
  REQUIRE(keys(result["phases"][0]) == Names{"dynamic", "name", "static"});
  REQUIRE(keys(result["phases"][0]["static"]) == Names{"critical_path_ms", "imbalance",
                                                       "step_imbalance", "step_ms_p50",
                                                       "step_ms_p99", "tokens_per_s"});
  REQUIRE(keys(result["phases"][0]["dynamic"]) ==
          Names{"copies_moved", "critical_path_ms", "imbalance", "settled_imbalance",
                "step_imbalance", "step_ms_p50", "step_ms_p99", "tokens_per_s"});
  const std::string table = ToTable(*comparison);
  REQUIRE(table.find("oversubscribed: 2 ranks on 1 cores") != std::string::npos);
  REQUIRE(table.find("identical") != std::string::npos);
}

TEST_CASE("texts that differ are found", "[deploy][unit]") {
  RunRecord other = Run();
  other.phases[0].requests[1].token_ids[1] = 9;
  const auto comparison = Compare(Run(), other);
  REQUIRE(comparison.ok());
  REQUIRE_FALSE(comparison->texts_identical);
  REQUIRE(comparison->first_difference == "phase mix, request 1, token 1");
  other.phases[0].requests[1].token_ids = {4};
  REQUIRE(Compare(Run(), other)->first_difference == "phase mix, request 1, token 1");
  other.phases[0].requests.pop_back();
  REQUIRE_FALSE(Compare(Run(), other).ok());
  RunRecord no_steps = Run();
  no_steps.phases[0].steps.clear();
  REQUIRE_FALSE(Compare(Run(), no_steps).ok());
}

TEST_CASE("the report shows ranks phases and flips", "[deploy][unit]") {
  const std::string html = ReportHtml(Run(), Run(), *Compare(Run(), Run()));
  for (const char* part : {"rank 0", "rank 1", "class=\"phase\"", "class=\"flip\"", "epoch 1, 3",
                           "prefers-color-scheme: dark", "name=\"viewport\"", "oversubscribed"}) {
    CAPTURE(part);
    REQUIRE(html.find(part) != std::string::npos);
  }
  REQUIRE(html.find("http") == std::string::npos);  // needs nothing from elsewhere
}

TEST_CASE("prompts are the same in every run and cut between characters", "[deploy][unit]") {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += "a\xe6\x97\xa5\xc3\xa9" + std::to_string(i);
  const Domains domains = {
      {"english", std::string(500, 'e')}, {"code", text}, {"japanese", text}, {"structured", text}};
  for (int64_t i = 0; i < 200; ++i) {
    const std::string prompt = PromptOf(domains, "japanese", i, 3);
    REQUIRE(prompt == PromptOf(domains, "japanese", i, 3));
    REQUIRE(prompt.size() >= 190);
    REQUIRE(prompt.size() <= 400);
    REQUIRE(json(prompt).dump().size() > 0);  // throws on a cut character
  }
  REQUIRE(PromptOf(domains, "mix", 0, 3)[0] == 'e');
  REQUIRE(PromptOf(domains, "code", 0, 3) != PromptOf(domains, "japanese", 0, 3));
  REQUIRE(CutPrompt(std::string(400, 'x'), 1, 1).size() >= 200);
}

TEST_CASE("a drive asks a server and keeps what it answers", "[deploy][unit]") {
  testing::FakeRanks ranks({.num_ranks = 2});
  auto frontend = Frontend::Create({.max_pending = 64, .context_tokens = 1024, .vocab_size = 256},
                                   ranks.TakeChannels(), nullptr);
  REQUIRE(frontend.ok());
  auto server = HttpServer::Start(
      {.host = "127.0.0.1", .port = 0, .threads = 16},
      {.frontend = frontend->get(), .tokenizer = Tokenizer::ByteLevel(), .model_name = "demo"});
  REQUIRE(server.ok());
  const std::string dir =
      (std::filesystem::temp_directory_path() / "ballast-demo-driver-test").string();
  std::filesystem::create_directories(dir);
  for (const char* name : {"english", "code", "japanese", "structured"}) {
    std::string text;
    for (int i = 0; i < 500; ++i) text += name + std::to_string(i) + "\n";
    REQUIRE(WriteFile(dir + "/" + name + ".txt", text).ok());
  }
  REQUIRE(WriteFile(dir + "/steps.jsonl", kStepLog).ok());
  DriveOptions options{.port = (*server)->port(),
                       .prompts_dir = dir,
                       .step_log_path = dir + "/steps.jsonl",
                       .phases = {"mix", "code"},
                       .requests_per_phase = 12,
                       .concurrency = 4,
                       .max_tokens = 6,
                       .seed = 5};
  const auto first = Drive(options);
  options.concurrency = 1;
  const auto second = Drive(options);
  REQUIRE(first.ok());
  REQUIRE(second.ok());
  REQUIRE(first->phases.size() == 2);
  REQUIRE(first->phases[1].begin_us >= first->phases[0].end_us);
  for (size_t p = 0; p < 2; ++p) {
    REQUIRE(first->phases[p].requests.size() == 12);
    for (size_t i = 0; i < 12; ++i) {
      REQUIRE(first->phases[p].requests[i].index == static_cast<int64_t>(i));
      REQUIRE(first->phases[p].requests[i].token_ids.size() == 6);
      REQUIRE(first->phases[p].requests[i].token_ids == second->phases[p].requests[i].token_ids);
    }
  }
  options.phases = {"french"};
  REQUIRE(Drive(options).status().code() == absl::StatusCode::kInvalidArgument);
  options.phases = {"mix"};
  options.max_tokens = 0;  // the server refuses it
  REQUIRE(std::string(Drive(options).status().message()).find("400") != std::string::npos);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace ballast
