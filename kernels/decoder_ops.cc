#include "kernels/decoder_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "kernels/vector_math.h"

namespace ballast::cpu {
namespace {

constexpr int kMaxHeadDim = 256;

template <typename Act>
void ScaleRow(const float* x, float factor, const float* weight, int width, Act* y) {
  for (int i = 0; i < width; ++i) y[i] = FromFloat<Act>(x[i] * factor * weight[i]);
}

template <typename Act>
void SiluMulRow(const float* gate, const float* up, int width, Act* y) {
  for (int i = 0; i < width; ++i) y[i] = FromFloat<Act>(Silu(gate[i]) * up[i]);
}

template <typename T>
void KvWriteTyped(const KvWriteArgs& a) {
  const size_t head_block = static_cast<size_t>(kKvBlockTokens) * a.head_dim;
  for (int t = 0; t < a.num_rows; ++t) {
    const int position = a.index.position[t];
    const int32_t block = a.index.block_table[a.index.table_offset[t] + position / kKvBlockTokens];
    for (int h = 0; h < a.kv_heads; ++h) {
      const size_t to = (static_cast<size_t>(block) * a.kv_heads + h) * head_block +
                        static_cast<size_t>(position % kKvBlockTokens) * a.head_dim;
      const size_t from = static_cast<size_t>(t) * a.stride + static_cast<size_t>(h) * a.head_dim;
      for (int d = 0; d < a.head_dim; ++d) {
        static_cast<T*>(a.cache.keys)[to + d] = FromFloat<T>(a.k[from + d]);
        static_cast<T*>(a.cache.values)[to + d] = FromFloat<T>(a.v[from + d]);
      }
    }
  }
}

// The running state of one query head's softmax.
struct OnlineSoftmax {
  float largest = -std::numeric_limits<float>::infinity();
  float sum = 0;
  float y[kMaxHeadDim] = {};
};

// Takes up to kKvBlockTokens more keys into the state.
template <typename T>
void AddBlock(const float* q, const T* keys, const T* values, int num_keys, int head_dim,
              float scale, OnlineSoftmax* state) {
  float p[kKvBlockTokens];
  float largest = state->largest;
  for (int j = 0; j < kKvBlockTokens; ++j) p[j] = -std::numeric_limits<float>::infinity();
  for (int j = 0; j < num_keys; ++j) {
    p[j] = Dot(q, keys + static_cast<size_t>(j) * head_dim, head_dim) * scale;
    largest = std::max(largest, p[j]);
  }
  for (int j = 0; j < kKvBlockTokens; ++j) p[j] = Exp(p[j] - largest);
  float lane[kLanes] = {};
  for (int j = 0; j < kKvBlockTokens; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) lane[i] += p[j + i];
  }
  const float shrink = Exp(state->largest - largest);
  state->sum = std::fma(state->sum, shrink, SumLanes(lane));
  for (int d = 0; d < head_dim; ++d) state->y[d] *= shrink;
  for (int j = 0; j < num_keys; ++j) {
    const T* value = values + static_cast<size_t>(j) * head_dim;
    for (int d = 0; d < head_dim; ++d) state->y[d] = std::fma(p[j], ToFloat(value[d]), state->y[d]);
  }
  state->largest = largest;
}

template <typename T, typename Act>
void AttentionTyped(const AttentionArgs& a) {
  const size_t head_block = static_cast<size_t>(kKvBlockTokens) * a.head_dim;
  const int heads_per_kv = a.num_heads / a.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  const T* keys = static_cast<const T*>(a.cache.keys);
  const T* values = static_cast<const T*>(a.cache.values);
  for (int t = 0; t < a.num_rows; ++t) {
    const int num_keys = a.index.position[t] + 1;
    const int32_t* blocks = a.index.block_table.data() + a.index.table_offset[t];
    for (int h = 0; h < a.num_heads; ++h) {
      const float* q =
          a.q + static_cast<size_t>(t) * a.stride + static_cast<size_t>(h) * a.head_dim;
      OnlineSoftmax state;
      for (int begin = 0; begin < num_keys; begin += kKvBlockTokens) {
        const size_t at =
            (static_cast<size_t>(blocks[begin / kKvBlockTokens]) * a.kv_heads + h / heads_per_kv) *
            head_block;
        AddBlock(q, keys + at, values + at, std::min(kKvBlockTokens, num_keys - begin), a.head_dim,
                 scale, &state);
      }
      Act* y = static_cast<Act*>(a.y) + (static_cast<size_t>(t) * a.num_heads + h) * a.head_dim;
      for (int d = 0; d < a.head_dim; ++d) y[d] = FromFloat<Act>(state.y[d] / state.sum);
    }
  }
}

}  // namespace

