// Ranks that are processes move experts between their devices' memories: fetched from arenas that
// they lend each other, or in messages, with the emulator in each process. A case that fails on any
// rank aborts the whole job.
#define CATCH_CONFIG_RUNNER
#define CATCH_CONFIG_NO_POSIX_SIGNALS
#include <mpi.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/member_transport.h"
#include "comm/mpi_transport.h"
#include "comm/peer_memory.h"
#include "kernels/device_memory.h"
#include "runtime/device_blocks.h"
#include "runtime/expert_store.h"
#include "tests/runtime/store_fixture.h"
#include "tests/support/cuda_shim/emulator.h"

namespace ballast {
namespace {

using testing::ExpertByte;

MpiRuntime* mpi = nullptr;  // of main

constexpr int32_t kLayers = 2, kSlots = 3, kStaging = 2;
constexpr size_t kBytes = 5000, kChunk = 1024;

// Two experts a rank and layer, and a slot to spare.
Placement Home() {
  return *Placement::Contiguous(kLayers, 2 * mpi->size(), Topology::Uniform(mpi->size(), kSlots),
                                /*fill_spare=*/false);
}

Placement::LayerRow HomeRow(int32_t layer) {
  Placement::LayerRow row{layer, {}};
  for (int32_t r = 0; r < mpi->size(); ++r) {
    row.expert_of_slot.insert(row.expert_of_slot.end(), {2 * r, 2 * r + 1, kNoExpert});
  }
  return row;
}

// In layer 0 everybody gets expert 0, which is relayed; in layer 1 one of the next rank's.
MigrationPlan Spread(const Placement& from, int64_t plan_id) {
  Placement::LayerRow everybody{0, {}}, next{1, {}};
  for (int32_t r = 0; r < mpi->size(); ++r) {
    for (Placement::LayerRow* row : {&everybody, &next}) {
      row->expert_of_slot.insert(row->expert_of_slot.end(), {2 * r, 2 * r + 1});
    }
    everybody.expert_of_slot.push_back(r == 0 ? 2 : 0);
    next.expert_of_slot.push_back((2 * r + 2) % (2 * mpi->size()));
  }
  return *MakeMigrationPlan(from, {everybody, next}, plan_id);
}

// A rank with its store, whose blocks lie in memory that all ranks can open.
class TestRank {
 public:
  explicit TestRank(bool open)
      : base_(mpi->MakeTransport()), members_(base_.get(), Ranks(), /*generation=*/1) {
    // Whoever waits for the others goes on with what they wait for.
    world_ = std::make_unique<Communicator>(
        base_.get(), Communicator::Options{.deadline_ms = 60'000, .interrupted = [this] {
                                             if (store_ != nullptr) {
                                               testing::Poll(store_.get(), 1 << 20).IgnoreError();
                                             }
                                             return absl::OkStatus();
                                           }});
    const int32_t num_blocks = kLayers * kSlots + kStaging;
    auto memory = PeerMemory::Create(MakeCudaMemory(), world_.get(), 0,
                                     DeviceBlocks::StrideOf(kBytes) * num_blocks);
    REQUIRE(memory.ok());
    memory_ = *std::move(memory);
    auto blocks =
        DeviceBlocks::Create({.block_bytes = kBytes,
                              .num_blocks = num_blocks,
                              .arena = {memory_->blocks()[mpi->rank()], memory_->bytes()}});
    REQUIRE(blocks.ok());
    blocks_ = blocks->get();
    std::vector<const std::byte*> arenas(memory_->blocks().begin(), memory_->blocks().end());
    arenas[mpi->rank()] = nullptr;
    if (open) REQUIRE(blocks_->SetPeers(arenas).ok());
    store_ = std::make_unique<ExpertStore>(ExpertStore::Options{.rank = mpi->rank(),
                                                                .num_layers = kLayers,
                                                                .num_experts = 2 * mpi->size(),
                                                                .block_bytes = kBytes,
                                                                .resident_blocks = kLayers * kSlots,
                                                                .staging_blocks = kStaging,
                                                                .chunk_bytes = kChunk},
                                           &members_, *std::move(blocks));
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t e = 2 * mpi->rank(); e < 2 * mpi->rank() + 2; ++e) {
        std::ranges::copy(Expert(layer, e), store_->Allocate(layer, e).begin());
        REQUIRE(store_->Seal(layer, e).ok());
      }
    }
    Meet();
  }
  // All ranks: nobody closes what another one may still fetch from.
  void End() {
    Meet();
    store_.reset();
    REQUIRE(memory_->Close(world_.get(), 0).ok());
  }

  ExpertStore& store() { return *store_; }
  MemberTransport& members() { return members_; }
  void Meet() { REQUIRE(testing::Barrier(world_.get()).ok()); }

  void RequireHolds(const Placement& placement) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t e = 0; e < placement.num_experts(); ++e) {
        CAPTURE(mpi->rank(), layer, e);
        const int32_t block = store_->BlockOf(layer, e);
        REQUIRE((block >= 0) == placement.Hosts(layer, e, mpi->rank()));
        if (block < 0) continue;
        std::vector<std::byte> content(kBytes);
        REQUIRE(cuda::DeviceMemory().Read(content, blocks_->Address(block), nullptr).ok());
        REQUIRE(content == Expert(layer, e));
      }
    }
  }
  void FlipByte(int32_t layer, int32_t expert, size_t at) {
    const std::byte wrong = Expert(layer, expert)[at] ^ std::byte{1};
    std::byte* const block = blocks_->Address(store_->BlockOf(layer, expert));
    REQUIRE(cuda::DeviceMemory().Write(block + at, {&wrong, 1}, nullptr).ok());
    REQUIRE(cuda::Wait(nullptr).ok());
  }

  static std::vector<std::byte> Expert(int32_t layer, int32_t expert) {
    std::vector<std::byte> bytes(kBytes);
    for (size_t i = 0; i < kBytes; ++i) bytes[i] = ExpertByte(layer, expert, i);
    return bytes;
  }

 private:
  static std::vector<int32_t> Ranks() {
    std::vector<int32_t> ranks;
    for (int32_t r = 0; r < mpi->size(); ++r) ranks.push_back(r);
    return ranks;
  }

  std::unique_ptr<Transport> base_;
  MemberTransport members_;
  std::unique_ptr<Communicator> world_;
  std::unique_ptr<PeerMemory> memory_;
  DeviceBlocks* blocks_ = nullptr;  // of the store
  std::unique_ptr<ExpertStore> store_;
};

