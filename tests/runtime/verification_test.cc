// What finds out that a rank no longer is what it should be: parameters that changed in memory,
// replicas chosen otherwise, reports that contradict each other.
#include "runtime/verification.h"

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "runtime/step_protocol.h"
#include "runtime/verifier.h"
#include "tests/support/cluster.h"
#include "tests/support/run_ranks.h"
#include "tests/support/store_checksum.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using nlohmann::json;
using testing::Cluster;
using testing::ClusterOptions;
using testing::FirstError;
using testing::RandomRequests;
using testing::TempFolder;
using testing::TinyModel;
using testing::WriteCheckpoint;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr size_t kBlock = 150'000;  // three pieces of a checksum

// A store of two layers of four experts, of which it holds six.
struct Held {
  Held()
      : fabric(1),
        transport(fabric.MakeTransport(0)),
        store({.rank = 0,
               .num_layers = 2,
               .num_experts = 4,
               .block_bytes = kBlock,
               .resident_blocks = 6,
               .staging_blocks = 0},
              transport.get()) {
    for (const auto& [layer, e] : kHeld) {
      size_t i = 0;
      for (std::byte& b : store.Allocate(layer, e)) {
        b = static_cast<std::byte>(RandomBits(static_cast<uint64_t>(layer * 4 + e), i++));
      }
      BALLAST_CHECK(store.Seal(layer, e).ok());
    }
  }
  static constexpr std::pair<int32_t, int32_t> kHeld[] = {{0, 0}, {0, 2}, {0, 3},
                                                          {1, 0}, {1, 1}, {1, 3}};
  LocalFabric fabric;
  std::unique_ptr<Transport> transport;
  ExpertStore store;
};

TEST_CASE("a pass reads every copy once, in order, a slice at a time", "[verifier]") {
  Held held;
  Verifier verifier({.num_layers = 2, .num_experts = 4, .slice_bytes = 64 << 10}, &held.store);
  CHECK(verifier.due_ns() == kNever);
  verifier.Advance(1);
  CHECK(verifier.copies_read() == 0);

  for (int pass = 1; pass <= 2; ++pass) {
    verifier.Ask();
    std::optional<std::vector<VerifiedCopy>> read;
    int slices = 0;
    for (; !read.has_value(); ++slices) {
      REQUIRE(slices < 100);
      verifier.Advance(slices);
      read = verifier.TakePass();
    }
    CHECK(slices >= 6 * 2);  // at most one piece of 64 KiB each, but for ends of copies
    REQUIRE(read->size() == std::size(Held::kHeld));
    for (size_t i = 0; i < read->size(); ++i) {
      const auto& [layer, e] = Held::kHeld[i];
      CHECK((*read)[i] == VerifiedCopy{layer, e, testing::ChecksumOf(held.store, layer, e),
                                       held.store.SealedChecksum(layer, e)});
      CHECK((*read)[i].found == (*read)[i].expected);
    }
    CHECK(verifier.copies_read() == 6 * pass);
    CHECK(!verifier.TakePass().has_value());
    CHECK(verifier.due_ns() == kNever);
  }
  CHECK(verifier.TakeCorrupted().empty());
}

TEST_CASE("one changed bit anywhere in a copy is found", "[verifier]") {
  Held held;
  Verifier verifier({.num_layers = 2, .num_experts = 4, .slice_bytes = 1 << 20}, &held.store);
  for (const size_t at : {size_t{0}, size_t{65'535}, size_t{65'536}, kBlock - 1}) {
    const std::span<std::byte> block = held.store.Allocate(1, 1);
    block[at] ^= std::byte{4};
    verifier.Ask();
    for (int i = 0; i < 10; ++i) verifier.Advance(i);
    const std::vector<VerifiedCopy> corrupted = verifier.TakeCorrupted();
    REQUIRE(corrupted.size() == 1);
    CHECK(corrupted[0].layer == 1);
    CHECK(corrupted[0].expert == 1);
    CHECK(corrupted[0].found != corrupted[0].expected);
    CHECK(verifier.TakeCorrupted().empty());
    block[at] ^= std::byte{4};
  }
}

