#ifndef BALLAST_KERNELS_DEVICE_MATMUL_H_
#define BALLAST_KERNELS_DEVICE_MATMUL_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "kernels/matmul.h"
#include "kernels/stream.h"

namespace ballast {

// y = x Wᵀ, accumulated in fp32.
// SHAPES x [m, k], w [n, k] row-major, both of dtype  y [m, n] fp32
// ORDER  that of cpu::Dot: lane k mod 16 by fused multiply-add, then the lanes as a binary tree
struct PlainMatmulArgs {
  int32_t m = 0, n = 0, k = 0;
  DType dtype = DType::kF32;
  const void* x = nullptr;
  const void* w = nullptr;
  float* y = nullptr;
};

namespace cuda {

// The bits of cpu::MakePlainMatmul, of which it is the twin: the specification of products on a
// device, and what the gate's logits are computed with, so that ids do not depend on the backend.
// Pointers are to device memory; rows behind the last are neither read nor written.
// STREAM asynchronous; the arrays must live until the stream gets there.
// ERRORS kInternal: the launch was refused
absl::Status PlainMatmul(const PlainMatmulArgs& args, Stream stream);

// The same behind the interface of all products: what runs on a device where bits of the CPU are
// wanted. The packed matrix is w itself, [n, k] row-major.
absl::StatusOr<std::unique_ptr<Matmul>> MakePlainDeviceMatmul(int n, int k, DType dtype);

}  // namespace cuda
}  // namespace ballast

#endif  // BALLAST_KERNELS_DEVICE_MATMUL_H_
