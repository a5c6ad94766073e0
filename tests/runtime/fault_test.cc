// Faults injected one at a time into a whole server: each ends in an abort or a retry that is
// logged and counted, and every request gets its right answer. Faults of the controller are in
// leader_watch_test.cc, those of the disk of the state file in server_state_test.cc.
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/file.h"
#include "base/log.h"
#include "placement/policy.h"
#include "tests/support/cluster.h"
#include "tests/support/run_ranks.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::Cluster;
using testing::ClusterOptions;
using testing::FirstError;
using testing::RandomRequests;
using testing::Reply;
using testing::TempFolder;
using testing::TinyModel;
using testing::WriteCheckpoint;

constexpr int kRanks = 3;

// A server that plans only when it is told to, some requests, and what a rank alone answers.
class Faulty {
 public:
  explicit Faulty(ClusterOptions options = {}) {
    SetLogLevel(LogLevel::kOff);
    WriteCheckpoint(folder.path(), TinyModel{});
    options.model = folder.path();
    auto alone = Cluster::Start({.model = folder.path()});
    REQUIRE(alone.ok());
    reference = *(*alone)->Generate(requests);
    REQUIRE(FirstError((*alone)->Stop()) == "");
    options.num_ranks = kRanks;
    options.policy = "eplb";
    options.min_gain = 100.0;
    options.backoff_steps = 0;
    auto started = Cluster::Start(options);
    REQUIRE(started.ok());
    cluster = *std::move(started);
  }
  ~Faulty() { SetLogLevel(LogLevel::kInfo); }

  // Serves all requests; whether every answer is right.
  bool ServesRight() {
    const auto replies = cluster->Generate(requests);
    return replies.ok() && *replies == reference;
  }
  // Asks for plans until one has come to its end, while requests are served. Whether the answers
  // are right.
  bool ServeUntilPlanEnds() {
    const int64_t ended = cluster->flips() + cluster->aborts() + cluster->regroupings();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < deadline) {
      cluster->leader().Rebalance();
      if (!ServesRight()) return false;
      if (cluster->flips() + cluster->aborts() + cluster->regroupings() > ended) return true;
    }
    return false;
  }
  double Counted(const std::string& sample) const {
    const std::string text = cluster->Metrics();
    const size_t at = text.find("\n" + sample + " ");
    return at == std::string::npos ? -1 : std::stod(text.substr(at + sample.size() + 2));
  }
  double Aborts(const std::string& trigger = "manual") const {
    return Counted("ballast_rebalances_total{rank=\"0\",result=\"aborted\",trigger=\"" + trigger +
                   "\"}");
  }

  TempFolder folder;
  std::vector<GenerationRequest> requests = RandomRequests(6, TinyModel{}.vocab, 40, 10, 1.0, 11);
  std::vector<Reply> reference;
  std::unique_ptr<Cluster> cluster;
};

TEST_CASE("a corrupted chunk is an abort, and the next plan commits", "[fault][cluster]") {
  Faulty server;
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->CorruptCopies(rank, 1);
  REQUIRE(server.ServeUntilPlanEnds());
  CHECK(server.cluster->flips() == 0);
  CHECK(server.cluster->aborts() == 1);
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->CorruptCopies(rank, 0);
  REQUIRE(server.ServeUntilPlanEnds());
  CHECK(server.cluster->flips() == 1);
  CHECK(nlohmann::json::parse(*server.cluster->Verify())["ok"] == true);
  CHECK(FirstError(server.cluster->Stop()) == "");
  CHECK(server.Aborts() == 1);
}

