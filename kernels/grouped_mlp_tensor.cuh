// What the tensor paths of the grouped MLP share: the ring of stages between the warp that copies
// and those that multiply, the epilogue, the launch. A path says what its tiles are (TileShape, its
// kernel) and how one is multiplied.
#ifndef BALLAST_KERNELS_GROUPED_MLP_TENSOR_CUH_
#define BALLAST_KERNELS_GROUPED_MLP_TENSOR_CUH_

#include <cstring>

#include "base/status.h"
#include "kernels/grouped_mlp.cuh"
#include "kernels/hopper.cuh"

namespace ballast::cuda {

inline constexpr int kWarpgroupRows = 64;
inline constexpr int kWarpgroup = 128;  // threads
// Of parameters per product: one instruction for every tile, so that all give the same bits.
inline constexpr int kPartColumns = 128;
inline constexpr int kPartSums = 64;         // per thread
inline constexpr int kProductsPerStage = 4;  // along k: 32 bytes of a row each
inline constexpr size_t kRingBytes = 200 << 10;

// kElementBytes: of x and of the parameters. kActivate: the first of the two products.
template <int kElementBytes_, int kColumns_, int kWarpgroups_, bool kActivate_>
struct TileShape {
  static constexpr int kElementBytes = kElementBytes_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kParts = kColumns / kPartColumns;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr bool kActivate = kActivate_;
  static constexpr int kRows = kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = kWarpgroups * kWarpgroup + static_cast<int>(kWarp);
  static constexpr int kStepColumns = kBoxBytes / kElementBytes;  // of k per stage
  // Of a box of x: a whole tile, or an atom where groups are small.
  static constexpr int kBoxRows = kWarpgroups == 1 ? 8 : kRows;
  static constexpr int kStages = static_cast<int>(kRingBytes / ((kRows + kColumns) * kBoxBytes));

  struct Stage {
    alignas(kAtomBytes) unsigned char x[kRows * kBoxBytes];
    alignas(kAtomBytes) unsigned char w[kColumns * kBoxBytes];
  };
  struct Ring {
    Stage stage[kStages];
    Barrier full[kStages], empty[kStages];
    int first[1];  // [groups + 1], as large as the launch says
  };
};

struct TensorView {
  ExpertGroups groups;
  Product product;
  __nv_bfloat16* out;
};

// ---- device functions -------------------------------------------------------------------------

// A place in the ring. A stage's barriers change their parity with every turn.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One thread: fills the ring with what the consumers will want, in their order.
template <typename Shape>
__device__ void Produce(const TensorView& v, const TensorMap& x, const TensorMap& w,
                        typename Shape::Ring& ring) {
  PrefetchMap(x);
  PrefetchMap(w);
  const int across = CeilDiv(v.product.n, Shape::kColumns);
  const int tiles = ring.first[v.groups.num_groups] * across;
  Turn<Shape::kStages> turn;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile = FindTile<Shape::kRows, Shape::kColumns>(v.groups, ring.first, across, t);
    const int block = v.groups.block[tile.group];
    const int rows = min(CeilDiv(tile.rows, Shape::kBoxRows) * Shape::kBoxRows, Shape::kRows);
    for (int k = 0; k < v.product.k; k += Shape::kStepColumns) {
      typename Shape::Stage& stage = ring.stage[turn.stage];
      Barrier* full = &ring.full[turn.stage];
      Wait(&ring.empty[turn.stage], turn.parity ^ 1);  // at once in the first turn
      ArriveExpecting(full, static_cast<uint32_t>((rows + Shape::kColumns) * kBoxBytes));
      CopyBox(stage.w, w, full, k, tile.column, block);
      // Rows that are not copied are old ones or noise: each spoils its own sums only.
      for (int row = 0; row < rows; row += Shape::kBoxRows) {
        CopyBox(stage.x + row * kBoxBytes, x, full, k, tile.row + row, 0);
      }
      turn.Next();
    }
  }
}

// All threads of the block: makes the ring ready, and counts the tiles.
template <typename Shape>
__device__ typename Shape::Ring& BeginRing(const TensorView& v) {
  auto& ring = Shared<typename Shape::Ring>();
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      InitBarrier(&ring.full[s], 1);
      InitBarrier(&ring.empty[s], Shape::kWarpgroups * kWarpgroup / kWarp);
    }
    FenceAsyncProxy();
  }
  CountTiles<Shape::kRows>(v.groups, ring.first);
  return ring;
}

// Word i of lane j of four lanes becomes word j of lane i.
__device__ inline void TransposeInFour(unsigned lane, uint32_t (&word)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & static_cast<unsigned>(distance)) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t& low = word[i];
      uint32_t& high = word[i + distance];
      const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? low : high, distance);
      (upper ? low : high) = other;
    }
  }
}

