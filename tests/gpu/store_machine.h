// Ranks on one device whose stores one thread polls in turn.
#ifndef BALLAST_TESTS_GPU_STORE_MACHINE_H_
#define BALLAST_TESTS_GPU_STORE_MACHINE_H_

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/transport.h"
#include "runtime/device_blocks.h"
#include "runtime/expert_store.h"
#include "tests/runtime/store_fixture.h"
#include "tests/support/flipping_transport.h"

namespace ballast::testing {

struct MachineOptions {
  bool open = false;  // ranks fetch from each other's arenas
  size_t chunk_bytes = 192;
  int32_t staging = 4;
  int32_t rooms = 2;
  ReadExpert read = {};
};

// The stores of store_fixture.h in a device's memory.
class StoreMachine {
 public:
  StoreMachine(const Placement& placement, const MachineOptions& options) : fabric_(kRanks) {
    for (int rank = 0; rank < kRanks; ++rank) {
      base_.push_back(fabric_.MakeTransport(rank));
      transports_.push_back(std::make_unique<FlippingTransport>(base_.back().get()));
      auto blocks = DeviceBlocks::Create({.block_bytes = kBlockBytes,
                                          .num_blocks = kLayers * kSlots + options.staging,
                                          .rooms = options.rooms});
      REQUIRE(blocks.ok());
      blocks_.push_back(blocks->get());
      stores_.push_back(
          std::make_unique<ExpertStore>(ExpertStore::Options{.rank = rank,
                                                             .num_layers = kLayers,
                                                             .num_experts = kExperts,
                                                             .block_bytes = kBlockBytes,
                                                             .resident_blocks = kLayers * kSlots,
                                                             .staging_blocks = options.staging,
                                                             .chunk_bytes = options.chunk_bytes,
                                                             .read = options.read},
                                        transports_.back().get(), *std::move(blocks)));
      Fill(rank, placement);
    }
    if (options.open) SetPeers();
  }

  ExpertStore& store(int rank) { return *stores_[rank]; }
  DeviceBlocks& blocks(int rank) { return *blocks_[rank]; }
  FlippingTransport& transport(int rank) { return *transports_[rank]; }

  void SetPeers() {
    for (int rank = 0; rank < kRanks; ++rank) {
      std::vector<const std::byte*> arenas;
      for (int peer = 0; peer < kRanks; ++peer) {
        arenas.push_back(peer == rank ? nullptr : blocks_[peer]->arena());
      }
      REQUIRE(blocks_[rank]->SetPeers(arenas).ok());
    }
  }
  void Stage(const MigrationPlan& plan, const Placement& current) {
    for (auto& store : stores_) REQUIRE(store->Stage(plan, current).ok());
  }
  // How many ranks have staged it. The first error of each rank is kept.
  int PollAll(int64_t budget) {
    int staged = 0;
    for (int rank = 0; rank < kRanks; ++rank) {
      const auto done = Poll(stores_[rank].get(), budget);
      if (done.ok()) staged += *done;
      errors_[rank].Update(done.status());
    }
    return staged;
  }
  void PollUntilStaged(int64_t budget) {
    for (int i = 0; PollAll(budget) < kRanks; ++i) REQUIRE(i < 100'000);
    REQUIRE(FirstError({errors_.begin(), errors_.end()}) == "");
  }
  void DiscardAll() {
    for (auto& store : stores_) store->Discard();
    for (int i = 0; i < 100'000; ++i) {
      bool staging = false;
      for (auto& store : stores_) staging = staging || store->staging();
      if (!staging) return;
      PollAll(1 << 20);
    }
    FAIL("a plan that was given up never ended");
  }
  void CommitAll(const Placement& target) {
    for (auto& store : stores_) store->Commit(target);
  }
  const absl::Status& error(int rank) const { return errors_[rank]; }

  // Byte for byte, in the device's memory.
  void RequireHolds(const Placement& placement) {
    for (int rank = 0; rank < kRanks; ++rank) RequireHolds(placement, rank);
  }
  void RequireHolds(const Placement& placement, int rank) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t e = 0; e < kExperts; ++e) {
        CAPTURE(rank, layer, e);
        const int32_t block = stores_[rank]->BlockOf(layer, e);
        REQUIRE((block >= 0) == placement.Hosts(layer, e, rank));
        if (block < 0) continue;
        std::vector<std::byte> content(kBlockBytes);
        REQUIRE(cuda::DeviceMemory().Read(content, blocks_[rank]->Address(block), nullptr).ok());
        REQUIRE(content == ExpertBytes(layer, e));
        REQUIRE(ChecksumOf(*stores_[rank], layer, e) == stores_[rank]->SealedChecksum(layer, e));
      }
    }
  }
  // Behind the store's back.
  void FlipByte(int rank, int32_t block, size_t at) {
    std::byte byte{};
    REQUIRE(
        cuda::DeviceMemory().Read({&byte, 1}, blocks_[rank]->Address(block) + at, nullptr).ok());
    byte ^= std::byte{0x10};
    REQUIRE(
        cuda::DeviceMemory().Write(blocks_[rank]->Address(block) + at, {&byte, 1}, nullptr).ok());
    REQUIRE(cuda::Wait(nullptr).ok());
  }

  static std::vector<std::byte> ExpertBytes(int32_t layer, int32_t expert) {
    std::vector<std::byte> bytes(kBlockBytes);
    for (size_t i = 0; i < kBlockBytes; ++i) bytes[i] = ExpertByte(layer, expert, i);
    return bytes;
  }

 private:
  void Fill(int rank, const Placement& placement) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t e = 0; e < kExperts; ++e) {
        if (!placement.Hosts(layer, e, rank)) continue;
        std::ranges::copy(ExpertBytes(layer, e), stores_[rank]->Allocate(layer, e).begin());
        REQUIRE(stores_[rank]->Seal(layer, e).ok());
      }
    }
  }

  LocalFabric fabric_;
  std::vector<std::unique_ptr<Transport>> base_;
  std::vector<std::unique_ptr<FlippingTransport>> transports_;
  std::vector<std::unique_ptr<ExpertStore>> stores_;
  std::vector<DeviceBlocks*> blocks_;  // of the stores
  std::array<absl::Status, kRanks> errors_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_STORE_MACHINE_H_
