// How a block of threads moves a row and adds rows up: 16-byte vectors, each read once, as many
// accesses in flight as registers allow. All of it is bound by memory or by the links.
#ifndef BALLAST_KERNELS_ROW_MOVES_CUH_
#define BALLAST_KERNELS_ROW_MOVES_CUH_

#include "kernels/device.cuh"
#include "kernels/row_moves.h"

namespace ballast::cuda {

inline constexpr int kRowThreads = 256;  // of a block

// Copies one row to up to kMostChoices places, by all threads of the block. Either to peers, or
// what came from them.
template <bool kToPeers>
__device__ void CopyRow(const std::byte* from, std::byte* const* to, int num_to, int row_bytes) {
  constexpr int kAtOnce = 4;  // independent loads per thread
  const int vectors = row_bytes / 16;
  for (int first = static_cast<int>(threadIdx.x); first < vectors; first += kAtOnce * kRowThreads) {
    uint4 value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kRowThreads;
      if (at >= vectors) continue;
      const std::byte* vector = from + size_t{16} * at;
      value[i] = kToPeers ? LoadStreaming(vector) : LoadFresh(vector);
    }
    for (int d = 0; d < num_to; ++d) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * kRowThreads;
        if (at >= vectors) continue;
        if constexpr (kToPeers) {
          StorePeer(to[d] + size_t{16} * at, value[i]);
        } else {
          StoreStreaming(to[d] + size_t{16} * at, value[i]);
        }
      }
    }
  }
}

// The results of one token's copies, where they are.
struct Results {
  const std::byte* row[kMostChoices];
  float weight[kMostChoices];
};

// out = base + sum over k of weight[k] * row[k], k ascending, by all threads of the block.
// SHAPES base, out [vectors * 16 / size of T] (may be one array)
template <typename T>
__device__ void AddResults(const Results& results, int top_k, int vectors, const float* base,
                           float* out) {
  constexpr int kSize = Vector<T>::kSize;
  constexpr int kAtOnce = 8;  // rows whose vectors are in flight
  for (int at = static_cast<int>(threadIdx.x); at < vectors; at += kRowThreads) {
    const size_t first = static_cast<size_t>(at) * kSize;
    float sum[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = base[first + i];
    for (int begin = 0; begin < top_k; begin += kAtOnce) {
      uint4 bits[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j < top_k) bits[j] = LoadFresh(results.row[begin + j] + size_t{16} * at);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j >= top_k) break;
        const Vector<T> row(bits[j]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sum[i] = fmaf(results.weight[begin + j], ToFloat(row.at[i]), sum[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[first + i] = sum[i];
  }
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_ROW_MOVES_CUH_
