#ifndef BALLAST_KERNELS_MATMUL_CUBLASLT_H_
#define BALLAST_KERNELS_MATMUL_CUBLASLT_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/matmul.h"

namespace ballast::cuda {

// Products on the device that is current, through cuBLASLt. Built where CUDA is.
//
// Row-deterministic as far as the library lets one see: one algorithm serves every m, and it sums
// over k in one piece (no split of k, no reduction, no workspace). All it is told of m is how many
// tiles there are. The bits are not those of the CPU. fp32 stays fp32, without TF32.
//
// Rows from m up are neither read nor written. Nothing is allocated by Run.
// REQUIRES x, y and the packed matrix, which is w itself in row-major order, begin at multiples of
//          16 bytes in the device's memory
// STREAM   Run may be captured
// ERRORS   kInvalidArgument: n or k is not positive; kUnimplemented: cuBLASLt has no such algorithm
//          for this shape on this device; kInternal: what it said. With the shape.
absl::StatusOr<std::unique_ptr<Matmul>> MakeCublasLtMatmul(int n, int k, DType dtype);

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_MATMUL_CUBLASLT_H_
