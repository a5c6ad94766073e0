// CUDA twins of KvWrite and Attention. One block attends for one token with up to kMostHeads query
// heads that share keys and values. It goes over tiles of several key blocks: all its half warps
// score the keys of a tile, then take the exponentials of its key blocks; then every thread follows
// one column of the values. What the order of the sums fixes, the running maximum and the chain of
// a column over the keys, is as on the CPU, so the bits are too.
#include "base/check.h"
#include "kernels/decoder_ops.h"
#include "kernels/device.cuh"

namespace ballast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHalfWarps = kThreads / kLanes;
constexpr int kMaxHeadDim = kThreads;  // a thread per column at least
constexpr int kMostHeads = 8;
constexpr int kTileBlocks = 4;
constexpr int kTileKeys = kTileBlocks * kKvBlockTokens;
constexpr float kInfinity = __builtin_huge_valf();

// ---- device functions -------------------------------------------------------------------------

// What a block of threads shares. Heads that there are not have queries of zeros.
template <int kHeads>
struct Tile {
  float q[kHeads][kMaxHeadDim];
  float score[kHeads][kTileKeys];              // -infinity behind the last key
  float p[kHeads][kTileKeys];                  // exponentials, against the largest so far
  float largest[kHeads][kTileBlocks];          // after the key block
  float shrink[kHeads][kTileBlocks];           // of what was summed before the key block
  float block_sum[kHeads][kTileBlocks];        // of p
  float all_largest[kHeads], all_sum[kHeads];  // after the tiles so far
};

// The work of one block of threads.
template <typename T>
struct Work {
  int num_keys, heads, head_dim;   // of the query; of them here; of each
  const int32_t* blocks;           // the sequence's
  size_t head_offset, block_size;  // elements: of the kv head in a block of the cache; of a block
  const T* keys;
  const T* values;
  // Element 0 of a key, or of its value.
  __device__ size_t At(int key) const {
    return blocks[key / kKvBlockTokens] * block_size + head_offset +
           static_cast<size_t>(key % kKvBlockTokens) * head_dim;
  }
};

// Scores of the keys from `begin`. A half warp takes as many keys at a time as give kLanes products
// with the heads.
template <int kHeads, typename T>
__device__ void ScoreTile(const Work<T>& work, int begin, float scale, Tile<kHeads>* tile) {
  constexpr int kKeys = kLanes / kHeads;
  const int lane = threadIdx.x % kLanes;
  for (int first = threadIdx.x / kLanes * kKeys; first < kTileKeys; first += kHalfWarps * kKeys) {
    const int left = work.num_keys - begin - first;
    float& score = tile->score[lane % kHeads][first + lane / kHeads];
    if (left <= 0) {
      score = -kInfinity;
      continue;
    }
    const T* keys = work.keys + work.At(begin + first);
    float dot[kLanes] = {};
    for (int d = lane; d < work.head_dim; d += kLanes) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float key = j < left ? ToFloat(keys[j * work.head_dim + d]) : 0.0f;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          dot[j * kHeads + h] = fmaf(tile->q[h][d], key, dot[j * kHeads + h]);
        }
      }
    }
    const float sum = SumLanesOfEach(dot);
    score = lane / kHeads < left ? sum * scale : -kInfinity;
  }
}

__device__ float LargestOfHalfWarp(float x) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(HalfWarp(), x, distance, kLanes));
  }
  return x;
}

