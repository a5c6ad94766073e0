// The grouped MLP for bf16 on Hopper's tensor cores.
//
// One warp copies tiles of x and of the parameters into a ring of stages; each warpgroup multiplies
// 64 rows of x by all columns of the tile. Blocks stay and walk over the tiles. silu(gate) * up is
// worked out from the registers in which the first product's sums are.
//
// Why these tiles (per multiprocessor and clock: 4096 flops of bf16, 128 bytes of shared memory,
// about 21 bytes of an H200's device memory):
// - 64 rows by 256 columns by 16 of k takes 128 clocks, brings 8 KiB of parameters, which memory
//   needs 390 clocks for, and reads 10 KiB of shared memory, 80 bytes per clock. So even a single
//   row is computed three times faster than its parameters come: there is no need of another
//   instruction for few rows, and with one instruction all batches have the same bits.
// - Few rows per group: one warpgroup, so that the ring has the space: 5 stages of 40 KiB, all of
//   them under way, where 5 TB/s at 1 us need 36 KiB per multiprocessor. Of x come only as many
//   atoms of 8 rows as the group has.
// - Many rows: two warpgroups share the parameters: 128 by 256 by 64 takes 1024 clocks and copies
//   48 KiB, 47 bytes per clock and multiprocessor, mostly from L2, 4 stages of which 3 are ahead.
// - Under 4096 columns tiles are 128 wide (8 stages of 24 KiB, or 6 of 32 KiB): 8 groups of one row
//   give 8 * 4096 / 256 = 128 tiles for 132 multiprocessors, fewer columns would leave some idle.
// Registers: 128 sums per thread of at most 224 (288 threads); no warp has to give any away.
#include "base/status.h"
#include "kernels/grouped_mlp.cuh"
#include "kernels/hopper.cuh"

