// Ranks as threads over the fake of NCCL.
#ifndef BALLAST_TESTS_COMM_NCCL_RANKS_H_
#define BALLAST_TESTS_COMM_NCCL_RANKS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "comm/nccl_communicator.h"
#include "tests/support/fake_nccl.h"

namespace ballast::testing {

// What a rank has at hand.
struct NcclRank {
  int rank;
  NcclApi* api;
  GpuStream stream;
  Transport* transport;
  Communicator* world;
  // Buffers of this rank's exchanges: as on a device, they outlive what still runs.
  std::deque<std::vector<std::byte>>* memory;

  // Device memory of so many bytes.
  std::span<std::byte> Allocate(size_t bytes) const {
    memory->emplace_back(bytes);
    return memory->back();
  }
};

// Runs `fn` on as many threads as `fake` has ranks; memory lives until all have returned.
std::vector<absl::Status> RunNcclRanks(FakeNccl* fake,
                                       const std::function<absl::Status(const NcclRank&)>& fn,
                                       int64_t world_deadline_ms = 60'000);

// How much goes from each rank to each in an exchange, drawn from `seed`; a third of it nothing.
std::vector<size_t> RandomPairBytes(int ranks, uint64_t seed);

// Begins the exchange of `pair_bytes`, with bytes that tell sender, receiver and place.
struct TestExchange {
  std::vector<size_t> pair_bytes;
  bool hierarchical = false;
  std::span<std::byte> recv = {};         // set by Begin
  std::vector<size_t> recv_offsets = {};  // set by Begin

  absl::Status Begin(NcclCommunicator* comm, const NcclRank& at);
  // After Wait: whether this rank has what it should have.
  absl::Status Check(const NcclCommunicator& comm) const;
  // Begin, Wait and Check.
  absl::Status Run(NcclCommunicator* comm, const NcclRank& at);
};

// Whether the message has `what` in it.
bool Names(const absl::Status& status, const std::string& what);
// OK if `status` has `code` and names `what`; otherwise kInternal with it.
absl::Status Expect(const absl::Status& status, absl::StatusCode code, const std::string& what);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_COMM_NCCL_RANKS_H_
