#include <atomic>
#include <catch2/catch.hpp>
#include <memory>
#include <thread>

#include "base/status.h"
#include "comm/member_transport.h"
#include "comm/nccl_communicator.h"
#include "tests/comm/nccl_ranks.h"
#include "tests/support/run_ranks.h"

// What goes wrong in NCCL, planted in a fake of it: each fault ends in time, on all ranks that can
// know, with the rank, and leaves nothing behind.

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

constexpr int64_t kShortMs = 100;
constexpr int64_t kLongMs = 60'000;

absl::StatusOr<std::unique_ptr<NcclCommunicator>> CreateOn(const NcclRank& at,
                                                           int64_t deadline_ms = kLongMs / 3) {
  return NcclCommunicator::Create(at.api, at.world, 0, {.deadline_ms = deadline_ms, .max_ctas = 3});
}

// As many bytes between any two ranks.
TestExchange Everybody(int ranks) {
  return {.pair_bytes = std::vector<size_t>(static_cast<size_t>(ranks * ranks), 10)};
}

void RequireAll(const std::vector<absl::Status>& statuses, absl::StatusCode code,
                const std::string& what) {
  for (const absl::Status& status : statuses) {
    CAPTURE(status.ToString());
    REQUIRE(status.code() == code);
    REQUIRE(Names(status, what));
  }
}

void RequireAllFreed(const FakeNccl& fake) {
  REQUIRE(fake.live_communicators() == 0);
  REQUIRE(fake.live_events() == 0);
  REQUIRE(fake.uses_after_free() == 0);
}

TEST_CASE("a rank that cannot start NCCL leaves nobody alone in it", "[comm][nccl][errors]") {
  FakeNccl no_device(4), no_id(4);
  no_device.faults(2).device = absl::InternalError("no CUDA-capable device");
  no_id.faults(0).unique_id = absl::InternalError("no network interface");
  const auto create = [](const NcclRank& at) { return CreateOn(at).status(); };
  RequireAll(RunNcclRanks(&no_device, create), absl::StatusCode::kInternal,
             "rank 2: no CUDA-capable device");
  RequireAll(RunNcclRanks(&no_id, create), absl::StatusCode::kInternal,
             "rank 0: no network interface");
  for (int r = 0; r < 4; ++r) {
    REQUIRE(no_device.seen(r).inits == 0);
    REQUIRE(no_id.seen(r).inits == 0);
  }
  RequireAllFreed(no_device);
  RequireAllFreed(no_id);
}

TEST_CASE("a rank that fails to join ends the wait of the others and is named",
          "[comm][nccl][errors]") {
  FakeNccl fake(4);
  fake.faults(1).init = NcclResult::kSystemError;
  RequireAll(
      RunNcclRanks(&fake, [](const NcclRank& at) { return CreateOn(at, kShortMs).status(); }),
      absl::StatusCode::kInternal, "rank 1: rank 1 of 4, exchange 0: init: ncclSystemError");
  RequireAllFreed(fake);
}

TEST_CASE("ranks that have joined do not wait for one that fails at the last moment",
          "[comm][nccl][errors]") {
  FakeNccl fake(4);
  fake.faults(3).lost_after_groups = 0;
  RequireAll(RunNcclRanks(&fake, [](const NcclRank& at) { return CreateOn(at).status(); }),
             absl::StatusCode::kUnavailable, "rank 3: rank 3 of 4, exchange 0: a peer or a link");
  for (int r = 0; r < 4; ++r) {
    REQUIRE(fake.seen(r).finalizes == 0);
    REQUIRE(fake.seen(r).aborts == 1);
  }
  RequireAllFreed(fake);
}

TEST_CASE("a rank that does not come to the start is named by all others", "[comm][nccl][errors]") {
  FakeNccl fake(3);
  const auto statuses = RunNcclRanks(
      &fake,
      [](const NcclRank& at) {
        return at.rank == 1 ? absl::OkStatus() : CreateOn(at, kShortMs).status();
      },
      3 * kShortMs);
  RequireAll({statuses[0], statuses[2]}, absl::StatusCode::kDeadlineExceeded, "from 1");
  RequireAllFreed(fake);
}

