// A device's blocks by themselves.
#include "runtime/device_blocks.h"

#include <catch2/catch.hpp>
#include <memory>
#include <vector>

#include "base/block_checksum.h"
#include "base/random.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

constexpr size_t kBytes = 1003;

std::vector<std::byte> Bytes(uint64_t seed) {
  std::vector<std::byte> bytes(kBytes);
  for (size_t i = 0; i < kBytes; ++i) bytes[i] = static_cast<std::byte>(RandomBits(seed, i));
  return bytes;
}

std::unique_ptr<DeviceBlocks> Make(int32_t num_blocks, std::span<std::byte> arena = {}) {
  auto blocks = DeviceBlocks::Create(
      {.block_bytes = kBytes, .num_blocks = num_blocks, .arena = arena, .rooms = 2});
  INFO(blocks.status().message());
  REQUIRE(blocks.ok());
  return *std::move(blocks);
}

void Await(DeviceBlocks* blocks, BlockMemory::Ticket ticket) {
  while (true) {
    const auto done = blocks->IsDone(ticket);
    REQUIRE(done.ok());
    if (*done) return;
  }
}

std::vector<std::byte> Content(const DeviceBlocks& blocks, int32_t block) {
  std::vector<std::byte> bytes(kBytes);
  REQUIRE(cuda::DeviceMemory().Read(bytes, blocks.Address(block), nullptr).ok());
  return bytes;
}

uint64_t Read(DeviceBlocks* blocks, int32_t block) {
  BlockMemory::Reading reading{.block = block};
  while (true) {
    const auto done = blocks->Advance(&reading);
    REQUIRE(done.ok());
    if (*done) return reading.checksum;
  }
}

// Pieces of `piece` bytes through a message in pinned memory.
void WriteInPieces(DeviceBlocks* blocks, int32_t block, const std::vector<std::byte>& bytes,
                   size_t piece, std::byte* message) {
  for (size_t at = 0; at < kBytes; at += piece) {
    const size_t count = std::min(piece, kBytes - at);
    std::copy_n(bytes.begin() + at, count, message);
    const auto ticket = blocks->Write(block, at, {message, count});
    REQUIRE(ticket.ok());
    Await(blocks, *ticket);
  }
}

TEST_CASE("pieces go into the blocks of a device and out of them", "[device][blocks]") {
  testing::ForEachSchedule([](int round) {
    const auto blocks = Make(3);
    Buffer message(&blocks->messages());
    REQUIRE(message.EnsureSize(kBytes).ok());
    const std::vector<std::byte> bytes = Bytes(static_cast<uint64_t>(round)), others = Bytes(77);
    const uint64_t calls = testing::BlockingCalls();
    WriteInPieces(blocks.get(), 1, bytes, 16 * (1 + static_cast<size_t>(round)), message.data());
    WriteInPieces(blocks.get(), 2, others, 512, message.data());
    REQUIRE(blocks->Written(1) == BlockChecksum(bytes));
    REQUIRE(blocks->Written(2) == BlockChecksum(others));
    REQUIRE(Read(blocks.get(), 1) == BlockChecksum(bytes));
    // Block 1 once more, and a piece of it back.
    WriteInPieces(blocks.get(), 1, others, kBytes, message.data());
    REQUIRE(blocks->Written(1) == BlockChecksum(others));
    std::fill_n(message.data(), kBytes, std::byte{0});
    const auto ticket = blocks->Read(1, 32, {message.data(), 100});
    REQUIRE(ticket.ok());
    Await(blocks.get(), *ticket);
    REQUIRE(std::equal(message.data(), message.data() + 100, others.begin() + 32));
    REQUIRE(message.data()[100] == std::byte{0});
    REQUIRE(testing::BlockingCalls() == calls);
    REQUIRE(Content(*blocks, 1) == others);
    REQUIRE(Content(*blocks, 2) == others);
    REQUIRE(Content(*blocks, 0) == std::vector<std::byte>(kBytes));
  });
}

TEST_CASE("a reading sees what has changed in a device's memory", "[device][blocks]") {
  const auto blocks = Make(2);
  const std::vector<std::byte> bytes = Bytes(3);
  std::ranges::copy(bytes, blocks->FillRoom(1).begin());
  const auto filled = blocks->Fill(1);
  REQUIRE(filled.ok());
  REQUIRE(*filled == BlockChecksum(bytes));
  for (const size_t at : {size_t{0}, size_t{500}, kBytes - 1}) {
    const std::byte wrong = bytes[at] ^ std::byte{1};
    REQUIRE(cuda::DeviceMemory().Write(blocks->Address(1) + at, {&wrong, 1}, nullptr).ok());
    testing::RequireCuda(cudaDeviceSynchronize());
    REQUIRE(Read(blocks.get(), 1) != BlockChecksum(bytes));
    REQUIRE(cuda::DeviceMemory().Write(blocks->Address(1) + at, {&bytes[at], 1}, nullptr).ok());
    testing::RequireCuda(cudaDeviceSynchronize());
    REQUIRE(Read(blocks.get(), 1) == BlockChecksum(bytes));
  }
}

TEST_CASE("readings that are dropped and begun again end right", "[device][blocks]") {
  const auto blocks = Make(1);
  const std::vector<std::byte> bytes = Bytes(4);
  std::ranges::copy(bytes, blocks->FillRoom(0).begin());
  REQUIRE(blocks->Fill(0).ok());
  BlockMemory::Reading dropped{.block = 0};
  REQUIRE(blocks->Advance(&dropped).ok());
  REQUIRE(Read(blocks.get(), 0) == BlockChecksum(bytes));
}