// What is lost is the vote that would have followed it: the plan's deadline passes. Its messages
// can never be complete again, so the ranks begin a generation of their own.
TEST_CASE("a vote that never comes is an abort, and the next plan commits", "[fault][cluster]") {
  Faulty server({.model = "", .plan_deadline_ms = 1500, .step_timeout_ms = 5000});
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->LoseCopies(rank, 1);
  const auto began = std::chrono::steady_clock::now();
  REQUIRE(server.ServeUntilPlanEnds());
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->LoseCopies(rank, 0);
  while (server.cluster->regroupings() == 0) {
    REQUIRE(server.ServesRight());
    REQUIRE(std::chrono::steady_clock::now() - began < std::chrono::seconds(30));
  }
  CHECK(server.cluster->flips() == 0);
  while (server.Aborts("failure") < 1) {  // counted a moment later
    REQUIRE(std::chrono::steady_clock::now() - began < std::chrono::seconds(60));
  }
  CHECK(server.cluster->AwaitMembers(kRanks));  // nobody was lost over it
  REQUIRE(server.ServeUntilPlanEnds());
  CHECK(server.cluster->flips() == 1);
  CHECK(FirstError(server.cluster->Stop()) == "");
}

TEST_CASE("a slow rank slows the others and nothing else", "[fault][cluster]") {
  Faulty server;
  server.cluster->SlowDown(1, /*us_per_message=*/2000);
  REQUIRE(server.ServeUntilPlanEnds());
  CHECK(server.cluster->flips() + server.cluster->aborts() == 1);
  server.cluster->SlowDown(1, 0);
  REQUIRE(server.ServesRight());
  CHECK(server.cluster->regroupings() == 0);
  CHECK(FirstError(server.cluster->Stop()) == "");
}

// Every rank takes over what the one before it has.
class TurningPlanner : public LayerPlanner {
 public:
  explicit TurningPlanner(std::span<const int32_t> row) { Adopt(row); }
  void OnBatch(std::span<const int32_t>, TokenKind, float) override {}
  void Adopt(std::span<const int32_t> row) override { row_ = {row.begin(), row.end()}; }
  std::optional<std::vector<int32_t>> Plan(const Input&) override {
    std::vector<int32_t> row = row_;
    std::rotate(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(row.size()) / kRanks,
                row.end());
    return row;
  }

 private:
  std::vector<int32_t> row_;
};

class TurningPolicy : public Policy {
 public:
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    return std::make_unique<TurningPlanner>(context.initial.expert_of_slot(layer));
  }
};

TEST_CASE("a plan that staging memory does not allow is an abort on all ranks",
          "[fault][cluster]") {
  Faulty server({.model = "",
                 .slots_per_rank = 4,
                 .staging_experts = 4,
                 .make_controller = [](ControllerOptions options, Placement initial) {
                   return Controller::CreateWith(std::make_unique<TurningPolicy>(), options,
                                                 std::move(initial));
                 }});
  REQUIRE(server.ServeUntilPlanEnds());
  CHECK(server.cluster->flips() == 0);
  CHECK(server.cluster->aborts() == 1);
  REQUIRE(server.ServesRight());
  CHECK(FirstError(server.cluster->Stop()) == "");
  CHECK(server.Aborts() == 1);
}

// In place: a new file would not be the one that is open.
void Overwrite(const std::string& path, const std::string& bytes) {
  FILE* const f = std::fopen(path.c_str(), "r+");
  REQUIRE(f != nullptr);
  std::fwrite(bytes.data(), 1, bytes.size(), f);
  std::fclose(f);
}

TEST_CASE("a checkpoint that was overwritten is not taken for the one that was loaded",
          "[fault][cluster]") {
  Faulty server({.model = "", .retry_from_file = true});
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->CorruptCopies(rank, 1);
  REQUIRE(server.ServeUntilPlanEnds());
  REQUIRE(server.cluster->aborts() == 1);
  for (int rank = 0; rank < kRanks; ++rank) server.cluster->CorruptCopies(rank, 0);
  TempFolder folder;  // a model of the same shape
  WriteCheckpoint(folder.path(), TinyModel{.seed = 2});
  Overwrite(server.folder.path() + "/model.safetensors",
            *ReadFile(folder.path() + "/model.safetensors"));
  REQUIRE(server.ServeUntilPlanEnds());  // from the file
  CHECK(server.cluster->flips() == 0);
  CHECK(server.cluster->aborts() == 2);
  REQUIRE(server.ServeUntilPlanEnds());  // from ranks again
  CHECK(server.cluster->flips() == 1);
  CHECK(server.ServesRight());
  CHECK(nlohmann::json::parse(*server.cluster->Verify())["ok"] == true);
  CHECK(FirstError(server.cluster->Stop()) == "");
}