TEST_CASE("a peer that does not come ends the wait and the communicator", "[comm][nccl][errors]") {
  FakeNccl fake(3);
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
    if (at.rank == 2) return comm->Abort();  // its end comes in no other way
    // First among those that are there, then with the other one alone.
    TestExchange among{.pair_bytes = {0, 9, 0, 9, 0, 0, 0, 0, 0}};
    BALLAST_RETURN_IF_ERROR(among.Run(comm.get(), at));
    TestExchange exchange{.pair_bytes = {0, 0, 8, 0, 0, 8, 8, 8, 0}};
    BALLAST_RETURN_IF_ERROR(exchange.Begin(comm.get(), at));
    const absl::Status waited = comm->Wait(at.stream, kShortMs);
    BALLAST_RETURN_IF_ERROR(Expect(
        waited, absl::StatusCode::kDeadlineExceeded,
        absl::StrCat("rank ", at.rank, " of 3, exchange 2: waited 100 ms for its stream; last ",
                     "messages from 2; last messages to 2")));
    // From then on it refuses, and says why.
    const std::string why(waited.message());
    using Code = absl::StatusCode;
    BALLAST_RETURN_IF_ERROR(Expect(exchange.Begin(comm.get(), at), Code::kUnavailable, why));
    exchange.hierarchical = true;
    BALLAST_RETURN_IF_ERROR(Expect(exchange.Begin(comm.get(), at), Code::kUnavailable, why));
    BALLAST_RETURN_IF_ERROR(Expect(comm->Wait(at.stream, kLongMs), Code::kUnavailable, why));
    BALLAST_RETURN_IF_ERROR(comm->Destroy());
    BALLAST_RETURN_IF_ERROR(comm->Abort());
    return Expect(comm->Wait(at.stream, kLongMs), Code::kUnavailable, why);
  });
  REQUIRE(FirstError(statuses) == "");
  for (int r = 0; r < 3; ++r) REQUIRE(fake.seen(r).aborts == 1);
  RequireAllFreed(fake);
}

TEST_CASE("a lost peer is an error in the background that ends the wait", "[comm][nccl][errors]") {
  FakeNccl fake(2);
  fake.faults(0).lost_after_groups = 2;
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
    BALLAST_RETURN_IF_ERROR(Everybody(2).Run(comm.get(), at));
    if (at.rank == 1) return comm->Abort();  // is lost after the first exchange
    TestExchange second = Everybody(2);
    absl::Status status = second.Begin(comm.get(), at);
    if (status.ok()) status = comm->Wait(at.stream, kLongMs);
    BALLAST_RETURN_IF_ERROR(Expect(status, absl::StatusCode::kUnavailable,
                                   "rank 0 of 2, exchange 2: a peer or a link is lost"));
    return Expect(second.Begin(comm.get(), at), absl::StatusCode::kUnavailable, "of no more use");
  });
  REQUIRE(FirstError(statuses) == "");
  RequireAllFreed(fake);
}

TEST_CASE("ranks that count differently are told both counts", "[comm][nccl][errors]") {
  FakeNccl fake(2);
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
    TestExchange exchange = Everybody(2);
    if (at.rank == 1) exchange.pair_bytes[1] = 12;  // from 0 to 1
    BALLAST_RETURN_IF_ERROR(exchange.Begin(comm.get(), at));
    return comm->Wait(at.stream, kLongMs);
  });
  RequireAll(statuses, absl::StatusCode::kInvalidArgument,
             "rank 0 sends 10 bytes and rank 1 receives 12");
  RequireAllFreed(fake);
}

TEST_CASE("an error amid a group leaves other communicators usable", "[comm][nccl][errors]") {
  FakeNccl fake(2);
  std::atomic<bool> failed = false;
  const auto statuses = RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
    BALLAST_ASSIGN_OR_RETURN(const auto other, CreateOn(at));
    TestExchange exchange = Everybody(2);
    if (at.rank == 1) exchange.pair_bytes[1] = 12;  // from 0 to 1
    BALLAST_RETURN_IF_ERROR(exchange.Begin(comm.get(), at));
    using Code = absl::StatusCode;
    if (at.rank == 1) {
      const absl::Status waited = comm->Wait(at.stream, kLongMs);
      failed = true;
      BALLAST_RETURN_IF_ERROR(Expect(waited, Code::kInvalidArgument, "12"));
    } else {
      // Rank 0 finds it out in the first call of its next group.
      while (!failed) std::this_thread::yield();
      BALLAST_RETURN_IF_ERROR(Expect(exchange.Begin(comm.get(), at), Code::kInvalidArgument,
                                     "rank 0 of 2, exchange 2: send or receive"));
    }
    BALLAST_RETURN_IF_ERROR(comm->Abort());
    return Everybody(2).Run(other.get(), at);
  });
  REQUIRE(FirstError(statuses) == "");
  RequireAllFreed(fake);
}

