#include "tests/comm/conformance.h"

#include <sched.h>

#include <cstring>
#include <vector>

#include "base/random.h"
#include "base/status.h"

namespace ballast::testing {
namespace {

// Byte `i` of what `from` sends to `to` in round `round`.
std::byte Pattern(int from, int to, int round, size_t i) {
  const uint64_t place =
      (static_cast<uint64_t>(from) << 40) ^ (static_cast<uint64_t>(to) << 32) ^ i;
  return static_cast<std::byte>(RandomBits(static_cast<uint64_t>(round), place));
}

// Both sides know how much travels between a pair: nothing for some, more than a pipe for others.
size_t PairBytes(int from, int to, int round) {
  const uint64_t draw = RandomBits(77, static_cast<uint64_t>((round * 64 + from) * 64 + to));
  if (draw % 3 == 0) return 0;
  return draw % 5 == 0 ? 200'000 + draw % 1000 : 1 + draw % 300;
}

}  // namespace

absl::Status CheckAllGather(Communicator* comm) {
  for (int round = 0; round < 20; ++round) {
    const size_t bytes = size_t{1} << round % 17;
    std::vector<std::byte> mine(bytes), all(bytes * static_cast<size_t>(comm->size()));
    for (size_t i = 0; i < bytes; ++i) mine[i] = Pattern(comm->rank(), 0, round, i);
    BALLAST_RETURN_IF_ERROR(comm->AllGather(round, mine, all));
    for (int from = 0; from < comm->size(); ++from) {
      for (size_t i = 0; i < bytes; ++i) {
        if (all[static_cast<size_t>(from) * bytes + i] == Pattern(from, 0, round, i)) continue;
        return absl::InternalError(absl::StrCat("all-gather of ", bytes, " bytes: byte ", i,
                                                " from rank ", from, " is wrong"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckExchange(Communicator* comm) {
  // Two exchanges in turn, as dispatch and combine use them.
  Communicator::Exchange exchanges[2] = {Communicator::Exchange(comm),
                                         Communicator::Exchange(comm)};
  const int me = comm->rank();
  const size_t ranks = static_cast<size_t>(comm->size());
  for (int round = 0; round < 30; ++round) {
    Communicator::Exchange& exchange = exchanges[round % 2];
    std::vector<size_t> send(ranks), room(ranks);
    for (size_t p = 0; p < ranks; ++p) {
      const int peer = static_cast<int>(p);
      send[p] = PairBytes(me, peer, round);
      // More room than what comes, except where nothing comes.
      room[p] = PairBytes(peer, me, round);
      if (room[p] > 0) room[p] += static_cast<size_t>(round % 3) * 100;
      const auto buffer = exchange.SendBuffer(peer, send[p]);
      if (reinterpret_cast<uintptr_t>(buffer.data()) % kCacheLineBytes != 0) {
        return absl::InternalError("a send buffer is not aligned");
      }
      for (size_t i = 0; i < send[p]; ++i) buffer[i] = Pattern(me, peer, round, i);
    }
    BALLAST_RETURN_IF_ERROR(exchange.Post(round, send, room));
    BALLAST_RETURN_IF_ERROR(exchange.Wait());
    for (size_t p = 0; p < ranks; ++p) {
      const int peer = static_cast<int>(p);
      const auto got = exchange.Received(peer);
      bool right = got.size() == PairBytes(peer, me, round);
      for (size_t i = 0; right && i < got.size(); ++i) {
        right = got[i] == Pattern(peer, me, round, i);
      }
      if (right) continue;
      return absl::InternalError(absl::StrCat("exchange ", round, ": rank ", me, " got ",
                                              got.size(), " wrong bytes from rank ", peer));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckOrder(Transport* transport) {
  constexpr int kMessages = 20, kOtherTag = 3;
  const int me = transport->rank(), size = transport->size();
  if (size == 1) return absl::OkStatus();
  const int next = (me + 1) % size, before = (me + size - 1) % size;
  std::vector<int32_t> out(kMessages), in(kMessages, -1), other_in(1, -1);
  const int32_t other_out = 1000 + me;
  std::vector<Transport::Handle> open;
  const auto post = [&](absl::StatusOr<Transport::Handle> handle) {
    if (handle.ok()) open.push_back(*handle);
    return handle.status();
  };
  // The other tag is received first and sent last: tags do not wait for one another.
  BALLAST_RETURN_IF_ERROR(post(transport->PostRecv(
      before, kOtherTag, std::as_writable_bytes(std::span(other_in)))));
  for (int i = 0; i < kMessages; ++i) {
    out[i] = me * 100 + i;
    BALLAST_RETURN_IF_ERROR(
        post(transport->PostSend(next, kTagMigration, std::as_bytes(std::span(&out[i], 1)))));
  }
  for (int i = 0; i < kMessages; ++i) {
    BALLAST_RETURN_IF_ERROR(post(transport->PostRecv(
        before, kTagMigration, std::as_writable_bytes(std::span(&in[i], 1)))));
  }
  BALLAST_RETURN_IF_ERROR(
      post(transport->PostSend(next, kOtherTag, std::as_bytes(std::span(&other_out, 1)))));
  while (!open.empty()) {
    size_t received = 0;
    BALLAST_ASSIGN_OR_RETURN(const bool done, transport->Test(open.back(), &received));
    if (done) {
      open.pop_back();
    } else {
      sched_yield();
    }
  }
  for (int i = 0; i < kMessages; ++i) {
    if (in[i] != before * 100 + i) {
      return absl::InternalError(absl::StrCat("message ", i, " from rank ", before, " is ", in[i]));
    }
  }
  if (other_in[0] != 1000 + before) return absl::InternalError("the other tag's message is wrong");
  return absl::OkStatus();
}

}  // namespace ballast::testing
