#include "comm/nccl_communicator.h"

#include <catch2/catch.hpp>
#include <memory>

#include "base/status.h"
#include "tests/comm/nccl_ranks.h"
#include "tests/support/run_ranks.h"

// Everything here runs on a fake of NCCL: no test has seen NCCL move a byte between two devices.

namespace ballast {
namespace {

using testing::Expect;
using testing::FakeNccl;
using testing::FirstError;
using testing::Names;
using testing::NcclRank;
using testing::RandomPairBytes;
using testing::RunNcclRanks;
using testing::TestExchange;

constexpr size_t kStagingBytes = 1 << 16;

absl::StatusOr<std::unique_ptr<NcclCommunicator>> CreateOn(const NcclRank& at,
                                                           NcclCommunicator::Options options = {}) {
  return NcclCommunicator::Create(at.api, at.world, 0, std::move(options));
}

void RequireAllFreed(const FakeNccl& fake) {
  REQUIRE(fake.live_communicators() == 0);
  REQUIRE(fake.live_events() == 0);
  REQUIRE(fake.uses_after_free() == 0);
}

TEST_CASE("rows arrive alike directly and by proxies at any number of ranks", "[comm][nccl]") {
  for (int ranks = 1; ranks <= 8; ++ranks) {
    for (int per_node : {1, 2, 3, 8}) {
      CAPTURE(ranks, per_node);
      FakeNccl fake(ranks);
      fake.set_polls_in_progress(ranks % 3);
      const auto statuses = RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
        std::vector<int32_t> nodes;
        for (int r = 0; r < ranks; ++r) nodes.push_back(r / per_node);
        BALLAST_ASSIGN_OR_RETURN(
            const auto comm,
            CreateOn(at, {.node_of_rank = nodes, .staging = at.Allocate(kStagingBytes)}));
        for (uint64_t round = 0; round < 12; ++round) {
          TestExchange exchange{.pair_bytes = RandomPairBytes(ranks, round / 2),
                                .hierarchical = round % 2 == 1};
          BALLAST_RETURN_IF_ERROR(exchange.Run(comm.get(), at));
        }
        return comm->Destroy();
      });
      REQUIRE(FirstError(statuses) == "");
      for (int r = 0; r < ranks; ++r) REQUIRE(fake.seen(r).aborts == 0);
      RequireAllFreed(fake);
    }
  }
}

TEST_CASE("exchanges may follow one another before the first is waited for", "[comm][nccl]") {
  FakeNccl fake(4);
  fake.set_polls_in_progress(2);
  REQUIRE(
      FirstError(RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
        BALLAST_ASSIGN_OR_RETURN(
            const auto comm,
            CreateOn(at, {.node_of_rank = {0, 1, 0, 1}, .staging = at.Allocate(kStagingBytes)}));
        std::vector<TestExchange> exchanges;
        for (uint64_t i = 0; i < 6; ++i) {
          exchanges.push_back({.pair_bytes = RandomPairBytes(4, i), .hierarchical = i % 2 == 0});
          BALLAST_RETURN_IF_ERROR(exchanges.back().Begin(comm.get(), at));
        }
        BALLAST_RETURN_IF_ERROR(comm->Wait(at.stream, 60'000));
        for (const auto& e : exchanges) BALLAST_RETURN_IF_ERROR(e.Check(*comm));
        return absl::OkStatus();
      })) == "");
  RequireAllFreed(fake);
}

TEST_CASE("a rank copies its own rows and sends nothing of no length", "[comm][nccl]") {
  FakeNccl fake(3);
  // Ranks 0 and 1 keep some; rank 1 sends to rank 2, which keeps nothing.
  const std::vector<size_t> pair_bytes = {7, 0, 0, 0, 9, 5, 0, 0, 0};
  REQUIRE(FirstError(RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
            BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
            return TestExchange{.pair_bytes = pair_bytes}.Run(comm.get(), at);
          })) == "");
  const int messages[] = {0, 1, 1}, copies[] = {1, 1, 0};
  for (int r = 0; r < 3; ++r) {
    CAPTURE(r);
    REQUIRE(fake.seen(r).messages == messages[r]);
    REQUIRE(fake.seen(r).groups == messages[r]);
    REQUIRE(fake.seen(r).copies == copies[r]);
  }
}

TEST_CASE("a communicator for migrations holds few thread blocks beside another one",
          "[comm][nccl]") {
  FakeNccl fake(3);
  REQUIRE(FirstError(RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
            BALLAST_ASSIGN_OR_RETURN(const auto rows, CreateOn(at));
            BALLAST_ASSIGN_OR_RETURN(const auto migration, CreateOn(at, {.max_ctas = 2}));
            TestExchange one{.pair_bytes = RandomPairBytes(3, 1)};
            TestExchange two{.pair_bytes = RandomPairBytes(3, 2)};
            BALLAST_RETURN_IF_ERROR(one.Begin(migration.get(), at));
            BALLAST_RETURN_IF_ERROR(two.Run(rows.get(), at));
            BALLAST_RETURN_IF_ERROR(migration->Wait(at.stream, 60'000));
            return one.Check(*migration);
          })) == "");
  for (int r = 0; r < 3; ++r) REQUIRE(fake.seen(r).max_ctas == std::vector<int>{0, 2});
  RequireAllFreed(fake);
}