TEST_CASE("no more is under way than there are marks for", "[device][blocks]") {
  const auto blocks = Make(1);
  Buffer message(&blocks->messages());
  REQUIRE(message.EnsureSize(kBytes).ok());
  std::vector<BlockMemory::Ticket> tickets;
  for (int i = 0; i < 500; ++i) {
    while (blocks->IsFull()) {
    }
    const auto ticket = blocks->Read(0, 0, {message.data(), 16});
    REQUIRE(ticket.ok());
    tickets.push_back(*ticket);
  }
  REQUIRE(std::ranges::adjacent_find(tickets, std::greater_equal<>()) == tickets.end());
  Await(blocks.get(), tickets.back());
  REQUIRE(*blocks->IsDone(tickets.front()));
  REQUIRE_FALSE(blocks->IsFull());
}

TEST_CASE("blocks are fetched from the arenas of peers", "[device][blocks]") {
  testing::ForEachSchedule([](int round) {
    const auto here = Make(2), there = Make(5);
    const std::vector<std::byte> bytes = Bytes(static_cast<uint64_t>(round) + 50);
    std::ranges::copy(bytes, there->FillRoom(4).begin());
    REQUIRE(there->Fill(4).ok());
    REQUIRE_FALSE(here->IsOpenTo(1));
    REQUIRE(absl::IsInternal(here->Fetch(0, 0, 16, {.peer = 1, .block = 4}).status()));
    REQUIRE(here->SetPeers({nullptr, there->arena()}).ok());
    REQUIRE(there->SetPeers({here->arena(), nullptr}).ok());
    REQUIRE(here->IsOpenTo(1));
    REQUIRE_FALSE(here->IsOpenTo(0));
    REQUIRE_FALSE(here->IsOpenTo(2));
    const uint64_t calls = testing::BlockingCalls();
    BlockMemory::Ticket last = 0;
    for (size_t at = 0; at < kBytes; at += 256) {
      const size_t count = std::min<size_t>(256, kBytes - at);
      const auto ticket = here->Fetch(1, at, count, {.peer = 1, .block = 4});
      REQUIRE(ticket.ok());
      last = *ticket;
    }
    Await(here.get(), last);
    REQUIRE(here->Written(1) == BlockChecksum(bytes));
    REQUIRE(testing::BlockingCalls() == calls);
    REQUIRE(Content(*here, 1) == bytes);
  });
}

TEST_CASE("an arena that grows keeps what its blocks hold", "[device][blocks]") {
  const testing::DeviceArray<std::byte> lent(size_t{3} * DeviceBlocks::StrideOf(kBytes));
  for (const bool is_lent : {false, true}) {
    CAPTURE(is_lent);
    const auto blocks = Make(2, is_lent ? lent.span() : std::span<std::byte>());
    const std::vector<std::byte> bytes = Bytes(9);
    std::ranges::copy(bytes, blocks->FillRoom(1).begin());
    REQUIRE(blocks->Fill(1).ok());
    REQUIRE(blocks->SetPeers({nullptr, blocks->arena()}).ok());
    const std::byte* const first = blocks->arena();
    const size_t memory = blocks->memory_bytes();
    REQUIRE(blocks->AddBlocks(1).ok());
    REQUIRE(blocks->num_blocks() == 3);
    REQUIRE((blocks->arena() == first) == is_lent);  // there was room
    REQUIRE((blocks->memory_bytes() == memory) == is_lent);
    REQUIRE(blocks->IsOpenTo(1) == is_lent);
    REQUIRE(blocks->AddBlocks(2).ok());
    REQUIRE(blocks->num_blocks() == 5);
    REQUIRE(blocks->arena() != first);
    REQUIRE_FALSE(blocks->IsOpenTo(1));  // it does not know where they are now
    REQUIRE(blocks->memory_bytes() == 5 * (blocks->stride() + 16));
    REQUIRE(Content(*blocks, 1) == bytes);
    REQUIRE(Read(blocks.get(), 1) == BlockChecksum(bytes));
    std::ranges::copy(bytes, blocks->FillRoom(4).begin());
    REQUIRE(*blocks->Fill(4) == BlockChecksum(bytes));
  }
}

TEST_CASE("an arena that does not hold its blocks is refused", "[device][blocks][errors]") {
  const testing::DeviceArray<std::byte> arena(size_t{2048});
  const auto refused = [&](std::span<std::byte> part, int32_t num_blocks) {
    const auto blocks =
        DeviceBlocks::Create({.block_bytes = kBytes, .num_blocks = num_blocks, .arena = part});
    return absl::IsInvalidArgument(blocks.status());
  };
  REQUIRE_FALSE(refused(arena.span(), 2));
  REQUIRE(refused(arena.span(), 3));
  REQUIRE(refused(arena.span().first(2047), 2));
  REQUIRE(refused(arena.span().subspan(64), 1));
}

TEST_CASE("rooms are given out until there are none", "[device][blocks]") {
  const auto blocks = Make(1);
  const std::span<std::byte> first = blocks->TakeRoom(0), second = blocks->TakeRoom(0);
  REQUIRE(first.size() == kBytes);
  REQUIRE(second.size() == kBytes);
  REQUIRE(first.data() != second.data());
  REQUIRE(first.data() != blocks->FillRoom(0).data());
  REQUIRE(blocks->TakeRoom(0).empty());
  blocks->ReturnRoom(first);
  REQUIRE(blocks->TakeRoom(0).data() == first.data());
}

}  // namespace
}  // namespace ballast
