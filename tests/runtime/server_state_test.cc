#include "runtime/server_state.h"

#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <filesystem>

#include "base/file.h"
#include "base/log.h"
#include "tests/support/temp_folder.h"

namespace ballast {
namespace {

using testing::TempFolder;

ServerState Sample() {
  return {.model = "tiny \"x\"",
          .rules = {.coverage = 1, .node_local = false},
          .placement = *Placement::Create(2, 3, Topology::Uniform(2, 2, 2),
                                          {0, 1, 2, 0, 0, 1, 2, kNoExpert}, 17),
          .window_tokens = 40,
          .window_load = {10, 20, 30, 5, 0, 55}};
}

bool Same(const ServerState& a, const ServerState& b) {
  return a.model == b.model && a.rules.coverage == b.rules.coverage &&
         a.rules.node_local == b.rules.node_local && a.placement == b.placement &&
         a.placement.epoch() == b.placement.epoch() && a.window_tokens == b.window_tokens &&
         a.window_load == b.window_load;
}

TEST_CASE("a state survives its file", "[state]") {
  const auto again = ParseServerState(ToJson(Sample()));
  INFO(again.status().message());
  REQUIRE(again.ok());
  CHECK(Same(*again, Sample()));
}

TEST_CASE("a load beyond 32 bits survives its file", "[state]") {
  ServerState state = Sample();
  state.window_tokens = int64_t{1} << 40;
  state.window_load[1] = int64_t{5} << 40;
  const auto again = ParseServerState(ToJson(state));
  INFO(again.status().message());
  REQUIRE(again.ok());
  CHECK(Same(*again, state));
  state.window_load[1] = int64_t{1} << 51;
  CHECK(ParseServerState(ToJson(state)).status().message() ==
        "state: window_load: allowed: a row of 3 counts per layer, each from 0 to "
        "1125899906842624");
}

TEST_CASE("a file that is no state is refused with its key", "[state]") {
  const std::string good = ToJson(Sample());
  const auto fault = [&](const std::string& from, const std::string& to) {
    std::string bad = good;
    const size_t at = bad.find(from);
    REQUIRE(at != std::string::npos);
    bad.replace(at, from.size(), to);
    const auto parsed = ParseServerState(bad);
    REQUIRE(!parsed.ok());
    CHECK(parsed.status().code() == absl::StatusCode::kInvalidArgument);
    return std::string(parsed.status().message());
  };
  CHECK(fault("\"schema\":1", "\"schema\":2") == "state: schema: allowed: 1");
  CHECK(fault("\"model\":\"tiny", "\"model\":7,\"more\":\"tiny") == "state: unknown key 'more'");
  CHECK(fault("\"coverage\":1", "\"coverage\":-1") ==
        "state: coverage: allowed: an integer from 0 to 1");
  CHECK(fault("\"node_local\":false", "\"node_local\":0") ==
        "state: node_local: allowed: true, false");
  CHECK(fault("\"window_tokens\":40", "\"window_tokens\":1e3").find("window_tokens") !=
        std::string::npos);
  CHECK(fault("[10,20,30]", "[10,20]").find("a row of 3 counts") != std::string::npos);
  CHECK(fault("[10,20,30]", "[10,20,-3]").find("a row of 3 counts") != std::string::npos);
  CHECK(fault("\"epoch\":17", "\"epoch\":-1").find("epoch") != std::string::npos);
  for (size_t length = 0; length < good.size(); length += 7) {
    CHECK(!ParseServerState(good.substr(0, length)).ok());
  }
  CHECK(!ParseServerState(std::string(100'000, '[')).ok());
}

TEST_CASE("a state that does not fit says why", "[state]") {
  const ServerState state = Sample();
  CHECK(CheckFits(state, state).ok());
  ServerState fresh = Sample();
  std::string why;
  SECTION("another model") {
    fresh.model = "large";
    why = "it is of model tiny \"x\", this is large";
  }
  SECTION("another shape") {
    fresh.placement = *Placement::Contiguous(2, 4, Topology::Uniform(2, 2, 2), false);
    why = "it has 2 layers of 3 experts, the model has 2 of 4";
  }
  SECTION("other ranks") {
    fresh.placement = *Placement::Contiguous(2, 3, Topology::Uniform(4, 2, 2), false);
    why = "it is of 2 ranks, here are 4";
  }
  SECTION("other slots") {
    fresh.placement = *Placement::Contiguous(2, 3, Topology::Uniform(2, 3, 2), false);
    why = "rank 0 had 2 slots, it now has 3";
  }
  SECTION("other nodes") {
    fresh.placement = *Placement::Contiguous(2, 3, Topology::Uniform(2, 2), false);
    why = "rank 1 was on node 1, it now is on node 0";
  }
  SECTION("a rule that it does not keep") {
    fresh.rules.node_local = true;
    why = "it was made without --node-local";
  }
  const absl::Status status = CheckFits(state, fresh);
  CHECK(status.code() == absl::StatusCode::kFailedPrecondition);
  CHECK(status.message() == why);
}

TEST_CASE("fewer rules than the state keeps are no reason to start afresh", "[state]") {
  ServerState fresh = Sample();
  fresh.rules = {};
  CHECK(CheckFits(Sample(), fresh).ok());
}

TEST_CASE("the keeper writes what is new, and at the end", "[state]") {
  TempFolder folder;
  const std::string path = folder.path() + "/state.json";
  std::atomic<int> written = 0;
  std::mutex mutex;
  auto now = std::make_shared<ServerState>(Sample());
  const auto replace = [&](int64_t tokens) {
    auto next = std::make_shared<ServerState>(Sample());
    next->window_tokens = tokens;
    const std::lock_guard lock(mutex);
    now = next;
  };
  {
    StateKeeper keeper(
        {.path = path,
         .period_ms = 10,
         .state =
             [&] {
               const std::lock_guard lock(mutex);
               return now;
             },
         .on_written = [&](const absl::Status& s) { written += s.ok() ? 1 : 1000; }});
    while (written < 1) usleep(1000);
    usleep(100'000);
    CHECK(written == 1);  // nothing new
    replace(41);
    while (written < 2) usleep(1000);
    CHECK(ParseServerState(*ReadFile(path))->window_tokens == 41);
  }
  CHECK(written == 2);
  {
    StateKeeper keeper({.path = path,
                        .period_ms = 1'000'000,
                        .state =
                            [&] {
                              const std::lock_guard lock(mutex);
                              return now;
                            },
                        .on_written = {}});
    replace(42);
  }
  CHECK(ParseServerState(*ReadFile(path))->window_tokens == 42);
}

// Fault: the disk is full while the state is written.
TEST_CASE("a full disk leaves the last state as it was, and is tried again", "[state][fault]") {
  if (!std::filesystem::exists("/dev/full")) return;
  SetLogLevel(LogLevel::kOff);
  TempFolder folder;
  const std::string path = folder.path() + "/state.json";
  REQUIRE(WriteFile(path, ToJson(Sample())).ok());
  // WriteFile writes beside the file first.
  const std::string beside = path + "." + std::to_string(getpid()) + ".tmp";
  std::filesystem::create_symlink("/dev/full", beside);
  std::atomic<int> failed = 0, written = 0;
  auto next = std::make_shared<ServerState>(Sample());
  next->window_tokens = 77;
  {
    StateKeeper keeper(
        {.path = path,
         .period_ms = 5,
         .state = [&] { return next; },
         .on_written = [&](const absl::Status& s) { ++(s.ok() ? written : failed); }});
    while (failed + written < 1) usleep(1000);
    CHECK(failed >= 1);  // the link was removed with the failed attempt: the next one succeeds
    while (written < 1) usleep(1000);
  }
  CHECK(ParseServerState(*ReadFile(path))->window_tokens == 77);
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("what cannot be written names the file", "[state][fault]") {
  const absl::Status status = WriteFile("/nowhere/state.json", "x");
  CHECK(status.message().find("/nowhere/state.json: cannot be written") == 0);
  if (!std::filesystem::exists("/dev/full")) return;
  TempFolder folder;
  const std::string path = folder.path() + "/a";
  REQUIRE(WriteFile(path, "old").ok());
  std::filesystem::create_symlink("/dev/full", path + "." + std::to_string(getpid()) + ".tmp");
  const absl::Status full = WriteFile(path, std::string(100'000, 'x'));
  CHECK(!full.ok());
  CHECK(full.message().find("No space left on device") != std::string::npos);
  CHECK(*ReadFile(path) == "old");
}

}  // namespace
}  // namespace ballast
