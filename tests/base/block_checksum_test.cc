#include "base/block_checksum.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/random.h"

namespace ballast {
namespace {

std::vector<std::byte> RandomBlock(size_t bytes, uint64_t seed) {
  std::vector<std::byte> block(bytes);
  for (size_t i = 0; i < bytes; ++i) block[i] = static_cast<std::byte>(RandomBits(seed, i));
  return block;
}

// By its definition, a byte and a word at a time; the constants are spelled out.
uint64_t Reference(const std::vector<std::byte>& block) {
  uint64_t sum = block.size();
  for (uint64_t i = 0; i * 8 < block.size(); ++i) {
    uint64_t x = 0;
    for (size_t b = 0; b < 8 && i * 8 + b < block.size(); ++b) {
      x += static_cast<uint64_t>(block[i * 8 + b]) << (8 * b);
    }
    x ^= i * 11400714819323198485ull;
    x ^= x >> 30;
    x *= 13787848793156543929ull;
    x ^= x >> 27;
    x *= 10723151780598845931ull;
    x ^= x >> 31;
    sum += x;
  }
  return sum;
}

TEST_CASE("a block checksum is what its definition says", "[base][checksum]") {
  REQUIRE(BlockChecksum({}) == 0);
  for (size_t bytes = 0; bytes < 300; ++bytes) {
    const std::vector<std::byte> block = RandomBlock(bytes, bytes);
    REQUIRE(BlockChecksum(block) == Reference(block));
  }
  const std::vector<std::byte> block = RandomBlock(150'001, 1);
  REQUIRE(BlockChecksum(block) == Reference(block));
}

TEST_CASE("a block checksum is the same wherever the block is cut", "[base][checksum][property]") {
  Random random(7);
  for (int round = 0; round < 200; ++round) {
    const std::vector<std::byte> block = RandomBlock(random.Below(5000), 100 + round);
    std::vector<size_t> cuts = {0, block.size()};
    for (uint32_t i = random.Below(9); i > 0; --i) {
      cuts.push_back(random.Below(static_cast<uint32_t>(block.size() / 8 + 1)) * 8);
    }
    std::ranges::sort(cuts);
    // From a memory that is aligned to nothing, the last piece first.
    std::vector<std::byte> moved(1);
    moved.insert(moved.end(), block.begin(), block.end());
    uint64_t sum = block.size();
    for (size_t i = cuts.size() - 1; i > 0; --i) {
      const std::span<const std::byte> rest = std::span(moved).subspan(1 + cuts[i - 1]);
      sum += ChecksumPiece(rest.first(cuts[i] - cuts[i - 1]), cuts[i - 1]);
    }
    REQUIRE(sum == BlockChecksum(block));
  }
}

TEST_CASE("a block checksum sees every bit", "[base][checksum]") {
  std::vector<std::byte> block = RandomBlock(1003, 2);
  const uint64_t sum = BlockChecksum(block);
  for (size_t at = 0; at < block.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      block[at] ^= std::byte{1} << bit;
      REQUIRE(BlockChecksum(block) != sum);
      block[at] ^= std::byte{1} << bit;
    }
  }
  REQUIRE(BlockChecksum(block) == sum);
}

// Swaps words `a` and `b`.
std::vector<std::byte> Swapped(std::vector<std::byte> block, size_t a, size_t b) {
  std::swap_ranges(block.begin() + a * 8, block.begin() + a * 8 + 8, block.begin() + b * 8);
  return block;
}

TEST_CASE("a block checksum sees words that are swapped or moved", "[base][checksum]") {
  constexpr size_t kWords = 128;
  // Words of one changed bit each are as alike as different words can be.
  std::vector<std::byte> alike(kWords * 8);
  for (size_t i = 0; i < 64; ++i) alike[i * 8 + i / 8] = std::byte{1} << (i % 8);
  for (const std::vector<std::byte>& block : {RandomBlock(kWords * 8, 3), alike}) {
    const uint64_t sum = BlockChecksum(block);
    for (size_t a = 0; a < kWords; ++a) {
      for (size_t b = 0; b < a; ++b) {
        const std::vector<std::byte> swapped = Swapped(block, a, b);
        REQUIRE((swapped == block) == (BlockChecksum(swapped) == sum));
      }
    }
    for (size_t by = 1; by < block.size(); ++by) {
      std::vector<std::byte> moved = block;
      std::rotate(moved.begin(), moved.begin() + by, moved.end());
      REQUIRE((moved == block) == (BlockChecksum(moved) == sum));
    }
  }
}

TEST_CASE("a block checksum sees the same change in two words", "[base][checksum]") {
  std::vector<std::byte> block = RandomBlock(64 * 8, 4);
  const uint64_t sum = BlockChecksum(block);
  for (size_t a = 0; a < 64; ++a) {
    for (size_t b = 0; b < a; ++b) {
      for (const size_t byte : {size_t{0}, size_t{3}, size_t{7}}) {
        for (const std::byte change : {std::byte{1}, std::byte{0x80}, std::byte{0xff}}) {
          block[a * 8 + byte] ^= change;
          block[b * 8 + byte] ^= change;
          REQUIRE(BlockChecksum(block) != sum);
          block[a * 8 + byte] ^= change;
          block[b * 8 + byte] ^= change;
        }
      }
    }
  }
}

TEST_CASE("a block checksum sees what is cut off or added in zeros", "[base][checksum]") {
  for (const bool zeros : {false, true}) {
    std::vector<std::byte> block = RandomBlock(200, 5);
    if (zeros) std::ranges::fill(block, std::byte{0});
    std::vector<uint64_t> sums;
    for (size_t bytes = 0; bytes <= block.size(); ++bytes) {
      sums.push_back(BlockChecksum(std::span(block).first(bytes)));
    }
    std::ranges::sort(sums);
    REQUIRE(std::ranges::adjacent_find(sums) == sums.end());
  }
}

}  // namespace
}  // namespace ballast