TEST_CASE("a wait for NCCL can be interrupted", "[comm][nccl][errors]") {
  FakeNccl fake(2);
  std::atomic<bool> halt = false;
  const auto statuses = RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(
        const auto comm,
        NcclCommunicator::Create(at.api, at.world, 0, {.interrupted = [&]() -> absl::Status {
                                   return halt ? absl::AbortedError("halt") : absl::OkStatus();
                                 }}));
    if (at.rank == 1) {
      halt = true;
      return comm->Abort();
    }
    TestExchange exchange = Everybody(2);
    absl::Status status = exchange.Begin(comm.get(), at);
    if (status.ok()) status = comm->Wait(at.stream, kLongMs);
    return Expect(status, absl::StatusCode::kAborted, "halt");
  });
  REQUIRE(FirstError(statuses) == "");
}

TEST_CASE("an end that not all ranks come to is an abort", "[comm][nccl][errors]") {
  FakeNccl fake(2);
  const auto statuses = RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at, kShortMs * 10));
    if (at.rank == 1) return comm->Abort();
    BALLAST_RETURN_IF_ERROR(Expect(comm->Destroy(), absl::StatusCode::kDeadlineExceeded,
                                   "rank 0 of 2, exchange 0: waited 1000 ms for all ranks to end"));
    return fake.seen(0).aborts == 1 ? absl::OkStatus() : absl::InternalError("not aborted");
  });
  REQUIRE(FirstError(statuses) == "");
  REQUIRE(fake.seen(0).aborts == 1);
  RequireAllFreed(fake);
}

TEST_CASE("an abort that does not return is left behind", "[comm][nccl][errors]") {
  FakeNccl fake(1);
  fake.faults(0).abort_hangs = true;
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at, kShortMs));
    return comm->Abort();
  });
  RequireAll(statuses, absl::StatusCode::kDeadlineExceeded,
             "rank 0: ncclCommAbort has not returned in 100 ms");
  REQUIRE(fake.live_communicators() == 1);
  fake.Release();
  while (fake.live_communicators() > 0) std::this_thread::yield();
}

// A world of some ranks, as after a loss.
struct Members {
  Members(const NcclRank& at, std::vector<int32_t> ranks_in, int64_t deadline_ms = kLongMs)
      : ranks(std::move(ranks_in)),
        transport(at.transport, ranks, 1),
        world(&transport, {.deadline_ms = deadline_ms}) {}
  std::vector<int32_t> ranks;
  MemberTransport transport;
  Communicator world;
};

TEST_CASE("survivors shrink after a loss and rows go on", "[comm][nccl][errors]") {
  FakeNccl fake(5);
  fake.set_polls_in_progress(3);
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(
        const auto comm,
        NcclCommunicator::Create(
            at.api, at.world, 0,
            {.max_ctas = 3, .node_of_rank = {0, 0, 1, 1, 2}, .staging = at.Allocate(1 << 14)}));
    BALLAST_RETURN_IF_ERROR(Everybody(5).Run(comm.get(), at));
    if (at.rank == 2) return comm->Abort();
    // Rank 4 has nothing to do with the lost one, and does not know of the loss.
    TestExchange second = Everybody(5);
    for (size_t r = 0; r < 5; ++r) second.pair_bytes[r * 5 + 4] = second.pair_bytes[20 + r] = 0;
    BALLAST_RETURN_IF_ERROR(second.Begin(comm.get(), at));
    const absl::Status waited = comm->Wait(at.stream, at.rank == 4 ? kLongMs : kShortMs);
    if (at.rank != 4 && !absl::IsDeadlineExceeded(waited)) return waited;
    if (at.rank == 4) BALLAST_RETURN_IF_ERROR(waited);

    Members members(at, {0, 1, 3, 4});
    BALLAST_ASSIGN_OR_RETURN(const auto smaller, comm->Shrink(&members.world, 1, members.ranks));
    if (members.ranks[static_cast<size_t>(smaller->rank())] != at.rank || smaller->size() != 4) {
      return absl::InternalError("numbered wrongly");
    }
    if (smaller->hierarchy().num_nodes() != 3) return absl::InternalError("nodes are wrong");
    BALLAST_RETURN_IF_ERROR(
        Expect(comm->Wait(at.stream, kLongMs), absl::StatusCode::kUnavailable, "of no more use"));
    for (uint64_t seed = 0; seed < 6; ++seed) {
      TestExchange exchange{.pair_bytes = RandomPairBytes(4, seed), .hierarchical = seed % 2 == 1};
      BALLAST_RETURN_IF_ERROR(exchange.Run(smaller.get(), at));
    }
    return smaller->Destroy();
  });
  REQUIRE(FirstError(statuses) == "");
  for (int r : {0, 1, 3, 4}) {
    CAPTURE(r);
    REQUIRE(fake.seen(r).shrinks_with_abort == 1);  // also the one without a fault
    REQUIRE(fake.seen(r).plain_shrinks == 0);
    REQUIRE(fake.seen(r).max_ctas == std::vector<int>{3, 3});
  }
  RequireAllFreed(fake);
}

