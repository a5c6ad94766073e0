#include "runtime/expert_reader.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "tests/runtime/store_fixture.h"

namespace ballast {
namespace {

using namespace testing;  // NOLINT: the fixture

absl::Status ReadRight(int32_t layer, int32_t expert, std::span<std::byte> block) {
  for (size_t i = 0; i < block.size(); ++i) block[i] = ExpertByte(layer, expert, i);
  return absl::OkStatus();
}

// The same rows as RelayPlan: rank 1 reads the expert, and rank 2 too or from rank 1.
MigrationPlan FilePlan(const Placement& placement, int64_t plan_id, bool relay) {
  auto plan = MakeMigrationPlan(placement, {{0, {0, 1, kNoExpert, 2, 3, 0, 4, 5, 0}}}, plan_id,
                                CopySource::kFile);
  REQUIRE(plan.ok());
  if (relay) plan->moves[1].from_rank = 1;
  REQUIRE(plan->Apply(placement).ok());
  return *plan;
}

// A reader that waits until it is let through, and says so.
struct SlowReader {
  std::atomic<int> begun = 0, allowed = 0, ended = 0;
  ReadExpert read() {
    return [this](int32_t layer, int32_t expert, std::span<std::byte> block) {
      const int mine = ++begun;
      while (allowed < mine) sched_yield();
      const absl::Status read = ReadRight(layer, expert, block);
      ++ended;
      return read;
    };
  }
};

TEST_CASE("the checkpoint is a source too and what it gave can be relayed", "[runtime][store]") {
  const Placement initial = Initial();
  for (const bool relay : {false, true}) {
    CAPTURE(relay);
    const MigrationPlan plan = FilePlan(initial, 1, relay);
    const auto statuses = RunRanks(kRanks, [&](Transport* transport, Communicator*, int rank) {
      const auto store = FilledStore(transport, initial, 192, 4, ReadRight);
      BALLAST_RETURN_IF_ERROR(store->Stage(plan, initial));
      BALLAST_RETURN_IF_ERROR(PollUntilStaged(store.get(), 300));
      store->Commit(*plan.Apply(initial));
      const bool counted = store->copies_read() == (rank == 1 || (rank == 2 && !relay)) &&
                           store->copies_received() == (rank == 2 && relay);
      if (!counted) return absl::InternalError("copies are miscounted");
      return CheckHolds(*store, *plan.Apply(initial), rank);
    });
    REQUIRE(FirstError(statuses) == "");
  }
}

TEST_CASE("an expert that cannot be read fails the plan by name and the next one succeeds",
          "[runtime][store][errors]") {
  const Placement initial = Initial();
  for (const bool relay : {false, true}) {
    CAPTURE(relay);
    std::atomic<int> ended = 0;
    const auto statuses = RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
      bool broken = true;
      const auto store = FilledStore(transport, initial, 192, /*staging=*/1,
                                     [&](int32_t layer, int32_t e, std::span<std::byte> block) {
                                       return broken && rank == 1
                                                  ? absl::DataLossError("/model: cut off")
                                                  : ReadRight(layer, e, block);
                                     });
      BALLAST_RETURN_IF_ERROR(store->Stage(FilePlan(initial, 1, relay), initial));
      const absl::Status status = PollUntilStaged(store.get(), 300);
      for (++ended; ended < kRanks; sched_yield()) Poll(store.get(), 300).IgnoreError();
      BALLAST_RETURN_IF_ERROR(Barrier(comm));
      store->Discard();
      BALLAST_RETURN_IF_ERROR(PollUntilIdle(store.get()));
      broken = false;
      BALLAST_RETURN_IF_ERROR(Barrier(comm));
      const MigrationPlan next = FilePlan(initial, 2, relay);
      BALLAST_RETURN_IF_ERROR(store->Stage(next, initial));
      BALLAST_RETURN_IF_ERROR(PollUntilStaged(store.get(), 300));
      store->Commit(*next.Apply(initial));
      BALLAST_RETURN_IF_ERROR(CheckHolds(*store, *next.Apply(initial), rank));
      return status;
    });
    REQUIRE(statuses[0].ok());
    REQUIRE(statuses[1].message() == "layer 0, expert 0 from the checkpoint: /model: cut off");
    REQUIRE(statuses[2].ok() == !relay);
  }
}

TEST_CASE("a store without a reader refuses plans that read", "[runtime][store][errors]") {
  const Placement initial = Initial();
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(0);
  const auto store = FilledStore(transport.get(), initial);
  REQUIRE(store->Stage(FilePlan(initial, 1, false), initial).code() ==
          absl::StatusCode::kUnimplemented);
  REQUIRE_FALSE(store->staging());
}

