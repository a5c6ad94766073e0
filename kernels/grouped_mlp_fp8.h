// The grouped MLP (grouped_mlp.h) with parameters and multiplied activations in e4m3.
#ifndef BALLAST_KERNELS_GROUPED_MLP_FP8_H_
#define BALLAST_KERNELS_GROUPED_MLP_FP8_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/grouped_mlp.h"
#include "kernels/stream.h"

namespace ballast {

inline constexpr int32_t kScaleBlock = 128;  // elements with one scale, in either direction

// A matrix [rows, columns]: element (r, c) is values[r, c] * scales[r / 128, c / 128].
struct Fp8Matrix {
  const uint8_t* values = nullptr;  // e4m3
  const float* scales = nullptr;    // [rows / 128, columns / 128], rounded up
};

// The shape of one expert, and where its parameters lie in its block of an arena.
struct Fp8ExpertShape {
  int32_t hidden = 0, inter = 0;  // multiples of 16

  // Gate and up in alternate runs of 8 rows, then down, as ExpertShape has them; then the scales of
  // gate, of up and of down; zeros up to a multiple of 16 bytes.
  size_t down_offset() const;
  size_t scales_offset() const;
  size_t down_scales_offset() const;
  size_t packed_bytes() const;
};

// Quantises by blocks of 128 x 128: scale = largest magnitude / 448, or 1 where all are zero.
// SHAPES w [rows, columns]; values and scales as in Fp8Matrix
void QuantiseMatrix(const float* w, int32_t rows, int32_t columns, uint8_t* values, float* scales);

// Packs one expert: what travels between ranks, and what its checksum covers.
// SHAPES gate, up [inter, hidden], down [hidden, inter]; packed holds packed_bytes(), 16-byte
//        aligned
// ERRORS kInvalidArgument: hidden or inter is not a positive multiple of 16
absl::Status PackFp8Expert(const Fp8ExpertShape& shape, const Fp8Matrix& gate, const Fp8Matrix& up,
                           const Fp8Matrix& down, std::byte* packed);

// Quantises the rows of all groups by runs of 128 columns, by the same rule as QuantiseMatrix.
// SHAPES x [num_rows, width] bf16; values [num_rows, width]; scales [width / 128 rounded up,
//        num_rows]; rows outside of groups are left alone
// REQUIRES width is a multiple of 16; x, values 16-byte aligned
// STREAM asynchronous, one launch
struct QuantiseRowsArgs {
  ExpertGroups groups;
  int32_t width = 0;
  const void* x = nullptr;
  uint8_t* values = nullptr;
  float* scales = nullptr;
};

// Computes every group's rows, as GroupedMlp, with x and activated quantised before each product:
//
//   sum += (sum over 128 of k of values) * (scale of the row * scale of the parameters)
//
// in fp32, k ascending; activated and y are bf16.
// SHAPES x, y [num_rows, hidden], activated [num_rows, inter] bf16; values [num_rows, W], scales
//        [W / 128 rounded up, num_rows] with W = max(hidden, inter): scratch; 16-byte aligned
// ERRORS kInvalidArgument: a shape, count or alignment that is not allowed; nothing is launched.
//        kUnimplemented: another device than Hopper
// STREAM asynchronous, four launches; all arrays stay until they are done
// ORDER  the bits of a row depend on the row and its expert alone; groups.size changes none. Inside
//        of 128 of k the order and the precision are the tensor core's.
// NOTE   compiled for sm_90a and run by the emulator of the tests; not seen on a device.
struct Fp8MlpArgs {
  Fp8ExpertShape shape;
  ExpertGroups groups;
  const void* x = nullptr;
  void* activated = nullptr;
  uint8_t* values = nullptr;
  float* scales = nullptr;
  void* y = nullptr;
};

absl::Status CheckQuantiseRows(const QuantiseRowsArgs& args);
absl::Status CheckFp8Mlp(const Fp8MlpArgs& args);

namespace cpu {
absl::Status QuantiseRows(const QuantiseRowsArgs& args, Stream stream);
}  // namespace cpu
// Pointers are to device memory. QuantiseRows gives the bits of the CPU's.
namespace cuda {
absl::Status QuantiseRows(const QuantiseRowsArgs& args, Stream stream);
absl::Status GroupedMlpFp8(const Fp8MlpArgs& args, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_GROUPED_MLP_FP8_H_