TEST_CASE("in the background a pass takes its period", "[verifier]") {
  Held held;
  constexpr int64_t kPeriod = 1'000'000;
  Verifier verifier({.num_layers = 2, .num_experts = 4, .period_ns = kPeriod}, &held.store);
  int64_t now = 0;
  while (verifier.copies_read() < 6) {
    verifier.Advance(now);
    REQUIRE(verifier.due_ns() > now);
    verifier.Advance(verifier.due_ns() - 1);  // not due yet: nothing is read
    now = verifier.due_ns();
  }
  // Copies end in slices of their own, which adds up to a third here.
  CHECK(now > kPeriod * 8 / 10);
  CHECK(now < kPeriod * 15 / 10);
}

TEST_CASE("a member that chose other replicas than most is told apart by all", "[step_protocol]") {
  SetLogLevel(LogLevel::kError);
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(4, 1), false);
  const auto open = [&](std::vector<uint64_t> hashes, int32_t member) {
    Held held;
    std::vector<StepHeader> headers;
    Rebalancer rebalancer({}, &held.store, placement);
    StepProtocol protocol(member, 7, &rebalancer);
    const StepHeader mine = protocol.Begin({.choice_hash = hashes[static_cast<size_t>(member)]});
    CHECK(mine.choice_hash == hashes[static_cast<size_t>(member)]);
    for (const uint64_t hash : hashes) {
      headers.push_back(mine);
      headers.back().choice_hash = hash;
    }
    return protocol.Open(headers, 0);
  };
  for (int32_t member = 0; member < 4; ++member) {
    CAPTURE(member);
    CHECK(open({5, 5, 5, 5}, member)->num_dissenters == 0);
    const auto third = open({5, 5, 6, 5}, member);
    CHECK(third.ok() == (member != 2));
    if (third.ok()) CHECK(third->num_dissenters == 1);
    if (!third.ok()) {
      CHECK(third.status().code() == absl::StatusCode::kInternal);
      CHECK(third.status().message() ==
            "member 2 chose other replicas in step 7 than the others: it can no longer be trusted");
    }
    CHECK(open({9, 5, 5, 5}, member).ok() == (member != 0));
    CHECK(open({9, 9, 5, 5}, member).ok() == (member < 2));  // a tie: as the leader
  }
}

std::map<int, VerifiedFrame> SoundReports() {
  std::map<int, VerifiedFrame> reports;
  for (int rank : {0, 1, 3}) {
    reports[rank] = {.id = 1,
                     .step = 10,
                     .epoch = 4,
                     .fingerprint = 77,
                     .fault = {},
                     .copies = {{0, rank, 100u + static_cast<uint64_t>(rank),
                                 100u + static_cast<uint64_t>(rank)},
                                {1, 2, 50, 50}}};
  }
  return reports;
}

TEST_CASE("reports that contradict each other are findings", "[verification]") {
  CHECK(Compare({}).empty());
  CHECK(Compare(SoundReports()).empty());
  std::map<int, VerifiedFrame> reports = SoundReports();
  SECTION("a copy that changed") {
    reports[1].copies[1].found = 51;
    CHECK(Compare(reports) ==
          std::vector<std::string>{"layer 1, expert 2 on rank 1 has checksum 0000000000000033, it "
                                   "was packed with 0000000000000032"});
  }
  SECTION("copies of one expert that were packed otherwise") {
    reports[3].copies[1] = {1, 2, 51, 51};
    CHECK(Compare(reports) ==
          std::vector<std::string>{"layer 1, expert 2 on rank 3 was packed with 0000000000000033, "
                                   "on rank 0 with 0000000000000032"});
  }
  SECTION("placements that differ under one epoch") {
    reports[3].fingerprint = 78;
    CHECK(Compare(reports) ==
          std::vector<std::string>{"epoch 4: rank 3 has placement 000000000000004e, rank 0 "
                                   "000000000000004d"});
    reports[3].epoch = 5;  // it has flipped in between: that is no contradiction
    CHECK(Compare(reports).empty());
  }
  SECTION("tables that a rank finds wrong") {
    reports[0].fault = {std::byte{'x'}, std::byte{'y'}};
    CHECK(Compare(reports) == std::vector<std::string>{"rank 0: xy"});
  }
}

VerifiedFrame ReportOf(uint64_t id) {
  VerifiedFrame report;
  report.id = id;
  return report;
}

