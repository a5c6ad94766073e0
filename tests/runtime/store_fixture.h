#ifndef BALLAST_TESTS_RUNTIME_STORE_FIXTURE_H_
#define BALLAST_TESTS_RUNTIME_STORE_FIXTURE_H_

#include <sched.h>

#include <catch2/catch.hpp>
#include <memory>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "base/status.h"
#include "runtime/expert_store.h"
#include "tests/support/run_ranks.h"
#include "tests/support/store_checksum.h"

// Three ranks with two layers of six experts, each of bytes that tell which it is.
namespace ballast::testing {

inline constexpr int32_t kLayers = 2, kExperts = 6, kRanks = 3, kSlots = 3;
inline constexpr size_t kBlockBytes = 1000;  // not a multiple of a chunk or of a cache line

// Byte `i` of the packed expert.
inline std::byte ExpertByte(int32_t layer, int32_t expert, size_t i) {
  return static_cast<std::byte>(RandomBits(static_cast<uint64_t>(layer * 100 + expert), i));
}

inline Placement Initial() {
  auto placement = Placement::Contiguous(kLayers, kExperts, Topology::Uniform(kRanks, kSlots),
                                         /*fill_spare=*/false);
  REQUIRE(placement.ok());
  return *placement;
}

inline std::unique_ptr<ExpertStore> FilledStore(Transport* transport, const Placement& placement,
                                                size_t chunk_bytes = 192, int32_t staging = 4,
                                                ReadExpert read = {}) {
  auto store =
      std::make_unique<ExpertStore>(ExpertStore::Options{.rank = transport->rank(),
                                                         .num_layers = kLayers,
                                                         .num_experts = kExperts,
                                                         .block_bytes = kBlockBytes,
                                                         .resident_blocks = kLayers * kSlots,
                                                         .staging_blocks = staging,
                                                         .chunk_bytes = chunk_bytes,
                                                         .read = std::move(read)},
                                    transport);
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t e = 0; e < kExperts; ++e) {
      if (!placement.Hosts(layer, e, transport->rank())) continue;
      const auto block = store->Allocate(layer, e);
      for (size_t i = 0; i < block.size(); ++i) block[i] = ExpertByte(layer, e, i);
      BALLAST_CHECK(store->Seal(layer, e).ok());
    }
  }
  return store;
}

// The store holds what the placement gives to its rank, byte for byte, and nothing else.
inline absl::Status CheckHolds(const ExpertStore& store, const Placement& placement, int32_t rank) {
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t e = 0; e < kExperts; ++e) {
      const std::byte* block = store.Parameters(layer, e);
      bool right = (block != nullptr) == placement.Hosts(layer, e, rank);
      for (size_t i = 0; right && block != nullptr && i < kBlockBytes; ++i) {
        right = block[i] == ExpertByte(layer, e, i);
      }
      if (block != nullptr)
        right = right && ChecksumOf(store, layer, e) == store.SealedChecksum(layer, e);
      if (!right) {
        return absl::InternalError(absl::StrCat("layer ", layer, " expert ", e, " is not right"));
      }
    }
  }
  return absl::OkStatus();
}

// Moves about `bytes` each way.
inline absl::StatusOr<bool> Poll(ExpertStore* store, int64_t bytes) {
  TransferBudget budget{bytes, bytes};
  return store->Poll(&budget);
}

inline absl::Status PollUntilStaged(ExpertStore* store, int64_t budget) {
  for (int i = 0; i < 10'000'000; ++i) {
    BALLAST_ASSIGN_OR_RETURN(const bool done, Poll(store, budget));
    if (done) return absl::OkStatus();
    sched_yield();
  }
  return absl::DeadlineExceededError("never staged");
}

// Polls until nothing of a discarded plan is under way. All ranks have discarded by then.
inline absl::Status PollUntilIdle(ExpertStore* store) {
  for (int i = 0; i < 10'000'000 && store->staging(); ++i) {
    BALLAST_RETURN_IF_ERROR(Poll(store, 1 << 20).status());
    sched_yield();
  }
  return store->staging() ? absl::DeadlineExceededError("never idle") : absl::OkStatus();
}

inline absl::Status Barrier(Communicator* comm) {
  const std::byte mine{};
  std::vector<std::byte> all(static_cast<size_t>(comm->size()));
  return comm->AllGather(0, {&mine, 1}, all);
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_RUNTIME_STORE_FIXTURE_H_
