// How the tensor paths' tiles lie in memory: what kernels/hopper.cuh says to the device and what
// the emulator of the tests decodes are the same bits.
//
// A tile in shared memory has rows of 128 bytes; 8 of them make an atom of 1024 aligned bytes. In
// row r the 16-byte chunk c lies at c ^ (r % 8) (the "128-byte swizzle"), so that neither copies
// nor products meet in a bank.
#ifndef BALLAST_KERNELS_TENSOR_TILES_CUH_
#define BALLAST_KERNELS_TENSOR_TILES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace ballast::cuda {

inline constexpr int kBoxBytes = 128;    // of a row
inline constexpr int kAtomBytes = 1024;  // 8 rows

// Matrices [depth, rows, columns] of 2-byte or 1-byte elements, from which boxes of box_rows rows
// of 128 bytes are copied. What lies outside of the matrix comes as zeros.
// REQUIRES at and the strides are multiples of 16 bytes; box_rows <= 256
struct Matrices {
  const void* at = nullptr;
  uint64_t columns = 0, rows = 0, depth = 1;
  uint64_t row_bytes = 0, matrix_bytes = 0;
  uint32_t element_bytes = 2, box_rows = 0;
};

// Adding this to a descriptor goes on by 32 bytes of every row, what one product takes.
inline constexpr uint64_t kDescriptorStep = 2;

// wgmma's descriptor of a tile that begins at this address of shared memory.
// SOURCE PTX ISA, "Matrix Descriptor Format" of wgmma
__host__ __device__ constexpr uint64_t DescriptorAt(uint64_t shared_address) {
  constexpr uint64_t kLeading = 1;  // not used with a swizzle
  constexpr uint64_t kAtomStride = kAtomBytes / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return (shared_address & 0x3ffff) >> 4 | kLeading << 16 | kAtomStride << 32 | kSwizzle128 << 62;
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_TENSOR_TILES_CUH_
