#include "base/block_checksum.h"

#include <bit>
#include <cstring>

#include "base/check.h"

namespace ballast {

static_assert(std::endian::native == std::endian::little);

// A plain loop, which compilers turn into vectors where there is a product of 64-bit lanes.
uint64_t ChecksumPiece(std::span<const std::byte> piece, size_t offset) {
  constexpr size_t kWord = sizeof(uint64_t);
  BALLAST_CHECK(offset % kWord == 0);
  const uint64_t first = offset / kWord;
  const size_t words = piece.size() / kWord;
  uint64_t sum = 0;
  for (size_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    std::memcpy(&word, piece.data() + i * kWord, kWord);
    sum += ChecksumWord(word, first + i);
  }
  if (piece.size() % kWord == 0) return sum;
  uint64_t last = 0;
  std::memcpy(&last, piece.data() + words * kWord, piece.size() % kWord);
  return sum + ChecksumWord(last, first + words);
}

}  // namespace ballast
