// A checksum of a block that can be computed in any order, so by any number of threads, lanes and
// blocks of a device at once, with the same value everywhere.
#ifndef BALLAST_BASE_BLOCK_CHECKSUM_H_
#define BALLAST_BASE_BLOCK_CHECKSUM_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/random.h"

namespace ballast {

// What the word at `index` of a block adds to its checksum: for one index, another number for every
// word.
constexpr uint64_t ChecksumWord(uint64_t word, uint64_t index) {
  return Mix64(word ^ (index * 0x9e3779b97f4a7c15ull));
}

// What a piece of a block adds to its checksum.
//
//   sum over its words i of ChecksumWord(word i, offset / 8 + i), modulo 2^64
//
// A word is 8 bytes, little-endian; the last one of a block is filled up with zeros.
// REQUIRES offset is a multiple of 8, and the size too unless the piece ends the block
uint64_t ChecksumPiece(std::span<const std::byte> piece, size_t offset);

// The checksum of a block: its size, and what its pieces add, wherever it is cut. One changed word
// is always found; whatever else has changed, swapped or moved words too, but for one in 2^64. It
// finds accidents, not attackers.
inline uint64_t BlockChecksum(std::span<const std::byte> block) {
  return block.size() + ChecksumPiece(block, 0);
}

}  // namespace ballast

#endif  // BALLAST_BASE_BLOCK_CHECKSUM_H_