TEST_CASE("a shrink that does not return is left alone with its communicator",
          "[comm][nccl][errors]") {
  FakeNccl fake(3);
  fake.faults(1).shrink_hangs = true;
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at, kShortMs));
    if (at.rank == 0) return comm->Abort();
    Members members(at, {1, 2});
    return Expect(comm->Shrink(&members.world, 1, members.ranks).status(),
                  absl::StatusCode::kDeadlineExceeded, "ncclCommShrink has not returned in");
  });
  fake.Release();
  while (fake.hanging_shrinks() > 0) std::this_thread::yield();
  REQUIRE(FirstError(statuses) == "");
  REQUIRE(fake.seen(1).aborts == 0);  // NCCL was still in there
  REQUIRE(fake.seen(2).aborts == 2);  // of the old one and of the one that was begun
  REQUIRE(fake.uses_after_free() == 0);
}

TEST_CASE("a rank that leaves is shrunk away without an abort", "[comm][nccl]") {
  FakeNccl fake(3);
  const auto statuses = RunNcclRanks(&fake, [](const NcclRank& at) -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at));
    BALLAST_RETURN_IF_ERROR(Everybody(3).Run(comm.get(), at));
    if (at.rank == 0) return comm->Abort();
    Members members(at, {1, 2});
    BALLAST_ASSIGN_OR_RETURN(const auto smaller, comm->Shrink(&members.world, 1, members.ranks));
    return Everybody(2).Run(smaller.get(), at);
  });
  REQUIRE(FirstError(statuses) == "");
  for (int r : {1, 2}) {
    REQUIRE(fake.seen(r).plain_shrinks == 1);
    REQUIRE(fake.seen(r).shrinks_with_abort == 0);
  }
  RequireAllFreed(fake);
}

TEST_CASE("a shrink that fails on one rank fails on all and a new start is what is left",
          "[comm][nccl][errors]") {
  using Code = absl::StatusCode;
  enum class Why { kAborted, kRefused, kOthersNamed, kShortWorld };
  struct Case {
    Why why;
    Code code;
    const char* message;
  };
  for (const Case& c :
       {Case{Why::kAborted, Code::kUnavailable, "rank 1: rank 2 of 4 has ended its communicator"},
        Case{Why::kRefused, Code::kUnavailable, "rank 1: rank 2 of 4, exchange 0: a peer or"},
        Case{Why::kOthersNamed, Code::kInvalidArgument, "the hash of the survivors"},
        Case{Why::kShortWorld, Code::kInvalidArgument, "rank 1: deadline_ms is 1000, allowed"}}) {
    CAPTURE(c.message);
    FakeNccl fake(4);
    if (c.why == Why::kRefused) fake.faults(2).shrink = NcclResult::kRemoteError;
    const auto statuses = RunNcclRanks(&fake, [&](const NcclRank& at) -> absl::Status {
      BALLAST_ASSIGN_OR_RETURN(const auto comm, CreateOn(at, 10 * kShortMs));
      if (at.rank == 0) return comm->Abort();
      const bool odd_one = at.rank == 2;
      if (c.why == Why::kAborted && odd_one) BALLAST_RETURN_IF_ERROR(comm->Abort());
      Members members(at, {1, 2, 3}, c.why == Why::kShortWorld && odd_one ? 2'999 : kLongMs);
      std::vector<int32_t> named = members.ranks;
      if (c.why == Why::kOthersNamed && odd_one) named[0] = 0;
      BALLAST_RETURN_IF_ERROR(
          Expect(comm->Shrink(&members.world, 1, named).status(), c.code, c.message));
      BALLAST_ASSIGN_OR_RETURN(
          const auto made,
          NcclCommunicator::Create(at.api, &members.world, 1, {.deadline_ms = 9 * kShortMs}));
      return Everybody(3).Run(made.get(), at);
    });
    REQUIRE(FirstError(statuses) == "");
    RequireAllFreed(fake);
  }
}

}  // namespace
}  // namespace ballast
