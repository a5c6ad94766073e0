#ifndef BALLAST_KERNELS_MATMUL_ROW_MAJOR_H_
#define BALLAST_KERNELS_MATMUL_ROW_MAJOR_H_

#include <cstddef>

#include "kernels/matmul.h"

namespace ballast {

// A product whose packed matrix is w itself, [n, k] row-major in dtype().
class RowMajorMatmul : public Matmul {
 public:
  size_t packed_bytes() const override;
  absl::Status Pack(const void* w, DType w_type, std::byte* packed) const override;

 protected:
  using Matmul::Matmul;
};

}  // namespace ballast

#endif  // BALLAST_KERNELS_MATMUL_ROW_MAJOR_H_
