#include "kernels/gated_mlp.h"

#include <cstring>

#include "base/status.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<GatedMlp>> GatedMlp::Create(const KernelSet& kernels, int hidden,
                                                           int inter, DType dtype) {
  std::unique_ptr<GatedMlp> mlp(new GatedMlp(kernels, dtype));
  BALLAST_ASSIGN_OR_RETURN(mlp->gate_up_, kernels.make_matmul(2 * inter, hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(mlp->down_, kernels.make_matmul(hidden, inter, dtype));
  mlp->down_offset_ = RoundUp(mlp->gate_up_->packed_bytes(), kCacheLineBytes);
  return mlp;
}

absl::Status GatedMlp::Pack(const void* gate, const void* up, const void* down, DType type,
                            std::byte* packed) {
  const size_t half = static_cast<size_t>(inter()) * static_cast<size_t>(hidden()) * SizeOf(type);
  AlignedBuffer both(2 * half);
  std::memcpy(both.data(), gate, half);
  std::memcpy(both.data() + half, up, half);
  BALLAST_RETURN_IF_ERROR(gate_up_->Pack(both.data(), type, packed));
  return down_->Pack(down, type, packed + down_offset_);
}

absl::Status GatedMlp::Run(const void* x, int rows, const std::byte* packed, float* y,
                           Stream stream) {
  const size_t padded = RoundUp(static_cast<size_t>(rows), kRowBlock);
  gate_up_out_.EnsureSize(padded * 2 * static_cast<size_t>(inter()) * sizeof(float));
  activated_.EnsureSize(padded * static_cast<size_t>(inter()) * SizeOf(dtype_));
  BALLAST_RETURN_IF_ERROR(gate_up_->Run(x, rows, packed, gate_up_out_.as<float>(), stream));
  BALLAST_RETURN_IF_ERROR(kernels_.silu_mul({.num_rows = rows,
                                             .width = inter(),
                                             .gate_up = gate_up_out_.as<float>(),
                                             .act_type = dtype_,
                                             .y = activated_.data()},
                                            stream));
  return down_->Run(activated_.data(), rows, packed + down_offset_, y, stream);
}

}  // namespace ballast
