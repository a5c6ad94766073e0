// The decoder's operations besides the matrix products and the MoE path. Every one is a loop over
// rows in which a row's bits depend on that row alone.
#ifndef BALLAST_KERNELS_DECODER_OPS_H_
#define BALLAST_KERNELS_DECODER_OPS_H_

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "base/dtype.h"
#include "kernels/stream.h"

namespace ballast {

// y[t] = the row token[t] of the table.  SHAPES token [T]  table [vocab, H]  y [T, H]
struct EmbedArgs {
  int32_t num_rows = 0, width = 0;
  const int32_t* token = nullptr;
  const float* table = nullptr;
  float* y = nullptr;
};

// y += x.  SHAPES x, y [T, H]
struct AddArgs {
  int32_t num_rows = 0, width = 0;
  const float* x = nullptr;
  float* y = nullptr;
};

// y[t] += bias, for every row.  SHAPES bias [H]  y [T, H]
struct AddBiasArgs {
  int32_t num_rows = 0, width = 0;
  const float* bias = nullptr;
  float* y = nullptr;
};

// Every head by itself: y = x / sqrt(mean(x²) + eps) * weight, once in fp32 and once rounded to the
// activation type.
// SHAPES x [R, num_heads, width] fp32  weight [width]  y_f32 [T, num_heads, width] or null
//        y_act [T, num_heads, width] of act_type or null  row [T] in [0, R) or null
//        Rows of x and y are `stride` elements apart, 0 stands for num_heads * width. Row t of y
//        comes from row row[t] of x, from row t where `row` is null; then y_f32 may be x.
struct RmsNormArgs {
  int32_t num_rows = 0, num_heads = 1, width = 0;
  int64_t stride = 0;
  const float* x = nullptr;
  const int32_t* row = nullptr;
  const float* weight = nullptr;
  float eps = 0;
  float* y_f32 = nullptr;
  DType act_type = DType::kF32;
  void* y_act = nullptr;

  int64_t row_stride() const { return stride != 0 ? stride : int64_t{num_heads} * width; }
};

// y = silu(gate) * up.  SHAPES gate_up [T, 2F]: gate first; y [T, F] of act_type
struct SiluMulArgs {
  int32_t num_rows = 0, width = 0;  // width = F
  const float* gate_up = nullptr;
  DType act_type = DType::kF32;
  void* y = nullptr;
};

// Rotary embedding in place, on the first rotary_dim elements of every head (halves, not pairs).
// SHAPES x [T, num_heads, head_dim], rows `stride` floats apart  position [T]
//        cos, sin [context, rotary_dim / 2]
struct RotaryArgs {
  int32_t num_rows = 0, num_heads = 0, head_dim = 0, rotary_dim = 0;
  int64_t stride = 0;
  float* x = nullptr;
  const int32_t* position = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
};

// Keys that one block of the cache holds. Attention goes over whole blocks from position 0, so the
// order of its sums is fixed by the position alone.
inline constexpr int kKvBlockTokens = 64;

// The cache of one layer: blocks of [kv_heads, kKvBlockTokens, head_dim] keys, and the same of
// values.
struct KvLayerView {
  DType type = DType::kF32;
  void* keys = nullptr;
  void* values = nullptr;
};

// Where the tokens of a batch stand: token t is at position[t] of the sequence whose blocks are
// block_table[table_offset[t] ...].
struct KvIndex {
  std::span<const int32_t> position;
  std::span<const int32_t> table_offset;
  std::span<const int32_t> block_table;
};

// Writes the keys and values of the batch's tokens into the cache.
// SHAPES k, v [T, kv_heads, head_dim] fp32, rows `stride` floats apart
struct KvWriteArgs {
  int32_t num_rows = 0, kv_heads = 0, head_dim = 0;
  int64_t stride = 0;
  const float* k = nullptr;
  const float* v = nullptr;
  KvIndex index;
  KvLayerView cache;
};

// y = softmax(q Kᵀ / sqrt(head_dim)) V over positions 0 .. position[t].
// SHAPES q [T, num_heads, head_dim] fp32, rows `stride` floats apart  y [T, num_heads * head_dim]
//        of act_type
// ORDER  blocks of kKvBlockTokens keys in ascending position; inside a block maximum first, then
//        exponentials, then keys in ascending position.
// REQUIRES head_dim <= 256
struct AttentionArgs {
  int32_t num_rows = 0, num_heads = 0, kv_heads = 0, head_dim = 0;
  int64_t stride = 0;
  const float* q = nullptr;
  KvIndex index;
  KvLayerView cache;
  DType act_type = DType::kF32;
  void* y = nullptr;
};

// id[t] = the first of the largest of row t: what a sampler of temperature 0 draws.
// SHAPES x [T, width]  id [T]  REQUIRES width > 0
// ORDER  ties to the lower id; a NaN is never the largest, but one at 0 is kept (std::max_element)
struct ArgmaxArgs {
  int32_t num_rows = 0, width = 0;
  const float* x = nullptr;
  int32_t* id = nullptr;
};

// They do not fail.
namespace cpu {
absl::Status Embed(const EmbedArgs& args, Stream stream);
absl::Status Add(const AddArgs& args, Stream stream);
absl::Status AddBias(const AddBiasArgs& args, Stream stream);
absl::Status RmsNorm(const RmsNormArgs& args, Stream stream);
absl::Status SiluMul(const SiluMulArgs& args, Stream stream);
absl::Status Rotary(const RotaryArgs& args, Stream stream);
absl::Status KvWrite(const KvWriteArgs& args, Stream stream);
absl::Status Attention(const AttentionArgs& args, Stream stream);
absl::Status Argmax(const ArgmaxArgs& args, Stream stream);
}  // namespace cpu

// The same bits as the CPU's. Pointers and spans are to device memory.
// STREAM asynchronous; the arrays must live until the stream gets there.
// ERRORS kInternal: a launch was refused
namespace cuda {
absl::Status Embed(const EmbedArgs& args, Stream stream);
absl::Status Add(const AddArgs& args, Stream stream);
absl::Status AddBias(const AddBiasArgs& args, Stream stream);
absl::Status RmsNorm(const RmsNormArgs& args, Stream stream);
absl::Status SiluMul(const SiluMulArgs& args, Stream stream);
absl::Status Rotary(const RotaryArgs& args, Stream stream);
absl::Status KvWrite(const KvWriteArgs& args, Stream stream);
absl::Status Attention(const AttentionArgs& args, Stream stream);
absl::Status Argmax(const ArgmaxArgs& args, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_DECODER_OPS_H_
