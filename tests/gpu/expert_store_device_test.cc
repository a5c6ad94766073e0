// Plans that move experts between the memories of ranks on a device.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <optional>
#include <vector>

#include "runtime/expert_store.h"
#include "runtime/verifier.h"
#include "tests/gpu/schedules.h"
#include "tests/gpu/store_machine.h"

namespace ballast {
namespace {

using namespace testing;  // NOLINT: the fixture

absl::Status ReadRight(int32_t layer, int32_t expert, std::span<std::byte> block) {
  for (size_t i = 0; i < block.size(); ++i) block[i] = ExpertByte(layer, expert, i);
  return absl::OkStatus();
}

// Copies of experts 0, 2 and 4 in layer 0; in layer 1 ranks 0 and 1 swap experts.
MigrationPlan Forth(const Placement& from, int64_t plan_id,
                    CopySource source = CopySource::kRanks) {
  return *MakeMigrationPlan(
      from,
      {{0, {0, 1, 4, 2, 3, 0, 4, 5, 2}}, {1, {2, 1, kNoExpert, 0, 3, kNoExpert, 4, 5, kNoExpert}}},
      plan_id, source);
}
MigrationPlan Back(const Placement& from, int64_t plan_id) {
  return *MakeMigrationPlan(from,
                            {{0, {0, 1, kNoExpert, 2, 3, kNoExpert, 4, 5, kNoExpert}},
                             {1, {0, 1, kNoExpert, 2, 3, kNoExpert, 4, 5, kNoExpert}}},
                            plan_id);
}
// Expert 0 of layer 0 goes to ranks 1 and 2: rank 1 relays it.
MigrationPlan Relay(const Placement& from, int64_t plan_id) {
  auto plan = *MakeMigrationPlan(from, {{0, {0, 1, kNoExpert, 2, 3, 0, 4, 5, 0}}}, plan_id);
  REQUIRE(plan.moves == std::vector<Move>{{0, 0, 0, 5}, {0, 0, 1, 8}});
  return plan;
}

TEST_CASE("plans move experts between memories of a device and nothing waits for it",
          "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    const bool open = round % 2 == 0;
    CAPTURE(open);
    StoreMachine machine(initial, {.open = open, .chunk_bytes = round % 3 == 0 ? 4096u : 400u});
    const MigrationPlan forth = Forth(initial, 1);
    const Placement middle = *forth.Apply(initial);
    const uint64_t calls = BlockingCalls();
    machine.Stage(forth, initial);
    machine.PollUntilStaged(round % 4 < 2 ? 1 : 1 << 20);
    REQUIRE(BlockingCalls() == calls);
    machine.RequireHolds(initial);
    const uint64_t before_flip = BlockingCalls();
    machine.CommitAll(middle);
    REQUIRE(BlockingCalls() == before_flip);
    machine.RequireHolds(middle);
    const MigrationPlan back = Back(middle, 2);
    machine.Stage(back, middle);
    machine.PollUntilStaged(1 << 20);
    machine.CommitAll(*back.Apply(middle));
    machine.RequireHolds(*back.Apply(middle));
    int64_t received = 0;
    for (int rank = 0; rank < kRanks; ++rank) received += machine.store(rank).bytes_received();
    REQUIRE(received ==
            static_cast<int64_t>((forth.moves.size() + back.moves.size()) * kBlockBytes));
  });
}

TEST_CASE("a relay on a device sends on what has arrived and no more", "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    const bool open = round % 2 == 0;
    CAPTURE(open);
    StoreMachine machine(initial, {.open = open, .chunk_bytes = 208});
    const MigrationPlan plan = Relay(initial, 1);
    machine.Stage(plan, initial);
    for (int i = 0; machine.PollAll(1) < kRanks; ++i) {
      REQUIRE(i < 100'000);
      REQUIRE(machine.store(2).bytes_received() <= machine.store(1).bytes_received());
    }
    for (int rank = 0; rank < kRanks; ++rank) REQUIRE(machine.error(rank).ok());
    machine.CommitAll(*plan.Apply(initial));
    machine.RequireHolds(*plan.Apply(initial));
  });
}

