#include "comm/communicator.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <thread>

#include "base/status.h"
#include "comm/member_transport.h"
#include "tests/comm/conformance.h"
#include "tests/support/run_ranks.h"

namespace ballast {
namespace {

using testing::FirstError;
using testing::RunRanks;

std::string Text(const absl::Status& status) {
  return std::string(status.message());
}

bool Names(const absl::Status& status, const std::string& what) {
  return Text(status).find(what) != std::string::npos;
}

TEST_CASE("the local transport conforms", "[comm][conformance]") {
  for (int ranks : {1, 2, 4, 8}) {
    CAPTURE(ranks);
    REQUIRE(FirstError(RunRanks(ranks, [](Transport*, Communicator* comm, int) {
              return testing::CheckAllGather(comm);
            })) == "");
    REQUIRE(FirstError(RunRanks(ranks, [](Transport*, Communicator* comm, int) {
              return testing::CheckExchange(comm);
            })) == "");
    REQUIRE(FirstError(RunRanks(ranks, [](Transport* transport, Communicator*, int) {
              return testing::CheckOrder(transport);
            })) == "");
  }
}

TEST_CASE("members of a generation conform and hear nothing of another", "[comm][conformance]") {
  std::atomic<int64_t> left_behind = 0;
  REQUIRE(FirstError(RunRanks(4, [&](Transport* transport, Communicator*, int rank) {
            if (rank == 1) return absl::OkStatus();  // not a member
            const std::vector<int32_t> ranks = {0, 2, 3};
            // A message of the generation before, to the first member, that nobody takes.
            MemberTransport before(transport, ranks, 6);
            const std::vector<std::byte> stray(64);
            if (rank == 3) {
              BALLAST_RETURN_IF_ERROR(before.PostSend(0, kTagCollective, stray).status());
              ++left_behind;
            }
            while (left_behind == 0) std::this_thread::yield();
            MemberTransport members(transport, ranks, 7);
            if (members.size() != 3 || ranks[members.rank()] != rank) {
              return absl::InternalError("numbered wrongly");
            }
            Communicator comm(&members, {});
            BALLAST_RETURN_IF_ERROR(testing::CheckAllGather(&comm));
            BALLAST_RETURN_IF_ERROR(testing::CheckExchange(&comm));
            return testing::CheckOrder(&members);
          })) == "");
}

TEST_CASE("a wait can be interrupted", "[comm][errors]") {
  std::atomic<bool> interrupt = false, ended = false;
  const auto statuses = RunRanks(2, [&](Transport* transport, Communicator*, int rank) {
    if (rank == 1) {  // never takes part
      interrupt = true;
      while (!ended) std::this_thread::yield();
      return absl::OkStatus();
    }
    Communicator comm(transport, {.deadline_ms = 60'000, .interrupted = [&]() -> absl::Status {
                                    return interrupt ? absl::AbortedError("enough")
                                                     : absl::OkStatus();
                                  }});
    std::vector<std::byte> mine(4), all(8);
    const absl::Status status = comm.AllGather(0, mine, all);
    ended = true;
    if (!absl::IsAborted(status)) return absl::InternalError("not interrupted");
    return absl::IsUnavailable(comm.AllGather(0, mine, all)) ? absl::OkStatus() : status;
  });
  REQUIRE(FirstError(statuses) == "");
}

TEST_CASE("the time in waits is counted", "[comm][unit]") {
  int64_t waited[2] = {};
  REQUIRE(FirstError(RunRanks(2, [&](Transport*, Communicator* comm, int rank) {
            const int32_t mine = rank;
            int32_t all[2];
            if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(30));
            absl::Status status = comm->AllGather(0, std::as_bytes(std::span(&mine, 1)),
                                                  std::as_writable_bytes(std::span(all)));
            waited[rank] = comm->wait_ns();
            return status;
          })) == "");
  REQUIRE(waited[1] > 10'000'000);
}

TEST_CASE("a rank that does not come is named before the deadline is long over", "[comm][errors]") {
  const auto statuses = RunRanks(
      3,
      [](Transport*, Communicator* comm, int rank) {
        if (rank == 1) return absl::OkStatus();
        const int64_t mine = rank;
        int64_t all[3];
        const auto gather = [&] {
          return comm->AllGather(0, std::as_bytes(std::span(&mine, 1)),
                                 std::as_writable_bytes(std::span(all)));
        };
        const absl::Status first = gather();
        // From then on the communicator is dead, and says why.
        const absl::Status second = gather();
        if (second.code() != absl::StatusCode::kUnavailable) return second;
        if (!Names(second, Text(first))) return second;
        return first;
      },
      /*deadline_ms=*/100);
  REQUIRE(statuses[1].ok());
  for (int rank : {0, 2}) {
    CAPTURE(Text(statuses[rank]));
    REQUIRE(statuses[rank].code() == absl::StatusCode::kDeadlineExceeded);
    REQUIRE(Names(statuses[rank], "from 1"));
    REQUIRE(!Names(statuses[rank], "from 0"));
    REQUIRE(!Names(statuses[rank], "from 2"));
  }
}