TEST_CASE("a rank that does not answer is a finding, one that is lost is not", "[verification]") {
  std::vector<int> serving = {0, 2};
  Verification* desk = nullptr;
  Verification verification({.timeout_ms = 50,
                             .ask =
                                 [&](uint64_t id) {
                                   desk->OnVerified(0, ReportOf(id - 1));  // too late for another
                                   desk->OnVerified(0, ReportOf(id));
                                   return absl::OkStatus();
                                 },
                             .serving = [&] { return serving; }});
  desk = &verification;
  auto answer = verification.Run();
  REQUIRE(answer.ok());
  json parsed = json::parse(*answer);
  CHECK(parsed["ok"] == false);
  CHECK(parsed["findings"] == json::array({"rank 2 did not answer within 50 ms"}));
  CHECK(parsed["ranks"].size() == 1);

  serving = {0};
  answer = verification.Run();
  REQUIRE(answer.ok());
  CHECK(json::parse(*answer)["ok"] == true);
}

// It has not heard the question.
TEST_CASE("a rank that comes while the others verify need not answer", "[verification]") {
  std::atomic<int> looks = 0;
  Verification* desk = nullptr;
  std::vector<std::vector<int>> serving;  // at each look; then as at the last
  Verification verification({.timeout_ms = 2000,
                             .ask =
                                 [&](uint64_t id) {
                                   desk->OnVerified(0, ReportOf(id));
                                   return absl::OkStatus();
                                 },
                             .serving =
                                 [&] {
                                   const auto look = static_cast<size_t>(looks++);
                                   return serving[std::min(look, serving.size() - 1)];
                                 }});
  desk = &verification;
  SECTION("it comes") {
    serving = {{0}, {0, 2}};
  }
  SECTION("it leaves and comes back") {
    // Rank 1 is what the check waits for meanwhile.
    serving = {{0, 1, 2}, {0, 1}, {0, 1, 2}, {0, 2}};
  }
  const auto answer = verification.Run();
  REQUIRE(answer.ok());
  INFO(*answer);
  CHECK(json::parse(*answer)["ok"] == true);
}

TEST_CASE("those who come while a check is under way share its answer", "[verification]") {
  constexpr int kRefused = 3;
  std::atomic<int> asked = 0, refused = 0, right = 0;
  std::atomic<uint64_t> id = 0;
  Verification verification({.ask =
                                 [&](uint64_t check) {
                                   ++asked;
                                   id = check;
                                   return absl::OkStatus();
                                 },
                             .serving = [] { return std::vector<int>{0}; }});
  std::vector<std::thread> callers;
  for (int i = 0; i < 1 + Verification::kMostWaiting + kRefused; ++i) {
    callers.emplace_back([&] {
      const auto answer = verification.Run();
      right += answer.ok() && json::parse(*answer)["ranks"][0]["step"] == 77;
      refused += absl::IsResourceExhausted(answer.status());
    });
  }
  while (refused < kRefused) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  VerifiedFrame report = ReportOf(id);
  report.step = 77;
  verification.OnVerified(0, report);
  for (std::thread& caller : callers) caller.join();
  CHECK(asked == 1);
  CHECK(refused == kRefused);
  CHECK(right == 1 + Verification::kMostWaiting);
}

// ---- a whole server
// ------------------------------------------------------------------------------

std::unique_ptr<Cluster> Start(const std::string& folder, int ranks, int64_t period_ms = 0) {
  WriteCheckpoint(folder, TinyModel{});
  auto cluster = Cluster::Start({.model = folder,
                                 .num_ranks = ranks,
                                 .policy = "eplb",
                                 .rebalance_every = 20,
                                 .verify_period_ms = period_ms});
  REQUIRE(cluster.ok());
  return *std::move(cluster);
}

json Verify(Cluster* cluster) {
  const auto answer = cluster->Verify();
  INFO(answer.status().message());
  REQUIRE(answer.ok());
  INFO(*answer);
  return json::parse(*answer);
}