TEST_CASE("what was corrupted in a device's memory is found by whoever gets it",
          "[device][store]") {
  const Placement initial = Initial();
  for (const bool open : {false, true}) {
    CAPTURE(open);
    StoreMachine machine(initial, {.open = open});
    const MigrationPlan plan = Relay(initial, 1);
    const int32_t block = machine.store(0).BlockOf(0, 0);
    machine.FlipByte(0, block, 777);
    machine.Stage(plan, initial);
    for (int i = 0; machine.error(1).ok() || machine.error(2).ok(); ++i) {
      REQUIRE(i < 100'000);
      machine.PollAll(1 << 20);
    }
    for (const int rank : {1, 2}) {
      REQUIRE(machine.error(rank).code() == absl::StatusCode::kDataLoss);
    }
    REQUIRE(machine.error(0).ok());
    machine.DiscardAll();
    machine.FlipByte(0, block, 777);
    machine.RequireHolds(initial);
    const MigrationPlan next = Forth(initial, 2);
    machine.Stage(next, initial);
    for (int i = 0; machine.PollAll(1 << 20) < kRanks; ++i) REQUIRE(i < 100'000);
    machine.CommitAll(*next.Apply(initial));
    machine.RequireHolds(*next.Apply(initial));
  }
}

TEST_CASE("what was corrupted on its way to a device is found", "[device][store]") {
  const Placement initial = Initial();
  StoreMachine machine(initial, {.chunk_bytes = 400});
  machine.Stage(Relay(initial, 1), initial);
  machine.transport(0).FlipNext();
  for (int i = 0; machine.error(1).ok() || machine.error(2).ok(); ++i) {
    REQUIRE(i < 100'000);
    machine.PollAll(1 << 20);
  }
  REQUIRE(machine.error(1).code() == absl::StatusCode::kDataLoss);
  machine.DiscardAll();
  machine.RequireHolds(initial);
}

TEST_CASE("what was corrupted in a device's block while the rest of it came is found",
          "[device][store]") {
  const Placement initial = Initial();
  for (const bool open : {false, true}) {
    CAPTURE(open);
    StoreMachine machine(initial, {.open = open, .chunk_bytes = 208});
    machine.Stage(Relay(initial, 1), initial);
    // Rank 1 holds four experts: the next block is the fifth.
    for (int i = 0; machine.store(1).bytes_received() < 3 * 208; ++i) {
      REQUIRE(i < 100'000);
      machine.PollAll(1);
    }
    machine.FlipByte(1, 4, 5);
    for (int i = 0; machine.error(1).ok(); ++i) {
      REQUIRE(i < 100'000);
      machine.PollAll(1 << 20);
    }
    REQUIRE(machine.error(1).code() == absl::StatusCode::kDataLoss);
    machine.DiscardAll();
    machine.RequireHolds(initial);
  }
}

TEST_CASE("a verifier has a device read its memory and waits for nothing", "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    StoreMachine machine(initial, {});
    const int32_t layer = round % 2, expert = 2 + round / 2 % 2;  // of rank 1
    const int32_t block = machine.store(1).BlockOf(layer, expert);
    machine.FlipByte(1, block, static_cast<size_t>(round) * 50);
    Verifier verifier({.num_layers = kLayers, .num_experts = kExperts}, &machine.store(1));
    verifier.Ask();
    const uint64_t calls = BlockingCalls();
    std::optional<std::vector<VerifiedCopy>> pass;
    for (int64_t now = 0; !pass.has_value(); ++now) {
      REQUIRE(now < 100'000);
      verifier.Advance(now);
      pass = verifier.TakePass();
    }
    REQUIRE(BlockingCalls() == calls);
    REQUIRE(pass->size() == 4);
    const std::vector<VerifiedCopy> corrupted = verifier.TakeCorrupted();
    REQUIRE(corrupted.size() == 1);
    REQUIRE(corrupted[0].layer == layer);
    REQUIRE(corrupted[0].expert == expert);
    // It is loaded again into the same block.
    std::ranges::copy(StoreMachine::ExpertBytes(layer, expert),
                      machine.store(1).Allocate(layer, expert).begin());
    REQUIRE(machine.store(1).Seal(layer, expert).ok());
    REQUIRE(machine.store(1).BlockOf(layer, expert) == block);
    machine.RequireHolds(initial);
  });
}

TEST_CASE("a plan on a device given up at any moment leaves everything as it was",
          "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    const bool open = round % 2 == 0;
    StoreMachine machine(initial, {.open = open, .chunk_bytes = 208});
    for (int64_t id = 1; id <= 3; ++id) {
      CAPTURE(open, id);
      machine.Stage(id % 2 == 0 ? Relay(initial, id) : Forth(initial, id), initial);
      // Some ranks further than others.
      for (int i = 0; i < round * 2; ++i) {
        const int rank = (i * 7 + static_cast<int>(id)) % kRanks;
        REQUIRE(Poll(&machine.store(rank), 300).ok());
      }
      machine.DiscardAll();
    }
    machine.RequireHolds(initial);
    const MigrationPlan plan = Forth(initial, 4);
    machine.Stage(plan, initial);
    machine.PollUntilStaged(1 << 20);
    machine.CommitAll(*plan.Apply(initial));
    machine.RequireHolds(*plan.Apply(initial));
  });
}

TEST_CASE("ranks that abandon a plan on a device go on with the next one", "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    const bool open = round % 2 == 0;
    CAPTURE(open);
    StoreMachine machine(initial, {.open = open, .chunk_bytes = 208});
    machine.Stage(Forth(initial, 1), initial);
    for (int i = 0; i < round; ++i) machine.PollAll(1);
    // Copies may be under way into blocks that are free now. What was sent is never taken: the next
    // transport is another one.
    LocalFabric next(kRanks);
    std::vector<std::unique_ptr<Transport>> transports;
    for (int rank = 0; rank < kRanks; ++rank) {
      transports.push_back(next.MakeTransport(rank));
      machine.store(rank).Abandon();
      REQUIRE(machine.store(rank).Regroup(rank, transports[rank].get(), initial).ok());
    }
    machine.RequireHolds(initial);
    REQUIRE_FALSE(machine.blocks(0).IsOpenTo(1));
    if (open) machine.SetPeers();
    const MigrationPlan plan = Relay(initial, 2);
    machine.Stage(plan, initial);
    machine.PollUntilStaged(1 << 20);
    machine.CommitAll(*plan.Apply(initial));
    machine.RequireHolds(*plan.Apply(initial));
    for (int rank = 0; rank < kRanks; ++rank) {  // before their transports go
      REQUIRE(
          machine.store(rank).Regroup(rank, &machine.transport(rank), *plan.Apply(initial)).ok());
    }
  });
}