// No pass of verification is due: the abort is what makes the source look.
TEST_CASE("a source whose memory is damaged finds it out by the abort", "[fault][cluster]") {
  Faulty server({.model = "",
                 .slots_per_rank = 4,
                 .make_controller = [](ControllerOptions options, Placement initial) {
                   return Controller::CreateWith(std::make_unique<TurningPolicy>(), options,
                                                 std::move(initial));
                 }});
  REQUIRE(server.ServesRight());  // a plan needs load
  const ExpertStore& store = server.cluster->store(0);
  for (int32_t e = 0; e < TinyModel{}.num_experts; ++e) {
    if (store.Parameters(0, e) == nullptr) continue;
    const_cast<std::byte&>(store.Parameters(0, e)[100]) ^= std::byte{1};
  }
  const std::string found = "ballast_verify_failures_total{rank=\"0\",what=\"parameters\"}";
  REQUIRE(server.Counted(found) == 0);
  for (int i = 0; i < 6000 && server.Counted(found) < 1; ++i) {
    server.cluster->leader().Rebalance();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK(server.cluster->aborts() > 0);
  CHECK(server.cluster->flips() == 0);
  CHECK(server.Counted(found) >= 1);
  CHECK(nlohmann::json::parse(*server.cluster->Verify()).contains("ok"));  // all is read by then
  CHECK(nlohmann::json::parse(*server.cluster->Verify())["ok"] == true);
  CHECK(server.ServesRight());
  CHECK(FirstError(server.cluster->Stop()) == "");
}

// Rank 0 has found that its memory is damaged and tries to read the expert again when another rank
// dies: the ranks begin anew, and what is damaged must not be part of it.
TEST_CASE("damage that is being mended when a rank dies does not serve", "[fault][cluster]") {
  Faulty server({.model = "", .survive_losses = true});
  const ExpertStore& store = server.cluster->store(0);
  for (int32_t e = 0; e < TinyModel{}.num_experts; ++e) {
    if (store.Parameters(0, e) == nullptr) continue;
    for (size_t at = 0; at < 400; ++at) {
      const_cast<std::byte&>(store.Parameters(0, e)[at]) ^= std::byte{1};
    }
  }
  const std::string file = server.folder.path() + "/model.safetensors";
  const std::string whole = *ReadFile(file);
  REQUIRE(truncate(file.c_str(), 1000) == 0);
  std::thread check([&] { server.cluster->Verify().IgnoreError(); });
  while (server.Counted("ballast_verify_failures_total{rank=\"0\",what=\"checkpoint\"}") < 2) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  server.cluster->Kill(2);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  Overwrite(file, whole);
  CHECK(server.ServesRight());
  CHECK(server.cluster->AwaitMembers(kRanks - 1));
  check.join();
  CHECK(nlohmann::json::parse(*server.cluster->Verify())["ok"] == true);
  const auto statuses = server.cluster->Stop();
  CHECK(statuses[0].ok());
  CHECK(statuses[1].ok());
}

TEST_CASE("a checkpoint that cannot be read for a while is read later", "[fault][cluster]") {
  Faulty server({.model = "", .survive_losses = true});
  const std::string file = server.folder.path() + "/model.safetensors";
  const std::string whole = *ReadFile(file);
  REQUIRE(truncate(file.c_str(), 1000) == 0);
  // Experts that only rank 2 held have to be read, by those that are left.
  server.cluster->Kill(2);
  std::thread restore([&] {
    while (server.Counted("ballast_verify_failures_total{rank=\"0\",what=\"checkpoint\"}") < 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    Overwrite(file, whole);
  });
  const bool right = server.ServesRight();
  restore.join();
  CHECK(right);
  CHECK(server.cluster->AwaitMembers(kRanks - 1));
  CHECK(server.cluster->reloads() > 0);
  CHECK(nlohmann::json::parse(*server.cluster->Verify())["ok"] == true);
  const auto statuses = server.cluster->Stop();
  CHECK(statuses[0].ok());
  CHECK(statuses[1].ok());
}

}  // namespace
}  // namespace ballast