__device__ inline uint32_t Pair(float a, float b) {
  const __nv_bfloat16 pair[2] = {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// Two neighbours of run b of the 8-column runs of the result, in the row's upper or lower half.
template <bool kActivate>
__device__ uint32_t ResultPair(const float (&sum)[kPartSums], int run, int half) {
  if constexpr (kActivate) {
    const int gate = 8 * run + 2 * half, up = gate + 4;
    return Pair(Silu(sum[gate]) * sum[up], Silu(sum[gate + 1]) * sum[up + 1]);
  } else {
    return Pair(sum[4 * run + 2 * half], sum[4 * run + 2 * half + 1]);
  }
}

// `column`: of the result, where the part begins.
template <bool kActivate>
__device__ void StorePart(const TensorView& v, const Tile& tile, int column,
                          const float (&sum)[kPartSums]) {
  constexpr int kRuns = kPartColumns / (kActivate ? 16 : 8);
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = static_cast<int>(threadIdx.x / kWarp * 16 + lane / 4) + 8 * half;
    __nv_bfloat16* out = v.out + static_cast<size_t>(tile.row + row) * v.product.out_width;
#pragma unroll
    for (int run = 0; run < kRuns; run += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = ResultPair<kActivate>(sum, run + i, half);
      TransposeInFour(lane, word);
      const int at = column + 8 * (run + static_cast<int>(lane % 4));
      if (row < tile.rows && at < v.product.out_width) {
        *reinterpret_cast<uint4*>(out + at) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// The warps that multiply: multiply(tile, turn, sum) adds up a tile and gives its stages back.
template <typename Shape, typename MultiplyTile>
__device__ void Consume(const TensorView& v, const typename Shape::Ring& ring,
                        const MultiplyTile& multiply) {
  const int across = CeilDiv(v.product.n, Shape::kColumns);
  const int tiles = ring.first[v.groups.num_groups] * across;
  Turn<Shape::kStages> turn;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile = FindTile<Shape::kRows, Shape::kColumns>(v.groups, ring.first, across, t);
    float sum[Shape::kParts][kPartSums];
    multiply(tile, turn, sum);
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      const int column = tile.column + part * kPartColumns;
      StorePart<Shape::kActivate>(v, tile, Shape::kActivate ? column / 2 : column, sum[part]);
    }
  }
}

// ---- launchers --------------------------------------------------------------------------------

// Where the operands of a product are; w is that of block 0.
struct Operands {
  const void* x;
  const std::byte* w;
};

// Launches kernel(map of x, map of w, view).
template <typename Shape, typename View>
absl::Status LaunchTensor(const DeviceTraits& traits, const Operands& o, const View& view,
                          void (*kernel)(const TensorMap, const TensorMap, View), Stream stream) {
  const TensorView& v = view;
  const auto rows = static_cast<uint64_t>(v.groups.num_rows);
  const auto k = static_cast<uint64_t>(v.product.k);
  BALLAST_ASSIGN_OR_RETURN(const TensorMap x,
                           MakeTensorMap({.at = o.x,
                                          .columns = k,
                                          .rows = rows,
                                          .row_bytes = Shape::kElementBytes * k,
                                          .matrix_bytes = Shape::kElementBytes * k * rows,
                                          .element_bytes = Shape::kElementBytes,
                                          .box_rows = Shape::kBoxRows}));
  BALLAST_ASSIGN_OR_RETURN(const TensorMap w,
                           MakeTensorMap({.at = o.w,
                                          .columns = k,
                                          .rows = static_cast<uint64_t>(v.product.n),
                                          .depth = static_cast<uint64_t>(v.groups.num_blocks),
                                          .row_bytes = Shape::kElementBytes * k,
                                          .matrix_bytes = v.groups.block_bytes,
                                          .element_bytes = Shape::kElementBytes,
                                          .box_rows = Shape::kColumns}));
  const LaunchShape shape = {
      .blocks = ResidentBlocks(v.groups, Shape::kRows, CeilDiv(v.product.n, Shape::kColumns),
                               traits.multiprocessors),
      .threads = Shape::kThreads,
      .shared_bytes =
          sizeof(typename Shape::Ring) + static_cast<size_t>(v.groups.num_groups) * sizeof(int)};
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared));
  if (error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat("grouped mlp: ", shape.shared_bytes,
                     " bytes of shared memory: ", cudaGetErrorString(error)));
  }
  return Launch(shape, stream, kernel, x, w, view);
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_GROUPED_MLP_TENSOR_CUH_