TEST_CASE("a server that moves experts verifies, under load and at rest",
          "[verification][cluster]") {
  SetLogLevel(LogLevel::kWarning);
  TempFolder folder;
  const auto cluster = Start(folder.path(), 3);
  json answer = Verify(cluster.get());
  CHECK(answer["ok"] == true);
  // Two layers of ten experts: four each on two ranks, two on the third, and its spare slots.
  CHECK(answer["copies"].get<int>() >= 2 * 10);
  CHECK(answer["ranks"].size() == 3);

  std::atomic<bool> done = false;
  std::atomic<int> rounds = 0, faults = 0;
  std::thread verifies([&] {
    while (!done) {
      const auto round = cluster->Verify();
      faults += !round.ok() || json::parse(*round)["ok"] != true;
      ++rounds;
    }
  });
  const auto replies = cluster->Generate(RandomRequests(24, TinyModel{}.vocab, 60, 24, 1.0, 5));
  done = true;
  verifies.join();
  CHECK(replies.ok());
  CHECK(rounds > 0);
  CHECK(faults == 0);
  CHECK(cluster->flips() > 0);
  CHECK(FirstError(cluster->Stop()) == "");
}

TEST_CASE("ranks that leave and come back verify", "[verification][cluster]") {
  SetLogLevel(LogLevel::kOff);
  TempFolder folder;
  WriteCheckpoint(folder.path(), TinyModel{});
  auto started = Cluster::Start({.model = folder.path(), .num_ranks = 3, .survive_losses = true});
  REQUIRE(started.ok());
  Cluster& cluster = **started;
  for (int round = 0; round < 5; ++round) {
    REQUIRE(cluster.frontend().BeginLeaving(1).ok());
    REQUIRE(cluster.frontend().Leave(1).ok());
    REQUIRE(cluster.AwaitMembers(2));
    REQUIRE(Verify(&cluster)["ranks"].size() == 2);
    REQUIRE(cluster.frontend().Return(1).ok());
    // It is about to come, and hears the question.
    const json answer = Verify(&cluster);
    CHECK(answer["ok"] == true);
    CHECK(answer["ranks"].size() == 3);
    REQUIRE(cluster.AwaitMembers(3));
  }
  CHECK(FirstError(cluster.Stop()) == "");
  SetLogLevel(LogLevel::kWarning);
}

TEST_CASE("parameters that change in memory are found, named and read again",
          "[verification][cluster]") {
  SetLogLevel(LogLevel::kOff);
  TempFolder folder;
  const auto requests = RandomRequests(8, TinyModel{}.vocab, 40, 16, 1.0, 6);
  const auto cluster = Start(folder.path(), 2);
  const auto before = cluster->Generate(requests);
  REQUIRE(before.ok());
  REQUIRE(Verify(cluster.get())["ok"] == true);

  // A stray write on rank 0, while all ranks are at rest.
  const ExpertStore& store = cluster->store(0);
  int32_t e = 0;
  while (store.Parameters(1, e) == nullptr) ++e;
  const_cast<std::byte&>(store.Parameters(1, e)[100]) ^= std::byte{1};
  json answer = Verify(cluster.get());
  CHECK(answer["ok"] == false);
  REQUIRE(answer["findings"].size() == 1);
  const std::string finding = answer["findings"][0];
  CHECK(finding.find("layer 1, expert " + std::to_string(e) + " on rank 0 has checksum") == 0);
  CHECK(
      cluster->Metrics().find("ballast_verify_failures_total{rank=\"0\",what=\"parameters\"} 1") !=
      std::string::npos);

  // It was repaired.
  CHECK(Verify(cluster.get())["ok"] == true);
  const auto after = cluster->Generate(requests);
  REQUIRE(after.ok());
  CHECK(*after == *before);
  CHECK(FirstError(cluster->Stop()) == "");
  SetLogLevel(LogLevel::kWarning);
}

TEST_CASE("parameters are read again in the background, also at rest", "[verification][cluster]") {
  SetLogLevel(LogLevel::kWarning);
  TempFolder folder;
  const auto cluster = Start(folder.path(), 2, /*period_ms=*/20);
  const auto verified = [&] {
    const std::string text = cluster->Metrics();
    const std::string name = "\nballast_copies_verified_total{rank=\"0\"} ";
    const size_t at = text.find(name);
    return at == std::string::npos ? -1.0 : std::stod(text.substr(at + name.size()));
  };
  for (int i = 0; i < 3000 && verified() < 100; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK(verified() >= 100);
  CHECK(cluster->Generate(RandomRequests(4, TinyModel{}.vocab, 40, 16, 1.0, 6)).ok());
  CHECK(FirstError(cluster->Stop()) == "");
}

}  // namespace
}  // namespace ballast