absl::Status Embed(const EmbedArgs& a, Stream) {
  for (int t = 0; t < a.num_rows; ++t) {
    std::copy_n(a.table + static_cast<size_t>(a.token[t]) * a.width, a.width,
                a.y + static_cast<size_t>(t) * a.width);
  }
  return absl::OkStatus();
}

absl::Status Add(const AddArgs& a, Stream) {
  const size_t count = static_cast<size_t>(a.num_rows) * a.width;
  for (size_t i = 0; i < count; ++i) a.y[i] += a.x[i];
  return absl::OkStatus();
}

absl::Status AddBias(const AddBiasArgs& a, Stream) {
  for (int t = 0; t < a.num_rows; ++t) {
    float* y = a.y + static_cast<size_t>(t) * a.width;
    for (int i = 0; i < a.width; ++i) y[i] += a.bias[i];
  }
  return absl::OkStatus();
}

absl::Status RmsNorm(const RmsNormArgs& a, Stream) {
  const size_t stride = static_cast<size_t>(a.row_stride());
  for (int t = 0; t < a.num_rows; ++t) {
    const size_t from = static_cast<size_t>(a.row != nullptr ? a.row[t] : t) * stride;
    for (int h = 0; h < a.num_heads; ++h) {
      const size_t head = static_cast<size_t>(h) * a.width;
      const float* x = a.x + from + head;
      const size_t to = static_cast<size_t>(t) * stride + head;
      const float mean_square = Dot(x, x, a.width) / static_cast<float>(a.width);
      const float factor = 1.0f / std::sqrt(mean_square + a.eps);
      if (a.y_act != nullptr && a.act_type == DType::kF32) {
        ScaleRow(x, factor, a.weight, a.width, static_cast<float*>(a.y_act) + to);
      } else if (a.y_act != nullptr) {
        ScaleRow(x, factor, a.weight, a.width, static_cast<BFloat16*>(a.y_act) + to);
      }
      // Last, since it may overwrite x.
      if (a.y_f32 != nullptr) ScaleRow(x, factor, a.weight, a.width, a.y_f32 + to);
    }
  }
  return absl::OkStatus();
}

absl::Status SiluMul(const SiluMulArgs& a, Stream) {
  for (int t = 0; t < a.num_rows; ++t) {
    const float* gate = a.gate_up + static_cast<size_t>(t) * 2 * a.width;
    const size_t row = static_cast<size_t>(t) * a.width;
    if (a.act_type == DType::kF32) {
      SiluMulRow(gate, gate + a.width, a.width, static_cast<float*>(a.y) + row);
    } else {
      SiluMulRow(gate, gate + a.width, a.width, static_cast<BFloat16*>(a.y) + row);
    }
  }
  return absl::OkStatus();
}

absl::Status Rotary(const RotaryArgs& a, Stream) {
  const int half = a.rotary_dim / 2;
  for (int t = 0; t < a.num_rows; ++t) {
    const float* cos = a.cos + static_cast<size_t>(a.position[t]) * half;
    const float* sin = a.sin + static_cast<size_t>(a.position[t]) * half;
    for (int h = 0; h < a.num_heads; ++h) {
      float* x = a.x + static_cast<size_t>(t) * a.stride + static_cast<size_t>(h) * a.head_dim;
      for (int i = 0; i < half; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = std::fma(low, cos[i], -(high * sin[i]));
        x[i + half] = std::fma(high, cos[i], low * sin[i]);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status KvWrite(const KvWriteArgs& a, Stream) {
  if (a.cache.type == DType::kF32) {
    KvWriteTyped<float>(a);
  } else {
    KvWriteTyped<BFloat16>(a);
  }
  return absl::OkStatus();
}

absl::Status Attention(const AttentionArgs& a, Stream) {
  BALLAST_CHECK(a.head_dim <= kMaxHeadDim && a.num_heads % a.kv_heads == 0);
  if (a.cache.type == DType::kF32) {
    a.act_type == DType::kF32 ? AttentionTyped<float, float>(a)
                              : AttentionTyped<float, BFloat16>(a);
  } else {
    a.act_type == DType::kF32 ? AttentionTyped<BFloat16, float>(a)
                              : AttentionTyped<BFloat16, BFloat16>(a);
  }
  return absl::OkStatus();
}

absl::Status Argmax(const ArgmaxArgs& a, Stream) {
  for (int t = 0; t < a.num_rows; ++t) {
    const float* x = a.x + static_cast<size_t>(t) * a.width;
    a.id[t] = static_cast<int32_t>(std::max_element(x, x + a.width) - x);
  }
  return absl::OkStatus();
}

}  // namespace ballast::cpu
