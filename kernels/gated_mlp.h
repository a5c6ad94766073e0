#ifndef BALLAST_KERNELS_GATED_MLP_H_
#define BALLAST_KERNELS_GATED_MLP_H_

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "kernels/kernel_set.h"
#include "kernels/matmul.h"

namespace ballast {

// down(silu(gate(x)) * up(x)): an expert, a shared expert or a dense layer's MLP. One object serves
// all parameters of one shape; it owns the scratch. Row-deterministic.
// THREADS one.
class GatedMlp {
 public:
  // SHAPES gate, up [inter, hidden], down [hidden, inter]
  static absl::StatusOr<std::unique_ptr<GatedMlp>> Create(const KernelSet& kernels, int hidden,
                                                          int inter, DType dtype);

  // All that the parameters of one MLP take, packed: one block, 64-byte aligned.
  size_t packed_bytes() const { return down_offset_ + down_->packed_bytes(); }
  absl::Status Pack(const void* gate, const void* up, const void* down, DType type,
                    std::byte* packed);

  // SHAPES x [rows, hidden] dtype, y [rows, hidden] fp32; room for RoundUp(rows, kRowBlock) rows
  absl::Status Run(const void* x, int rows, const std::byte* packed, float* y, Stream stream);

  int hidden() const { return gate_up_->k(); }
  int inter() const { return down_->k(); }

 private:
  GatedMlp(const KernelSet& kernels, DType dtype) : kernels_(kernels), dtype_(dtype) {}

  const KernelSet& kernels_;
  DType dtype_;
  std::unique_ptr<Matmul> gate_up_, down_;
  size_t down_offset_ = 0;
  AlignedBuffer gate_up_out_, activated_;
};

}  // namespace ballast

#endif  // BALLAST_KERNELS_GATED_MLP_H_
