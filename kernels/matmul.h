#ifndef BALLAST_KERNELS_MATMUL_H_
#define BALLAST_KERNELS_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "kernels/stream.h"

namespace ballast {

// Rows are multiplied in blocks of this many, always: the bits of a row then do not depend on how
// many rows stand beside it. (A library may pick another kernel, with another order of summation,
// for another number of rows.)
inline constexpr int kRowBlock = 16;

// y = x Wᵀ for one parameter matrix shape, with the matrix packed as the backend likes it.
//
//   y[m][n] = sum over k of x[m][k] * w[n][k],  accumulated in fp32
//
// Row-deterministic: y[m] depends on x[m] and w alone, bit for bit.
// THREADS one thread at a time.
class Matmul {
 public:
  virtual ~Matmul() = default;

  int n() const { return n_; }
  int k() const { return k_; }
  DType dtype() const { return dtype_; }  // of x and w

  virtual size_t packed_bytes() const = 0;
  // SHAPES w [n, k] row-major, bf16 or fp32 as `w_type`; `packed` holds packed_bytes(), 64-byte
  // aligned
  virtual absl::Status Pack(const void* w, DType w_type, std::byte* packed) const = 0;
  // SHAPES x [m, k] dtype(), y [m, n] fp32; both with room for RoundUp(m, kRowBlock) rows. Rows
  //        from m up to there are read and written, and mean nothing.
  // STREAM asynchronous on a device, where all pointers are to its memory
  virtual absl::Status Run(const void* x, int m, const std::byte* packed, float* y,
                           Stream stream) = 0;

 protected:
  Matmul(int n, int k, DType dtype) : n_(n), k_(k), dtype_(dtype) {}

 private:
  int n_, k_;
  DType dtype_;
};

namespace cpu {

// Plain loops: the specification, and what runs where no library is built in.
absl::StatusOr<std::unique_ptr<Matmul>> MakePlainMatmul(int n, int k, DType dtype);

// oneDNN. ERRORS kUnimplemented: not built in, or this processor has no such product
absl::StatusOr<std::unique_ptr<Matmul>> MakeOneDnnMatmul(int n, int k, DType dtype);

// Sets how many threads each product made from now on may use. The bits do not depend on it.
// THREADS before any product is made; it holds for the process.
void SetMatmulThreads(int num_threads);

// Whether oneDNN can multiply bf16 on this processor.
bool OneDnnHasBFloat16();

}  // namespace cpu
}  // namespace ballast

#endif  // BALLAST_KERNELS_MATMUL_H_