TEST_CASE("staging memory that is too small is refused on all ranks and breaks nothing",
          "[comm][nccl][errors]") {
  FakeNccl fake(4);
  // Rank 1 alone needs it: the 11 bytes that rank 3 has for node 0.
  std::vector<size_t> pair_bytes(16, 0);
  pair_bytes[3 * 4 + 0] = 5;
  pair_bytes[3 * 4 + 1] = 6;
  REQUIRE(FirstError(RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
            BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at, {.node_of_rank = {0, 0, 1, 1},
                                                                    .staging = at.Allocate(10)}));
            TestExchange exchange{.pair_bytes = pair_bytes, .hierarchical = true};
            BALLAST_RETURN_IF_ERROR(Expect(exchange.Begin(comm.get(), at),
                                           absl::StatusCode::kInvalidArgument,
                                           "need 11 bytes of staging memory on one rank; each has "
                                           "10"));
            exchange.hierarchical = false;
            return exchange.Run(comm.get(), at);
          })) == "");
}

TEST_CASE("two ranks on one GPU are refused before NCCL is asked", "[comm][nccl][errors]") {
  const auto create = [](FakeNccl* fake) {
    return RunNcclRanks(fake, [](const NcclRank& at) { return CreateOn(at).status(); });
  };
  SECTION("by host and PCI bus") {
    FakeNccl fake(4);
    fake.gpu(3).pci_bus_id = fake.gpu(1).pci_bus_id;
    for (const absl::Status& status : create(&fake)) {
      CAPTURE(status.ToString());
      REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
      REQUIRE(Names(status, "ranks 1 and 3 stand on one GPU (host, PCI 0000:11:00.0)"));
    }
    for (int r = 0; r < 4; ++r) REQUIRE(fake.seen(r).inits == 0);
    RequireAllFreed(fake);
  }
  SECTION("by UUID where host names differ") {
    FakeNccl fake(3);
    fake.gpu(2) = fake.gpu(0);
    fake.gpu(2).host = "container";
    for (const absl::Status& status : create(&fake)) {
      REQUIRE(Names(status, "ranks 0 and 2 stand on one GPU"));
    }
    for (int r = 0; r < 3; ++r) REQUIRE(fake.seen(r).inits == 0);
  }
  SECTION("the same place in two hosts is not one GPU") {
    FakeNccl fake(2);
    fake.gpu(1).pci_bus_id = fake.gpu(0).pci_bus_id;
    fake.gpu(1).host = "other";
    fake.gpu(0).uuid = fake.gpu(1).uuid = {};  // not known
    REQUIRE(FirstError(create(&fake)) == "");
  }
}

TEST_CASE("options that differ are refused on all ranks with both values", "[comm][nccl][errors]") {
  const auto create = [](FakeNccl* fake, auto change) {
    return RunNcclRanks(fake, [&](const NcclRank& at) {
      NcclCommunicator::Options options{.node_of_rank = {0, 0, 1}};
      if (at.rank == 2) change(&options, at);
      return CreateOn(at, options).status();
    });
  };
  const auto require_all = [](const FakeNccl& fake, const std::vector<absl::Status>& statuses,
                              const std::string& what) {
    for (const absl::Status& status : statuses) {
      CAPTURE(status.ToString());
      REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
      REQUIRE(Names(status, what));
    }
    for (int r = 0; r < 3; ++r) REQUIRE(fake.seen(r).inits == 0);
  };
  FakeNccl ctas(3), staging(3), nodes(3), late(3);
  require_all(ctas, create(&ctas, [](auto* options, auto&) { options->max_ctas = 4; }),
              "max_ctas must be the same on all ranks: rank 0 has 0, rank 2 has 4");
  require_all(
      staging,
      create(&staging, [](auto* options, auto& at) { options->staging = at.Allocate(64); }),
      "the size of the staging memory must be the same on all ranks: rank 0 has 0, rank 2 has 64");
  require_all(nodes, create(&nodes, [](auto* options, auto&) { options->node_of_rank[0] = 1; }),
              "the hash of the nodes must be the same on all ranks");
  require_all(late, create(&late, [](auto* options, auto&) { options->deadline_ms = 20'001; }),
              "rank 2: deadline_ms is 20001, allowed: at most 20000,");
}

TEST_CASE("results of NCCL become statuses with their cause", "[comm][nccl][errors]") {
  const CallSite site{"ncclSend(x)", "file.cc", 12};
  REQUIRE(NcclStatus(NcclResult::kSuccess, site, "").ok());
  REQUIRE(NcclStatus(NcclResult::kInProgress, site, "").ok());
  const absl::Status lost = NcclStatus(NcclResult::kRemoteError, site, "socket closed");
  REQUIRE(lost.code() == absl::StatusCode::kUnavailable);
  REQUIRE(Names(lost, "ncclSend(x): ncclRemoteError (6): socket closed"));
  const absl::Status usage = NcclStatus(NcclResult::kInvalidUsage, site, "wrong buffer");
  REQUIRE(usage.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(Names(usage, "wrong buffer"));
  const absl::Status twice =
      NcclStatus(NcclResult::kInvalidUsage, site,
                 "init.cc:1 Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000");
  REQUIRE(twice.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(Names(twice, "two ranks stand on one GPU"));
  REQUIRE(Names(twice, "rank 0 and rank 1 both on CUDA device 1b000"));
  const absl::Status surprise = NcclStatus(NcclResult::kSystemError, site, "");
  REQUIRE(surprise.code() == absl::StatusCode::kInternal);
  REQUIRE(Names(surprise, "ncclSend(x): ncclSystemError (2) at file.cc:12"));
}

}  // namespace
}  // namespace ballast