TEST_CASE("processes move experts between memories of devices") {
  for (const bool open : {false, true}) {
    CAPTURE(open);
    cuda_shim::Reseed(static_cast<uint64_t>(2 * mpi->rank() + open + 1));
    TestRank rank(open);
    Placement now = Home();
    for (int64_t id = 1; id <= 4; ++id) {
      const MigrationPlan plan =
          id % 2 == 1 ? Spread(now, id) : *MakeMigrationPlan(now, {HomeRow(0), HomeRow(1)}, id);
      for (int peer = 0; peer < mpi->size(); ++peer) {
        rank.members().TakeBytesSent(peer, kTagMigration);
      }
      const int64_t received = rank.store().bytes_received();
      REQUIRE(rank.store().Stage(plan, now).ok());
      REQUIRE(testing::PollUntilStaged(&rank.store(), id < 3 ? 1 : 1 << 20).ok());
      rank.RequireHolds(now);
      // Rank r gets expert 0, or 2, and one of the next rank's.
      REQUIRE(rank.store().bytes_received() - received ==
              (id % 2 == 1 ? 2 : 0) * static_cast<int64_t>(kBytes));
      rank.Meet();
      int64_t sent = 0;
      for (int peer = 0; peer < mpi->size(); ++peer) {
        sent += rank.members().TakeBytesSent(peer, kTagMigration);
      }
      if (open) REQUIRE(sent < static_cast<int64_t>(kBytes));  // headers
      now = *plan.Apply(now);
      rank.store().Commit(now);
      rank.RequireHolds(now);
    }
    rank.End();
  }
}

TEST_CASE("processes find what one of them holds corrupted and give the plan up") {
  for (const bool open : {false, true}) {
    CAPTURE(open);
    cuda_shim::Reseed(static_cast<uint64_t>(2 * mpi->rank() + open + 11));
    TestRank rank(open);
    if (mpi->rank() == 0) rank.FlipByte(1, 0, 4321);
    const MigrationPlan plan = Spread(Home(), 1);
    REQUIRE(rank.store().Stage(plan, Home()).ok());
    const absl::Status status = testing::PollUntilStaged(&rank.store(), 1 << 20);
    // The rank before rank 0 in the ring is the one that gets it.
    REQUIRE(status.code() ==
            (mpi->rank() == mpi->size() - 1 ? absl::StatusCode::kDataLoss : absl::StatusCode::kOk));
    rank.Meet();
    rank.store().Discard();
    REQUIRE(testing::PollUntilIdle(&rank.store()).ok());
    if (mpi->rank() != 0) rank.RequireHolds(Home());
    rank.End();
  }
}

TEST_CASE("processes give plans up at any moment and carry out the next one") {
  for (const bool open : {false, true}) {
    CAPTURE(open);
    cuda_shim::Reseed(static_cast<uint64_t>(2 * mpi->rank() + open + 21));
    TestRank rank(open);
    for (int64_t id = 1; id <= 12; ++id) {
      REQUIRE(rank.store().Stage(Spread(Home(), id), Home()).ok());
      for (int64_t i = 0; i < id * (mpi->rank() + 1); ++i) {
        REQUIRE(testing::Poll(&rank.store(), 1).ok());
      }
      rank.Meet();
      rank.store().Discard();
      REQUIRE(testing::PollUntilIdle(&rank.store()).ok());
      // Others may still fetch from blocks that are free here: the next plan may come into them.
    }
    rank.RequireHolds(Home());
    const MigrationPlan plan = Spread(Home(), 13);
    REQUIRE(rank.store().Stage(plan, Home()).ok());
    REQUIRE(testing::PollUntilStaged(&rank.store(), 1 << 20).ok());
    rank.Meet();
    rank.store().Commit(*plan.Apply(Home()));
    rank.RequireHolds(*plan.Apply(Home()));
    rank.End();
  }
}

}  // namespace
}  // namespace ballast

int main(int argc, char** argv) {
  auto started = ballast::MpiRuntime::Start(&argc, &argv);
  if (!started.ok()) {
    std::fprintf(stderr, "%s\n", std::string(started.status().message()).c_str());
    return 1;
  }
  ballast::mpi = started->get();
  if (Catch::Session().run(argc, argv) != 0) MPI_Abort(MPI_COMM_WORLD, 1);
  ballast::mpi->Finish();
  return 0;
}
