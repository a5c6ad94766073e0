#include "tests/comm/nccl_ranks.h"

#include "base/random.h"
#include "base/status.h"
#include "tests/support/run_ranks.h"

namespace ballast::testing {
namespace {

constexpr int64_t kLongMs = 60'000;

std::byte Pattern(size_t from, size_t to, size_t i) {
  return static_cast<std::byte>(RandomBits(from * 1000 + to, i));
}

}  // namespace

std::vector<absl::Status> RunNcclRanks(FakeNccl* fake,
                                       const std::function<absl::Status(const NcclRank&)>& fn,
                                       int64_t world_deadline_ms) {
  std::vector<std::deque<std::vector<std::byte>>> memory(static_cast<size_t>(fake->num_ranks()));
  return RunRanks(
      fake->num_ranks(),
      [&](Transport* transport, Communicator* world, int rank) {
        return fn({.rank = rank,
                   .api = fake->api(rank),
                   .stream = fake->stream(rank),
                   .transport = transport,
                   .world = world,
                   .memory = &memory[static_cast<size_t>(rank)]});
      },
      world_deadline_ms);
}

std::vector<size_t> RandomPairBytes(int ranks, uint64_t seed) {
  Random random(seed);
  std::vector<size_t> pair_bytes(static_cast<size_t>(ranks * ranks));
  for (size_t& bytes : pair_bytes) bytes = random.Below(3) == 0 ? 0 : 1 + random.Below(500);
  return pair_bytes;
}

absl::Status TestExchange::Begin(NcclCommunicator* comm, const NcclRank& at) {
  const size_t ranks = static_cast<size_t>(comm->size()), self = static_cast<size_t>(comm->rank());
  const std::span<const size_t> send_bytes(pair_bytes.data() + self * ranks, ranks);
  std::vector<size_t> send_offsets(ranks), recv_bytes(ranks);
  comm->hierarchy().SendOffsets(send_bytes, send_offsets);
  size_t sent = 0, received = 0;
  for (const size_t bytes : send_bytes) sent += bytes;
  recv_offsets.resize(ranks);
  for (size_t s = ranks; s-- > 0;) {  // in another order than the send buffer
    recv_bytes[s] = pair_bytes[s * ranks + self];
    recv_offsets[s] = received;
    received += recv_bytes[s];
  }
  const std::span<std::byte> send = at.Allocate(sent);
  recv = at.Allocate(received);
  for (size_t d = 0; d < ranks; ++d) {
    for (size_t i = 0; i < send_bytes[d]; ++i) send[send_offsets[d] + i] = Pattern(self, d, i);
  }
  if (hierarchical) {
    return comm->HierarchicalAllToAllV({.send = send.data(),
                                        .recv = recv.data(),
                                        .pair_bytes = pair_bytes,
                                        .recv_offsets = recv_offsets},
                                       at.stream);
  }
  return comm->AllToAllV({.send = send.data(),
                          .send_bytes = send_bytes,
                          .send_offsets = send_offsets,
                          .recv = recv.data(),
                          .recv_bytes = recv_bytes,
                          .recv_offsets = recv_offsets},
                         at.stream);
}

absl::Status TestExchange::Check(const NcclCommunicator& comm) const {
  const size_t ranks = static_cast<size_t>(comm.size()), self = static_cast<size_t>(comm.rank());
  for (size_t s = 0; s < ranks; ++s) {
    for (size_t i = 0; i < pair_bytes[s * ranks + self]; ++i) {
      if (recv[recv_offsets[s] + i] == Pattern(s, self, i)) continue;
      return absl::InternalError(
          absl::StrCat("rank ", self, ": byte ", i, " from rank ", s, " is wrong"));
    }
  }
  return absl::OkStatus();
}

absl::Status TestExchange::Run(NcclCommunicator* comm, const NcclRank& at) {
  BALLAST_RETURN_IF_ERROR(Begin(comm, at));
  BALLAST_RETURN_IF_ERROR(comm->Wait(at.stream, kLongMs));
  return Check(*comm);
}

bool Names(const absl::Status& status, const std::string& what) {
  return std::string(status.message()).find(what) != std::string::npos;
}

absl::Status Expect(const absl::Status& status, absl::StatusCode code, const std::string& what) {
  if (status.code() == code && Names(status, what)) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("wanted ", absl::StatusCodeToString(code), " with \"",
                                          what, "\", got ", status.ToString()));
}

}  // namespace ballast::testing
