// What clients see when ranks are lost, leave and come back: nothing.
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "base/log.h"
#include "base/random.h"
#include "tests/support/cluster.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::Cluster;
using testing::ClusterOptions;
using testing::RandomRequests;
using testing::Reply;
using testing::TempFolder;
using testing::TinyModel;
using testing::WriteCheckpoint;

// A model, requests, and what a server of one rank that is never disturbed answers.
struct Reference {
  explicit Reference(int count) {
    SetLogLevel(LogLevel::kError);
    WriteCheckpoint(folder.path(), TinyModel{});
    requests = RandomRequests(count, TinyModel{}.vocab, /*longest_prompt=*/100, /*max_tokens=*/24,
                              /*temperature=*/1.0, /*seed=*/11);
    auto cluster = Cluster::Start({.model = folder.path()});
    REQUIRE(cluster.ok());
    auto answered = (*cluster)->Generate(requests);
    REQUIRE(answered.ok());
    replies = *answered;
  }
  TempFolder folder;
  std::vector<GenerationRequest> requests;
  std::vector<Reply> replies;
};

TEST_CASE("every answer is whole and right when ranks die at any message", "[runtime][loss]") {
  const Reference reference(24);
  Random random(5);
  int64_t regroupings = 0, reloads = 0;
  for (int trial = 0; trial < 12; ++trial) {
    const int ranks = 2 + static_cast<int>(random.Below(3));
    const int deaths = 1 + static_cast<int>(random.Below(static_cast<uint32_t>(ranks - 1)));
    CAPTURE(trial, ranks, deaths);
    auto cluster = Cluster::Start({.model = reference.folder.path(),
                                   .num_ranks = ranks,
                                   .policy = "regret",
                                   .rebalance_every = trial % 2 == 0 ? 5 : 0,
                                   .survive_losses = true});
    REQUIRE(cluster.ok());
    // The highest ranks die, one or several at about the same time.
    const int64_t when = random.Below(1500);
    for (int i = 0; i < deaths; ++i) (*cluster)->Kill(ranks - 1 - i, when + random.Below(40));
    const auto replies = (*cluster)->Generate(reference.requests);
    REQUIRE(replies.ok());
    REQUIRE(*replies == reference.replies);
    (*cluster)->Stop();
    regroupings += (*cluster)->regroupings();
    reloads += (*cluster)->reloads();
  }
  // Some of them died while they were at work.
  REQUIRE(regroupings >= 2);
  REQUIRE(reloads > 0);
}

TEST_CASE("a rank that leaves and comes back is not noticed", "[runtime][loss]") {
  const Reference reference(16);
  auto cluster = Cluster::Start({.model = reference.folder.path(),
                                 .num_ranks = 3,
                                 .policy = "regret",
                                 .rebalance_every = 5,
                                 .survive_losses = true});
  REQUIRE(cluster.ok());
  for (int round = 0; round < 3; ++round) {
    // Catch2's assertions are not thread-safe: the operator records.
    bool left = false, left_twice = false, two = false, returned = false, three = false;
    std::thread operator_thread([&] {
      Frontend& frontend = (*cluster)->frontend();
      left = frontend.BeginLeaving(1).ok() && frontend.Leave(1).ok();
      left_twice = frontend.BeginLeaving(1).ok() || frontend.Leave(1).ok();
      two = (*cluster)->AwaitMembers(2);
      returned = frontend.Return(1).ok();
      three = (*cluster)->AwaitMembers(3);
    });
    const auto replies = (*cluster)->Generate(reference.requests);
    operator_thread.join();
    REQUIRE(left);
    REQUIRE_FALSE(left_twice);
    REQUIRE(two);
    REQUIRE(returned);
    REQUIRE(three);
    REQUIRE(replies.ok());
    REQUIRE(*replies == reference.replies);
  }
  REQUIRE((*cluster)->regroupings() == 6);
  for (const absl::Status& status : (*cluster)->Stop()) REQUIRE(status.ok());
}

