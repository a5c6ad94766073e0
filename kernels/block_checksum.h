// The checksums of base/block_checksum.h, computed by a device of what lies in its memory.
#ifndef BALLAST_KERNELS_BLOCK_CHECKSUM_H_
#define BALLAST_KERNELS_BLOCK_CHECKSUM_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/stream.h"

namespace ballast {

inline constexpr int32_t kMostChecksumPieces = 16;

// Adds to *sum of each of some pieces of blocks what ChecksumPiece says of it:
//
//   *sum += ChecksumPiece(bytes at `at`, offset)   modulo 2^64
//
// Several pieces may have one sum. It reads as fast as its thread blocks can, so their number says
// what is left to others on the device.
// REQUIRES `at` is a multiple of 16, offset of 8, and bytes of 8 unless the piece ends its block;
//          nobody writes the pieces meanwhile
// ERRORS kInvalidArgument: an alignment or number that is not allowed; nothing is launched
// STREAM asynchronous, one launch, none without bytes
// ORDER  sums of integers, by atomics: of none
struct BlockChecksumArgs {
  struct Piece {
    const std::byte* at = nullptr;
    size_t bytes = 0;
    size_t offset = 0;  // of the piece in its block
    uint64_t* sum = nullptr;
  };
  int32_t num_pieces = 0;
  int32_t num_thread_blocks = 0;  // at least 1
  std::array<Piece, kMostChecksumPieces> pieces = {};
};

// Pointers are to device memory.
namespace cuda {
absl::Status AddBlockChecksums(const BlockChecksumArgs& args, Stream stream);
}

}  // namespace ballast

#endif  // BALLAST_KERNELS_BLOCK_CHECKSUM_H_