TEST_CASE("a device's blocks are read from the checkpoint through few rooms", "[device][store]") {
  const Placement initial = Initial();
  ForEachSchedule([&](int round) {
    StoreMachine machine(initial, {.open = round % 2 == 0,
                                   .chunk_bytes = round % 3 == 0 ? 4096u : 400u,
                                   .rooms = 1 + round % 2,
                                   .read = ReadRight});
    MigrationPlan plan = Forth(initial, 1, CopySource::kFile);
    const uint64_t calls = BlockingCalls();
    machine.Stage(plan, initial);
    machine.PollUntilStaged(1 << 20);
    REQUIRE(BlockingCalls() == calls);
    int64_t read = 0;
    for (int rank = 0; rank < kRanks; ++rank) read += machine.store(rank).copies_read();
    REQUIRE(read == static_cast<int64_t>(plan.moves.size()));
    machine.CommitAll(*plan.Apply(initial));
    machine.RequireHolds(*plan.Apply(initial));
  });
}

TEST_CASE("a read that hangs keeps its room and no block of a device", "[device][store]") {
  const int32_t rooms = GENERATE(1, 2);
  const Placement initial = Initial();
  std::atomic<int> begun = 0, ended = 0;
  std::atomic<bool> allowed = false;
  const auto read = [&](int32_t layer, int32_t expert, std::span<std::byte> block) {
    ++begun;
    while (!allowed) sched_yield();
    const absl::Status status = ReadRight(layer, expert, block);
    ++ended;
    return status;
  };
  const auto plan = [&](int64_t id) {
    return *MakeMigrationPlan(initial, {{0, {0, 1, kNoExpert, 2, 3, 0, 4, 5, kNoExpert}}}, id,
                              CopySource::kFile);
  };
  StoreMachine machine(initial, {.staging = 3, .rooms = rooms, .read = read});
  const size_t memory = machine.store(1).memory_bytes();
  machine.Stage(plan(1), initial);
  while (begun < 1) sched_yield();
  REQUIRE(machine.PollAll(1 << 20) == kRanks - 1);
  machine.DiscardAll();
  REQUIRE_FALSE(machine.store(1).staging());
  REQUIRE(machine.store(1).memory_bytes() == memory);
  // All blocks are to be had: a plan that brings as many as there is room for goes from the ranks.
  const MigrationPlan forth = Forth(initial, 2);
  machine.Stage(forth, initial);
  machine.PollUntilStaged(1 << 20);
  machine.DiscardAll();
  // The next read waits for the reader's thread, in the other room, or for a room.
  machine.Stage(plan(3), initial);
  machine.DiscardAll();
  machine.Stage(plan(4), initial);
  allowed = true;
  machine.PollUntilStaged(1 << 20);
  REQUIRE(begun == 2);
  machine.CommitAll(*plan(4).Apply(initial));
  machine.RequireHolds(*plan(4).Apply(initial));
}