namespace ballast::cuda {
namespace {

constexpr int kStepColumns = kBoxBytes / 2;  // of k per stage: rows of 128 bytes
constexpr int kInstructionColumns = 16;      // of k per product
constexpr int kWarpgroupRows = 64;
constexpr int kWarpgroup = 128;  // threads
constexpr int kWideFrom = 4096;  // columns, from which on tiles are 256 wide
constexpr size_t kRingBytes = 200 << 10;

template <int kColumns_, int kWarpgroups_, bool kActivate_>
struct TileShape {
  static constexpr int kColumns = kColumns_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr bool kActivate = kActivate_;
  static constexpr int kRows = kWarpgroups * kWarpgroupRows;
  static constexpr int kThreads = kWarpgroups * kWarpgroup + static_cast<int>(kWarp);
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

struct View {
  Groups groups;
  Product product;
  __nv_bfloat16* out;
};

// ---- device functions
// -------------------------------------------------------------------------------

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
__device__ void Produce(const View& v, const TensorMap& x, const TensorMap& w,
                        typename Shape::Ring& ring) {
  PrefetchMap(x);
  PrefetchMap(w);
  const int across = CeilDiv(v.product.n, Shape::kColumns);
  const int tiles = ring.first[v.groups.num] * across;
  Turn<Shape::kStages> turn;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile = FindTile<Shape::kRows, Shape::kColumns>(v.groups, ring.first, across, t);
    const int block = v.groups.block[tile.group];
    const int rows = min(CeilDiv(tile.rows, Shape::kBoxRows) * Shape::kBoxRows, Shape::kRows);
    for (int k = 0; k < v.product.k; k += kStepColumns) {
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

// The sums of one tile; the ring's stages go back as soon as nothing reads them.
template <typename Shape>
__device__ void Multiply(int k, typename Shape::Ring& ring, Turn<Shape::kStages>& turn,
                         float (&sum)[Shape::kColumns / 2]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const bool speaks = threadIdx.x % kWarp == 0;  // for its warp
  int previous = 0;
  for (int k0 = 0; k0 < k; k0 += kStepColumns) {
    typename Shape::Stage& stage = ring.stage[turn.stage];
    Wait(&ring.full[turn.stage], turn.parity);
    const uint64_t x = TileDescriptor(stage.x + warpgroup * kWarpgroupRows * kBoxBytes);
    const uint64_t w = TileDescriptor(stage.w);
    FenceSums();
#pragma unroll
    for (int i = 0; i < kStepColumns / kInstructionColumns; ++i) {
      const uint64_t along = static_cast<uint64_t>(i * kInstructionColumns * 2 / 16);
      MultiplyTiles(sum, x + along, w + along, k0 > 0 || i > 0);
    }
    CommitProducts();
    if (k0 > 0) {
      WaitProducts<1>();  // those of the stage before
      if (speaks) Arrive(&ring.empty[previous]);
    }
    previous = turn.stage;
    turn.Next();
  }
  WaitSums(sum);
  if (speaks) Arrive(&ring.empty[previous]);
}

// Word i of lane j of four lanes becomes word j of lane i.
__device__ void TransposeInFour(unsigned lane, uint32_t (&word)[4]) {
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

__device__ uint32_t Pair(float a, float b) {
  const __nv_bfloat16 pair[2] = {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}

// Two neighbours of run b of the 8-column runs of the result, in the row's upper or lower half.
template <bool kActivate, int kSums>
__device__ uint32_t ResultPair(const float (&sum)[kSums], int run, int half) {
  if constexpr (kActivate) {
    const int gate = 8 * run + 2 * half, up = gate + 4;
    return Pair(Silu(sum[gate]) * sum[up], Silu(sum[gate + 1]) * sum[up + 1]);
  } else {
    return Pair(sum[4 * run + 2 * half], sum[4 * run + 2 * half + 1]);
  }
}

template <typename Shape>
__device__ void StoreTile(const View& v, const Tile& tile,
                          const float (&sum)[Shape::kColumns / 2]) {
  constexpr int kRuns = Shape::kColumns / (Shape::kActivate ? 16 : 8);
  const unsigned lane = threadIdx.x % kWarp;
  const int column0 = Shape::kActivate ? tile.column / 2 : tile.column;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = static_cast<int>(threadIdx.x / kWarp * 16 + lane / 4) + 8 * half;
    __nv_bfloat16* out = v.out + static_cast<size_t>(tile.row + row) * v.product.out_width;
#pragma unroll
    for (int run = 0; run < kRuns; run += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = ResultPair<Shape::kActivate>(sum, run + i, half);
      TransposeInFour(lane, word);
      const int column = column0 + 8 * (run + static_cast<int>(lane % 4));
      if (row < tile.rows && column < v.product.out_width) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

template <typename Shape>
__device__ void Consume(const View& v, typename Shape::Ring& ring) {
  const int across = CeilDiv(v.product.n, Shape::kColumns);
  const int tiles = ring.first[v.groups.num] * across;
  Turn<Shape::kStages> turn;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile = FindTile<Shape::kRows, Shape::kColumns>(v.groups, ring.first, across, t);
    float sum[Shape::kColumns / 2];
    Multiply<Shape>(v.product.k, ring, turn, sum);
    StoreTile<Shape>(v, tile, sum);
  }
}

// ---- kernels
// ----------------------------------------------------------------------------------------

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    TensorMlpKernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                    View v) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is not launched
  auto& ring = Shared<typename Shape::Ring>();
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shape::kStages; ++s) {
      InitBarrier(&ring.full[s], 1);
      InitBarrier(&ring.empty[s], Shape::kWarpgroups * kWarpgroup / kWarp);
    }
    FenceAsyncProxy();
  }
  CountTiles<Shape::kRows>(v.groups, ring.first);
  if (threadIdx.x < Shape::kWarpgroups * kWarpgroup) {
    Consume<Shape>(v, ring);
  } else if (threadIdx.x % kWarp == 0) {
    Produce<Shape>(v, x, w, ring);
  }
#endif
}

// ---- launchers
// --------------------------------------------------------------------------------------

// One product: where its operands are, and where the result goes.
struct Operands {
  Product product;
  const void* x;
  const std::byte* w;
  void* out;
};

template <typename Shape>
absl::Status LaunchShaped(const GroupedMlpArgs& a, const DeviceTraits& traits, const Operands& o,
                          Stream stream) {
  const auto rows = static_cast<uint64_t>(a.num_rows), k = static_cast<uint64_t>(o.product.k);
  BALLAST_ASSIGN_OR_RETURN(const TensorMap x, MakeTensorMap({.at = o.x,
                                                             .columns = k,
                                                             .rows = rows,
                                                             .row_bytes = 2 * k,
                                                             .matrix_bytes = 2 * k * rows,
                                                             .box_rows = Shape::kBoxRows}));
  BALLAST_ASSIGN_OR_RETURN(const TensorMap w,
                           MakeTensorMap({.at = o.w,
                                          .columns = k,
                                          .rows = static_cast<uint64_t>(o.product.n),
                                          .depth = static_cast<uint64_t>(a.num_blocks),
                                          .row_bytes = 2 * k,
                                          .matrix_bytes = a.block_bytes,
                                          .box_rows = Shape::kColumns}));
  const View view = {{a.num_groups, a.group_begin, a.group_rows, a.block_of_group},
                     o.product,
                     static_cast<__nv_bfloat16*>(o.out)};
  const LaunchShape shape = {
      .blocks = ResidentBlocks(a, Shape::kRows, CeilDiv(o.product.n, Shape::kColumns),
                               traits.multiprocessors),
      .threads = Shape::kThreads,
      .shared_bytes =
          sizeof(typename Shape::Ring) + static_cast<size_t>(a.num_groups) * sizeof(int)};
  const cudaError_t error =
      cudaFuncSetAttribute(TensorMlpKernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shape.shared_bytes));
  if (error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat("grouped mlp: ", shape.shared_bytes,
                     " bytes of shared memory: ", cudaGetErrorString(error)));
  }
  return Launch(shape, stream, TensorMlpKernel<Shape>, x, w, view);
}

template <bool kActivate>
absl::Status LaunchProduct(const GroupedMlpArgs& a, const DeviceTraits& traits, const Operands& o,
                           Stream stream) {
  const bool wide = o.product.n >= kWideFrom, small = a.group_size == GroupSize::kSmall;
  const auto launch = wide ? (small ? LaunchShaped<TileShape<256, 1, kActivate>>
                                    : LaunchShaped<TileShape<256, 2, kActivate>>)
                           : (small ? LaunchShaped<TileShape<128, 1, kActivate>>
                                    : LaunchShaped<TileShape<128, 2, kActivate>>);
  return launch(a, traits, o, stream);
}

}  // namespace

absl::Status GroupedMlpTensor(const GroupedMlpArgs& a, const DeviceTraits& traits, Stream stream) {
  BALLAST_RETURN_IF_ERROR(
      LaunchProduct<true>(a, traits, {FirstProduct(a.shape), a.x, a.arena, a.activated}, stream));
  return LaunchProduct<false>(
      a, traits, {SecondProduct(a.shape), a.activated, a.arena + a.shape.down_offset(), a.y},
      stream);
}

}  // namespace ballast::cuda