// Exponentials of the tile's scores. A half warp takes one key block of one head; the maximum of
// the key blocks before it, it finds itself.
template <int kHeads>
__device__ void ExponentiateTile(Tile<kHeads>* tile) {
  const int lane = threadIdx.x % kLanes;
  for (int unit = threadIdx.x / kLanes; unit < kHeads * kTileBlocks; unit += kHalfWarps) {
    const int head = unit / kTileBlocks, block = unit % kTileBlocks;
    const float* score = tile->score[head];
    float before = tile->all_largest[head];
    for (int j = lane; j < block * kKvBlockTokens; j += kLanes) before = fmaxf(before, score[j]);
    before = LargestOfHalfWarp(before);
    const int begin = block * kKvBlockTokens, end = begin + kKvBlockTokens;
    float largest = before;
    for (int j = begin + lane; j < end; j += kLanes) largest = fmaxf(largest, score[j]);
    largest = LargestOfHalfWarp(largest);
    float sum = 0.0f;
    for (int j = begin + lane; j < end; j += kLanes) {
      const float p = Exp(score[j] - largest);
      tile->p[head][j] = p;
      sum += p;
    }
    sum = SumLanes(sum);
    if (lane != 0) continue;
    tile->largest[head][block] = largest;
    tile->shrink[head][block] = Exp(before - largest);
    tile->block_sum[head][block] = sum;
  }
}

// The columns that a thread follows: one, of every `step`-th head from `head` on.
struct Columns {
  int d, head, step;
  __device__ explicit Columns(int head_dim)
      : d(threadIdx.x % head_dim), head(threadIdx.x / head_dim), step(kThreads / head_dim) {
    if (head >= step) head = kMostHeads;  // threads left over follow none
  }
};

// Adds the values of the tile's keys to the thread's columns, key after key.
template <int kHeads, typename T>
__device__ void AddValues(const Work<T>& work, int begin, const Tile<kHeads>& tile,
                          const Columns& own, float (&y)[kHeads]) {
  if (own.head >= kHeads) return;
  for (int b = 0; b < kTileBlocks && begin + b * kKvBlockTokens < work.num_keys; ++b) {
    const int first = b * kKvBlockTokens;
    const int keys = min(kKvBlockTokens, work.num_keys - begin - first);
    const T* values = work.values + work.At(begin + first) + own.d;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (own.head + i * own.step < kHeads) y[i] *= tile.shrink[own.head + i * own.step][b];
    }
#pragma unroll 4
    for (int j = 0; j < keys; ++j) {
      const float value = ToFloat(values[static_cast<size_t>(j) * work.head_dim]);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        const int head = own.head + i * own.step;
        if (head < kHeads) y[i] = fmaf(tile.p[head][first + j], value, y[i]);
      }
    }
  }
}

// ---- kernels ----------------------------------------------------------------------------------

// One thread per element of the keys.
template <typename T>
__global__ void KvWriteKernel(KvWriteArgs a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row_size = a.kv_heads * a.head_dim;
  const int64_t row = at / row_size;
  if (row >= a.num_rows) return;
  const int column = static_cast<int>(at % row_size);
  const int head = column / a.head_dim, d = column % a.head_dim;
  const int position = a.index.position.data()[row];
  const int32_t* blocks = a.index.block_table.data() + a.index.table_offset.data()[row];
  const size_t to = ((static_cast<size_t>(blocks[position / kKvBlockTokens]) * a.kv_heads + head) *
                         kKvBlockTokens +
                     position % kKvBlockTokens) *
                        a.head_dim +
                    d;
  static_cast<T*>(a.cache.keys)[to] = RoundTo<T>(a.k[row * a.stride + column]);
  static_cast<T*>(a.cache.values)[to] = RoundTo<T>(a.v[row * a.stride + column]);
}