TEST_CASE("what is read for a device has to be what was packed first", "[device][store][errors]") {
  const Placement initial = Initial();
  std::atomic<bool> overwritten = true;
  StoreMachine machine(initial, {.read = [&](int32_t layer, int32_t e, std::span<std::byte> block) {
                         const absl::Status read = ReadRight(layer, e, block);
                         if (overwritten) block[kBlockBytes / 2] ^= std::byte{2};
                         return read;
                       }});
  const auto plan = [&](int64_t id) {
    return *MakeMigrationPlan(initial, {{0, {0, 1, kNoExpert, 2, 3, 0, 4, 5, kNoExpert}}}, id,
                              CopySource::kFile);
  };
  REQUIRE(machine.store(1).Learn(machine.store(0).checksums()).ok());
  machine.Stage(plan(1), initial);
  for (int i = 0; machine.error(1).ok(); ++i) {
    REQUIRE(i < 10'000'000);
    machine.PollAll(1 << 20);
  }
  REQUIRE(machine.error(1).code() == absl::StatusCode::kDataLoss);
  machine.DiscardAll();
  overwritten = false;
  machine.Stage(plan(2), initial);
  for (int i = 0; machine.PollAll(1 << 20) < kRanks; ++i) REQUIRE(i < 10'000'000);
  machine.CommitAll(*plan(2).Apply(initial));
  machine.RequireHolds(*plan(2).Apply(initial));
}

TEST_CASE("a regrouping makes a device's arena grow and keeps what it holds", "[device][store]") {
  const Placement initial = Initial();
  StoreMachine machine(initial, {.open = true, .staging = 1});
  const MigrationPlan plan = Forth(initial, 1);
  REQUIRE(machine.store(0).Stage(plan, initial).code() == absl::StatusCode::kResourceExhausted);
  for (int rank = 0; rank < kRanks; ++rank) {
    const std::byte* const arena = machine.blocks(rank).arena();
    REQUIRE(machine.store(rank).Regroup(rank, &machine.transport(rank), initial).ok());
    REQUIRE(machine.blocks(rank).arena() != arena);
  }
  machine.RequireHolds(initial);
  for (const bool open : {false, true}) {  // first by messages: nobody knows the new arenas
    if (open) machine.SetPeers();
    machine.Stage(plan, initial);
    machine.PollUntilStaged(1 << 20);
    if (!open) machine.DiscardAll();
  }
  machine.CommitAll(*plan.Apply(initial));
  machine.RequireHolds(*plan.Apply(initial));
}

}  // namespace
}  // namespace ballast