TEST_CASE("a rank that dies over the stop holds nobody up", "[runtime][loss]") {
  SetLogLevel(LogLevel::kOff);
  const Reference reference(2);
  for (int64_t messages = 0; messages <= 12; ++messages) {
    CAPTURE(messages);
    auto cluster = Cluster::Start({.model = reference.folder.path(),
                                   .num_ranks = 3,
                                   .survive_losses = true,
                                   .step_timeout_ms = 2000});
    REQUIRE(cluster.ok());
    REQUIRE(*(*cluster)->Generate(reference.requests) == reference.replies);
    (*cluster)->Kill(2, messages);
    const auto began = std::chrono::steady_clock::now();
    const std::vector<absl::Status> statuses = (*cluster)->Stop();
    CHECK(statuses[0].ok());
    CHECK(statuses[1].ok());
    // They wait for it for one step's deadline, and not for the minute of EngineOptions in vain.
    CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(20));
  }
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("a stop while the ranks regroup ends all of them", "[runtime][loss]") {
  SetLogLevel(LogLevel::kOff);
  const Reference reference(1);
  for (const bool returns : {false, true}) {
    CAPTURE(returns);
    auto cluster =
        Cluster::Start({.model = reference.folder.path(), .num_ranks = 3, .survive_losses = true});
    REQUIRE(cluster.ok());
    Frontend& frontend = (*cluster)->frontend();
    REQUIRE(frontend.BeginLeaving(2).ok());
    REQUIRE(frontend.Leave(2).ok());
    if (returns) {
      REQUIRE((*cluster)->AwaitMembers(2));
      REQUIRE(frontend.Return(2).ok());
    }
    const auto began = std::chrono::steady_clock::now();
    for (const absl::Status& status : (*cluster)->Stop()) CHECK(status.ok());
    // The deadlines are a minute.
    CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(20));
  }
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("only ranks that can leave may leave", "[runtime][loss][errors]") {
  const Reference reference(1);
  auto cluster =
      Cluster::Start({.model = reference.folder.path(), .num_ranks = 3, .survive_losses = true});
  REQUIRE(cluster.ok());
  Frontend& frontend = (*cluster)->frontend();
  REQUIRE(absl::IsInvalidArgument(frontend.Leave(0)));
  REQUIRE(absl::IsInvalidArgument(frontend.Leave(3)));
  REQUIRE(absl::IsFailedPrecondition(frontend.Return(1)));
  (*cluster)->Kill(2);
  REQUIRE((*cluster)->AwaitMembers(2));
  REQUIRE(absl::IsFailedPrecondition(frontend.Leave(2)));
  REQUIRE(absl::IsFailedPrecondition(frontend.Return(2)));
  using State = Frontend::RankState;
  REQUIRE(frontend.rank_states() ==
          std::vector<State>{State::kServes, State::kServes, State::kLost});
  // A departure that is called off does not take place.
  REQUIRE(absl::IsFailedPrecondition(frontend.Leave(1)));
  REQUIRE(frontend.BeginLeaving(1).ok());
  REQUIRE(absl::IsFailedPrecondition(frontend.BeginLeaving(1)));
  REQUIRE(frontend.rank_states()[1] == State::kLeaving);
  REQUIRE(frontend.Return(1).ok());
  REQUIRE(frontend.rank_states()[1] == State::kServes);
  REQUIRE(absl::IsFailedPrecondition(frontend.Leave(1)));
  REQUIRE(frontend.BeginLeaving(1).ok());
  REQUIRE(frontend.Leave(1).ok());
  REQUIRE((*cluster)->AwaitMembers(1));
  const auto replies = (*cluster)->Generate(reference.requests);
  REQUIRE(replies.ok());
  REQUIRE(*replies == reference.replies);
}

}  // namespace
}  // namespace ballast
