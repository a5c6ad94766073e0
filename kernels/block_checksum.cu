// All threads go through one piece after the other, 16 bytes at a time and several of these under
// way; what each has added up meets in its warp, and warps meet in the sum in memory.
#include <algorithm>

#include "base/block_checksum.h"
#include "base/status.h"
#include "kernels/block_checksum.h"
#include "kernels/device.cuh"
#include "kernels/grouped_mlp.h"

namespace ballast::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnderWay = 4;  // loads of a thread
constexpr size_t kVectorBytes = 16;

// ---- device functions -------------------------------------------------------------------------

// Of the two words of a vector, the first of which is word `index` of the block.
__device__ uint64_t SumVector(uint4 v, uint64_t index) {
  const uint64_t first = v.x | static_cast<uint64_t>(v.y) << 32;
  const uint64_t second = v.z | static_cast<uint64_t>(v.w) << 32;
  return ChecksumWord(first, index) + ChecksumWord(second, index + 1);
}

// Of what follows the last whole vector: 15 bytes at most.
__device__ uint64_t SumTail(const BlockChecksumArgs::Piece& piece) {
  uint64_t sum = 0;
  for (size_t at = piece.bytes / kVectorBytes * kVectorBytes; at < piece.bytes; at += 8) {
    uint64_t word = 0;
    for (size_t i = 0; i < 8 && at + i < piece.bytes; ++i) {
      word |= static_cast<uint64_t>(piece.at[at + i]) << (8 * i);
    }
    sum += ChecksumWord(word, (piece.offset + at) / 8);
  }
  return sum;
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) BlockChecksumKernel(BlockChecksumArgs a) {
  const size_t thread = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const size_t threads = static_cast<size_t>(gridDim.x) * kThreads;
  for (int p = 0; p < a.num_pieces; ++p) {
    const BlockChecksumArgs::Piece& piece = a.pieces[p];
    const size_t vectors = piece.bytes / kVectorBytes;
    const uint64_t first = piece.offset / 8;
    uint64_t sum = thread == 0 ? SumTail(piece) : 0;
    size_t i = thread;
    for (; i + (kUnderWay - 1) * threads < vectors; i += kUnderWay * threads) {
      uint4 v[kUnderWay];
#pragma unroll
      for (int j = 0; j < kUnderWay; ++j) {
        v[j] = LoadStreaming(piece.at + (i + j * threads) * kVectorBytes);
      }
#pragma unroll
      for (int j = 0; j < kUnderWay; ++j) sum += SumVector(v[j], first + 2 * (i + j * threads));
    }
    for (; i < vectors; i += threads) {
      sum += SumVector(LoadStreaming(piece.at + i * kVectorBytes), first + 2 * i);
    }
    __syncwarp();
    auto all = static_cast<unsigned long long>(sum);  // the type that atomicAdd knows
    for (int distance = static_cast<int>(kWarp) / 2; distance > 0; distance /= 2) {
      all += __shfl_xor_sync(kFullWarp, all, distance);
    }
    if (threadIdx.x % kWarp == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(piece.sum), all);
    }
  }
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status AddBlockChecksums(const BlockChecksumArgs& a, Stream stream) {
  if (a.num_pieces < 0 || a.num_pieces > kMostChecksumPieces || a.num_thread_blocks < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("block checksums: ", a.num_pieces, " pieces and ", a.num_thread_blocks,
                     " thread blocks, allowed: up to ", kMostChecksumPieces,
                     " pieces, 1 thread block and more"));
  }
  size_t most_bytes = 0;
  for (int p = 0; p < a.num_pieces; ++p) {
    const BlockChecksumArgs::Piece& piece = a.pieces[p];
    BALLAST_RETURN_IF_ERROR(CheckAligned("a piece of a block", piece.at));
    if (piece.offset % 8 != 0) {
      return absl::InvalidArgumentError(absl::StrCat("block checksums: piece ", p, " is at byte ",
                                                     piece.offset,
                                                     " of its block, allowed: multiples of 8"));
    }
    most_bytes = std::max(most_bytes, piece.bytes);
  }
  if (most_bytes == 0) return absl::OkStatus();
  // No more than have something to do.
  constexpr size_t kPerBlock = kThreads * kVectorBytes;
  const size_t wanted = CeilDiv(most_bytes, kPerBlock);
  const auto blocks =
      static_cast<unsigned>(std::min<size_t>(wanted, static_cast<size_t>(a.num_thread_blocks)));
  return Launch({.blocks = blocks, .threads = kThreads}, stream, BlockChecksumKernel, a);
}

}  // namespace ballast::cuda