TEST_CASE("ranks at different epochs are told both", "[comm][errors]") {
  const auto statuses = RunRanks(2, [](Transport*, Communicator* comm, int rank) {
    const int64_t mine = 0;
    int64_t all[2];
    return comm->AllGather(rank == 0 ? 41 : 42, std::as_bytes(std::span(&mine, 1)),
                           std::as_writable_bytes(std::span(all)));
  });
  for (const absl::Status& status : statuses) {
    CAPTURE(Text(status));
    REQUIRE(status.code() == absl::StatusCode::kInternal);
    REQUIRE(Names(status, "epoch 41"));
    REQUIRE(Names(status, "epoch 42"));
  }
}

TEST_CASE("ranks in different exchanges are told both", "[comm][errors]") {
  // Rank 0 makes a call that carries nothing, and is one ahead from then on.
  const auto statuses = RunRanks(2, [](Transport*, Communicator* comm, int rank) {
    if (rank == 0) {
      Communicator::Exchange exchange(comm);
      const size_t none[2] = {};
      BALLAST_RETURN_IF_ERROR(exchange.Post(0, none, none));
      BALLAST_RETURN_IF_ERROR(exchange.Wait());
    }
    const int64_t mine = 0;
    int64_t all[2];
    return comm->AllGather(0, std::as_bytes(std::span(&mine, 1)),
                           std::as_writable_bytes(std::span(all)));
  });
  for (const absl::Status& status : statuses) {
    CAPTURE(Text(status));
    REQUIRE(status.code() == absl::StatusCode::kInternal);
    REQUIRE(Names(status, "exchange 1"));
    REQUIRE(Names(status, "exchange 2"));
  }
}

TEST_CASE("ranks that gather different lengths are told so", "[comm][errors]") {
  const auto statuses = RunRanks(
      2,
      [](Transport*, Communicator* comm, int rank) {
        std::vector<std::byte> mine(rank == 0 ? 8 : 24), all(mine.size() * 2);
        return comm->AllGather(5, mine, all);
      },
      /*deadline_ms=*/2000);
  CAPTURE(Text(statuses[0]), Text(statuses[1]));
  // A message that is too long has no header to show: the rank and the exchange must do.
  REQUIRE(statuses[0].code() == absl::StatusCode::kDataLoss);
  REQUIRE(Names(statuses[0], "from rank 1"));
  REQUIRE(Names(statuses[0], "epoch 5"));
  REQUIRE(statuses[1].code() == absl::StatusCode::kInternal);
  REQUIRE(Names(statuses[1], "rank 0 sent 8 bytes"));
}

TEST_CASE("a buffer that is still posted is not touched after a failure", "[comm][errors]") {
  std::atomic<bool> failed = false;
  int32_t late = -1;
  const auto statuses = RunRanks(
      2,
      [&](Transport* transport, Communicator* comm, int rank) {
        if (rank == 0) {
          std::vector<std::byte> mine(4, std::byte{0x11}), all(8);
          const absl::Status first = comm->AllGather(0, mine, all);
          // A larger gather wants a larger buffer: the posted one must stay as it is.
          std::vector<std::byte> more(1 << 16, std::byte{0x22}), all_more(2 << 16);
          const absl::Status second = comm->AllGather(0, more, all_more);
          failed = true;
          if (first.code() != absl::StatusCode::kDeadlineExceeded) return first;
          return second.code() == absl::StatusCode::kUnavailable ? absl::OkStatus() : second;
        }
        while (!failed) std::this_thread::yield();
        std::vector<std::byte> bytes(256);
        BALLAST_ASSIGN_OR_RETURN(const auto handle, transport->PostRecv(0, kTagCollective, bytes));
        size_t received = 0;
        BALLAST_ASSIGN_OR_RETURN(const bool done, transport->Test(handle, &received));
        if (!done || received != kCacheLineBytes + 4) return absl::InternalError("no message");
        std::memcpy(&late, bytes.data() + kCacheLineBytes, 4);
        return absl::OkStatus();
      },
      /*deadline_ms=*/50);
  REQUIRE(FirstError(statuses) == "");
  REQUIRE(late == 0x11111111);
}

TEST_CASE("a message longer than its room is an error at the receiver", "[comm][errors]") {
  LocalFabric fabric(2);
  const auto a = fabric.MakeTransport(0), b = fabric.MakeTransport(1);
  std::vector<std::byte> sent(9), room(8);
  REQUIRE(a->PostSend(1, 1, sent).ok());
  const auto handle = b->PostRecv(0, 1, room);
  REQUIRE(handle.ok());
  REQUIRE(b->Test(*handle, nullptr).status().code() == absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace ballast