// One block per token and chunk of kHeads query heads with the same keys. Two of them
// on a multiprocessor leave each thread the registers it needs; with more, the products are
// spilled.
template <int kHeads, typename T>
__global__ void __launch_bounds__(kThreads, 2) AttentionKernel(AttentionArgs a, int chunks) {
  Tile<kHeads>& tile = Shared<Tile<kHeads>>();
  const int chunk = blockIdx.x % chunks, kv_head = blockIdx.x / chunks % a.kv_heads;
  const size_t token = blockIdx.x / chunks / a.kv_heads;
  const int heads_per_kv = a.num_heads / a.kv_heads;
  const int first_head = kv_head * heads_per_kv + chunk * kHeads;
  const size_t head_block = static_cast<size_t>(kKvBlockTokens) * a.head_dim;
  const Work<T> work = {a.index.position.data()[token] + 1,
                        min(kHeads, heads_per_kv - chunk * kHeads),
                        a.head_dim,
                        a.index.block_table.data() + a.index.table_offset.data()[token],
                        kv_head * head_block,
                        a.kv_heads * head_block,
                        static_cast<const T*>(a.cache.keys),
                        static_cast<const T*>(a.cache.values)};
  const float* q = a.q + token * a.stride + static_cast<size_t>(first_head) * a.head_dim;
  for (int i = threadIdx.x; i < kHeads * a.head_dim; i += kThreads) {
    const int head = i / a.head_dim;
    tile.q[head][i % a.head_dim] = head < work.heads ? q[i] : 0.0f;
  }
  if (threadIdx.x < kHeads) {
    tile.all_largest[threadIdx.x] = -kInfinity;
    tile.all_sum[threadIdx.x] = 0.0f;
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(a.head_dim));
  const Columns own(a.head_dim);
  float y[kHeads] = {};
  __syncthreads();
  for (int begin = 0; begin < work.num_keys; begin += kTileKeys) {
    ScoreTile(work, begin, scale, &tile);
    __syncthreads();
    ExponentiateTile(&tile);
    __syncthreads();
    AddValues(work, begin, tile, own, y);
    if (threadIdx.x >= kHeads) continue;
    for (int b = 0; b < kTileBlocks; ++b) {
      tile.all_sum[threadIdx.x] = fmaf(tile.all_sum[threadIdx.x], tile.shrink[threadIdx.x][b],
                                       tile.block_sum[threadIdx.x][b]);
    }
    tile.all_largest[threadIdx.x] = tile.largest[threadIdx.x][kTileBlocks - 1];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = own.head + i * own.step;
    if (head >= work.heads) continue;
    const size_t at = (token * a.num_heads + first_head + head) * a.head_dim + own.d;
    StoreAs(a.act_type, a.y, at, y[i] / tile.all_sum[head]);
  }
}

// ---- launchers --------------------------------------------------------------------------------

template <int kHeads>
absl::Status LaunchAttention(const AttentionArgs& a, Stream stream) {
  const int chunks = CeilDiv(a.num_heads / a.kv_heads, kHeads);
  const LaunchShape shape = {
      .blocks = static_cast<unsigned>(a.num_rows) * static_cast<unsigned>(a.kv_heads * chunks),
      .threads = kThreads,
      .shared_bytes = sizeof(Tile<kHeads>)};
  return a.cache.type == DType::kF32
             ? Launch(shape, stream, AttentionKernel<kHeads, float>, a, chunks)
             : Launch(shape, stream, AttentionKernel<kHeads, __nv_bfloat16>, a, chunks);
}

}  // namespace

absl::Status KvWrite(const KvWriteArgs& a, Stream stream) {
  const size_t count = static_cast<size_t>(a.num_rows) * a.kv_heads * a.head_dim;
  if (count == 0) return absl::OkStatus();
  const LaunchShape shape = {.blocks = static_cast<unsigned>(CeilDiv(count, size_t{kThreads})),
                             .threads = kThreads};
  return a.cache.type == DType::kF32 ? Launch(shape, stream, KvWriteKernel<float>, a)
                                     : Launch(shape, stream, KvWriteKernel<__nv_bfloat16>, a);
}

absl::Status Attention(const AttentionArgs& a, Stream stream) {
  BALLAST_CHECK(a.head_dim <= kMaxHeadDim && a.num_heads % a.kv_heads == 0);
  if (a.num_rows == 0) return absl::OkStatus();
  const int heads_per_kv = a.num_heads / a.kv_heads;
  if (heads_per_kv <= 1) return LaunchAttention<1>(a, stream);
  if (heads_per_kv <= 2) return LaunchAttention<2>(a, stream);
  if (heads_per_kv <= 4) return LaunchAttention<4>(a, stream);
  return LaunchAttention<kMostHeads>(a, stream);
}

}  // namespace ballast::cuda
