// Rows that are moved within one rank's memory, by index: what is left to a device where others
// carry the rows between ranks.
#ifndef BALLAST_KERNELS_ROW_MOVES_H_
#define BALLAST_KERNELS_ROW_MOVES_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "base/dtype.h"
#include "kernels/stream.h"

namespace ballast {

inline constexpr int32_t kMostChoices = 32;  // top-k

// Copies rows together.
//
//   out[i] = in[index[i]], or what it was where index[i] is -1
//
// SHAPES index [num_rows]; in, out rows of row_bytes, apart
struct GatherRowsArgs {
  int32_t num_rows = 0;
  int32_t row_bytes = 0;  // a multiple of 16
  const int32_t* index = nullptr;
  const std::byte* in = nullptr;
  std::byte* out = nullptr;
};

// Adds up the results of each token's copies, which lie in one array.
//
//   out[t] = base[t] + sum over k of weight[t, k] * result[index[t, k]], k ascending, in fp32
//
// SHAPES weights, index [T, K]; results rows [width] of `type`; base, out [T, width] (may be one)
struct CombineRowsArgs {
  int32_t num_tokens = 0, top_k = 0;
  int32_t width = 0;  // rows of it are multiples of 16 bytes
  DType type = DType::kF32;
  const float* weights = nullptr;
  const int32_t* index = nullptr;
  const std::byte* results = nullptr;
  const float* base = nullptr;
  float* out = nullptr;
};

// REQUIRES rows begin at multiples of 16 bytes
// ERRORS kInvalidArgument: a count or size that is not allowed; nothing is done
absl::Status CheckGatherRows(const GatherRowsArgs& args);
absl::Status CheckCombineRows(const CombineRowsArgs& args);

namespace cpu {
absl::Status GatherRows(const GatherRowsArgs& args, Stream stream);
absl::Status CombineRows(const CombineRowsArgs& args, Stream stream);
}  // namespace cpu
// Pointers are to device memory. STREAM asynchronous
namespace cuda {
absl::Status GatherRows(const GatherRowsArgs& args, Stream stream);
absl::Status CombineRows(const CombineRowsArgs& args, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_ROW_MOVES_H_
