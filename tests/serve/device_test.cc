// `ballast serve --device cuda` as its users see it, on the emulator: processes that lend each
// other device memory, live replication in it, and the loss of one of them.
#include <signal.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <memory>
#include <thread>

#include "tests/serve/server.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

// A small random model that reads bytes.
class SmallModel {
 public:
  SmallModel() {
    WriteCheckpoint(dir_.path(), {.vocab = 256, .context = 256});
    std::filesystem::copy_file(DemoModel() + "/tokenizer_config.json",
                               dir_ / "tokenizer_config.json");
  }
  std::unique_ptr<Server> Serve(int ranks, std::vector<std::string> flags) const {
    for (const char* flag : {"--model", dir_.path().c_str(), "--device", "cuda", "--dtype", "fp32",
                             "--kv-bytes", "4mb", "--max-batch-tokens", "24", "--max-seqs", "4"}) {
      flags.push_back(flag);
    }
    return std::make_unique<Server>(ranks, flags,
                                    Environment{{"OMPI_MCA_orte_enable_recovery", "1"}});
  }

 private:
  TempDir dir_;
};

std::vector<json> Requests() {
  std::vector<json> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back({{"prompt", std::string(static_cast<size_t>(1 + 3 * i), 'a' + i)},
                        {"max_tokens", 3 + 2 * i},
                        {"temperature", i % 2 == 0 ? 0.0 : 0.8},
                        {"seed", 40 + i},
                        {"return_token_ids", true}});
  }
  return requests;
}

std::vector<std::vector<int32_t>> IdsOf(const std::vector<Answer>& answers) {
  std::vector<std::vector<int32_t>> ids;
  for (const Answer& answer : answers) {
    INFO(answer.body);
    REQUIRE(answer.status == 200);
    ids.push_back(answer.ids());
  }
  return ids;
}

std::vector<std::vector<int32_t>> Alone(const SmallModel& model) {
  const auto server = model.Serve(1, {});
  const auto ids = IdsOf(CompleteAll(*server, Requests(), 3));
  CHECK(server->Stop() == 0);
  return ids;
}

TEST_CASE("devices answer as one does while experts move", "[serve]") {
  const SmallModel model;
  const auto expected = Alone(model);
  const auto server = model.Serve(2, {"--policy", "eplb", "--slots-per-rank", "7"});
  CHECK(IdsOf(CompleteAll(*server, Requests(), 3)) == expected);
  const int64_t before = server->Epoch();
  const Answer forced = server->Request("POST", "/v1/rebalance");
  INFO(forced.body);
  CHECK(forced.json.at("planned") == true);
  CHECK(IdsOf(CompleteAll(*server, Requests(), 3)) == expected);
  // Everyone reads its experts and tables again, where they are.
  const Answer verified = server->Request("GET", "/v1/verify");
  INFO(verified.body);
  CHECK(verified.json.at("ok") == true);
  CHECK(server->Epoch() > before);
  CHECK(server->MetricSum("ballast_ranks_serving") > 0);
  CHECK(server->Stop() == 0);
}

TEST_CASE("a rank that dies with its device costs no request", "[serve]") {
  const SmallModel model;
  const auto expected = Alone(model);
  const auto server = model.Serve(3, {"--slots-per-rank", "6", "--rank-timeout-ms", "0"});
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    const pid_t pid = server->RankPid(2);
    if (pid > 0) kill(pid, SIGKILL);
  });
  const auto during = IdsOf(CompleteAll(*server, Requests(), 3));
  killer.join();
  CHECK(during == expected);
  CHECK(server->AwaitState(2, "lost"));
  CHECK(IdsOf(CompleteAll(*server, Requests(), 3)) == expected);
  // Who leaves and comes back finds its place in the memory of others again.
  CHECK(server->Request("POST", "/v1/drain", R"({"rank": 1})").status == 202);
  CHECK(server->AwaitState(1, "left"));
  CHECK(IdsOf(CompleteAll(*server, Requests(), 3)) == expected);
  CHECK(server->Request("POST", "/v1/undrain", R"({"rank": 1})").status == 202);
  CHECK(server->AwaitState(1, "serves"));
  CHECK(IdsOf(CompleteAll(*server, Requests(), 3)) == expected);
  CHECK(server->Stop() == 0);
}

TEST_CASE("what a device cannot do is refused", "[serve][sanitized]") {
  const SmallModel model;
  const auto run = [&](std::vector<std::string> flags) {
    flags.insert(flags.begin(), {"serve", "--model", DemoModel(), "--device", "cuda"});
    return RunBallast(1, flags);
  };
  const Ended split = run({"--split", "even"});
  CHECK(split.code == 2);
  CHECK(split.err.find("--split is even, allowed with --device cuda: exact") != std::string::npos);
  const Ended memory = run({"--kv-bytes", "100gb"});
  CHECK(memory.code == 2);
  CHECK(memory.err.find("bytes of its device's memory, allowed: up to") != std::string::npos);
  const Ended plan = run({"--dry-run"});
  CHECK(plan.code == 0);
  CHECK(plan.out.find("rows of a step (--max-batch-tokens)") != std::string::npos);
}

}  // namespace
}  // namespace ballast::testing
