// One copy, or one stage of products, and what it left: where to look first when a tensor path is
// wrong.
#ifndef BALLAST_TESTS_GPU_HOPPER_PROBE_H_
#define BALLAST_TESTS_GPU_HOPPER_PROBE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/tensor_tiles.cuh"

namespace ballast::testing {

// Copies the box at (matrix, row, column) and writes the shared memory where it lies.
// SHAPES dump [box_rows * 128] bytes of device memory
absl::Status ProbeCopy(const cuda::Matrices& from, int column, int row, int matrix,
                       std::byte* dump);

// d = x w^T by one stage of products.
// SHAPES x [64, 128 bytes], w [128, 128 bytes] of bf16 (element_bytes 2) or e4m3 (1), d [64, 128]
absl::Status ProbeProduct(uint32_t element_bytes, const void* x, const void* w, float* d);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_HOPPER_PROBE_H_