TEST_CASE("a block that is being read is not used for anything else", "[runtime][store]") {
  // Rank 1 alone, with room for two copies. Experts 0 and 1 come from the checkpoint.
  const Placement initial = Initial();
  const auto plan_of = [&](int64_t plan_id) {
    return *MakeMigrationPlan(initial,
                              {{0, {0, 1, kNoExpert, 2, 3, 0, 4, 5, kNoExpert}},
                               {1, {0, 1, kNoExpert, 2, 3, 1, 4, 5, kNoExpert}}},
                              plan_id, CopySource::kFile);
  };
  for (const bool abandon : {false, true}) {
    CAPTURE(abandon);
    SlowReader reader;
    LocalFabric fabric(kRanks);
    const auto transport = fabric.MakeTransport(1);
    const auto store = FilledStore(transport.get(), initial, 192, /*staging=*/2, reader.read());
    const size_t memory = store->memory_bytes();
    REQUIRE(store->Stage(plan_of(1), initial).ok());
    while (reader.begun < 1) sched_yield();
    REQUIRE(*Poll(store.get(), 1 << 20) == false);
    // The first read is under way, the second has not begun. Neither holds anything up.
    abandon ? store->Abandon() : store->Discard();
    REQUIRE_FALSE(store->staging());
    REQUIRE(store->memory_bytes() == memory + RoundUp(kBlockBytes, kCacheLineBytes));
    REQUIRE(store->Stage(plan_of(2), initial).ok());
    abandon ? store->Abandon() : store->Discard();
    REQUIRE(store->Stage(plan_of(3), initial).ok());
    REQUIRE(reader.begun == 1);
    reader.allowed = 100;
    REQUIRE(PollUntilStaged(store.get(), 1 << 20).ok());
    REQUIRE(reader.begun == 3);  // what had not begun was dropped
    store->Commit(*plan_of(3).Apply(initial));
    REQUIRE(CheckHolds(*store, *plan_of(3).Apply(initial), 1) == absl::OkStatus());
    REQUIRE(store->memory_bytes() == memory + RoundUp(kBlockBytes, kCacheLineBytes));
  }
}

TEST_CASE("a read that ends late writes into its own block", "[runtime][store]") {
  const Placement initial = Initial();
  SlowReader reader;
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(1);
  const auto store = FilledStore(transport.get(), initial, 192, /*staging=*/1, reader.read());
  REQUIRE(store->Stage(FilePlan(initial, 1, false), initial).ok());
  while (reader.begun < 1) sched_yield();
  store->Discard();
  // The only block that is to spare is another one.
  const std::span<std::byte> block = store->Allocate(1, 5);
  std::ranges::fill(block, std::byte{77});
  reader.allowed = 1;
  while (reader.ended < 1) sched_yield();
  REQUIRE(std::ranges::all_of(block, [](std::byte b) { return b == std::byte{77}; }));
}

// A disk that hangs is in nobody's way but the reader's.
TEST_CASE("a regrouping does not wait for a read under way, the end of a store does",
          "[runtime][store]") {
  const Placement initial = Initial();
  const MigrationPlan plan = FilePlan(initial, 1, false);
  SlowReader reader;
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(1);
  auto store = FilledStore(transport.get(), initial, 192, 1, reader.read());
  REQUIRE(store->Stage(plan, initial).ok());
  while (reader.begun < 1) sched_yield();
  store->Abandon();
  for (int i = 0; i < 3; ++i) {
    REQUIRE(store->Regroup(1, transport.get(), initial).ok());
    REQUIRE(store->Stage(plan, initial).ok());
    REQUIRE(*Poll(store.get(), 1 << 20) == false);
    store->Abandon();
  }
  REQUIRE(reader.begun == 1);
  std::thread allow([&reader] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    reader.allowed = 1;
  });
  store.reset();
  REQUIRE(reader.allowed == 1);
  allow.join();
}

TEST_CASE("what is read has to be what was packed first", "[runtime][store][errors]") {
  const Placement initial = Initial();
  LocalFabric fabric(kRanks);
  const auto of_rank_0 = fabric.MakeTransport(0), of_rank_1 = fabric.MakeTransport(1);
  const auto holder = FilledStore(of_rank_0.get(), initial);
  bool overwritten = true;
  const auto store = FilledStore(of_rank_1.get(), initial, 192, /*staging=*/1,
                                 [&](int32_t layer, int32_t e, std::span<std::byte> block) {
                                   const absl::Status read = ReadRight(layer, e, block);
                                   if (overwritten) block[kBlockBytes / 2] ^= std::byte{2};
                                   return read;
                                 });
  // Rank 1 knows what rank 0 packed, but for what rank 0 has not got itself.
  REQUIRE(store->SealedChecksum(0, 0) == 0);
  REQUIRE(store->Learn(holder->checksums()).ok());
  REQUIRE(store->SealedChecksum(0, 0) == ChecksumOf(*holder, 0, 0));
  REQUIRE(store->SealedChecksum(0, 4) == 0);

  REQUIRE(store->Stage(FilePlan(initial, 1, false), initial).ok());
  const absl::Status status = PollUntilStaged(store.get(), 1 << 20);
  REQUIRE(status.code() == absl::StatusCode::kDataLoss);
  REQUIRE(status.message().find("layer 0, expert 0 from the checkpoint has checksum") == 0);
  store->Discard();
  overwritten = false;
  REQUIRE(store->Stage(FilePlan(initial, 2, false), initial).ok());
  REQUIRE(PollUntilStaged(store.get(), 1 << 20).ok());

  // Two that packed an expert differently read different checkpoints.
  std::vector<uint64_t> other(holder->checksums().begin(), holder->checksums().end());
  other[1] += 1;
  const absl::Status learned = holder->Learn(other);
  REQUIRE(learned.code() == absl::StatusCode::kDataLoss);
  REQUIRE(learned.message().find("layer 0, expert 1 was packed with checksum") == 0);
}

}  // namespace
}  // namespace ballast
