// The grouped MLP for e4m3 on Hopper's tensor cores, with scales for 128 of k at a time.
//
// As grouped_mlp_tensor.cu, which says why tiles are as they are. A stage is 128 bytes of each row,
// here 128 of k, so all of a stage's products have one scale per row and one per 128 columns (of
// the first product one for gate's and one for up's): they are added up in registers of their own
// and then, scaled, to the tile's sums. 64 and 64 sums per thread leave no room for wider tiles. A
// warpgroup waits for its products before it scales; where groups are large the other one
// multiplies meanwhile, where they are small the time is that of reading the parameters.
#include <cuda_fp8.h>

#include "kernels/grouped_mlp_fp8.h"
#include "kernels/grouped_mlp_tensor.cuh"

namespace ballast::cuda {
namespace {

constexpr unsigned kQuantiseRows = 8;  // warps of a block, a row each
constexpr int kPerLane = kScaleBlock / static_cast<int>(kWarp);
constexpr int kQuantiseBlocks = 8;  // per multiprocessor: all its threads
constexpr float kLargest = 448.0f;

struct Fp8View : TensorView {
  const float* x_scales;      // [k blocks, num_rows]
  const std::byte* w_scales;  // [n blocks, k blocks] of block 0: gate's or down's
  int up;                     // floats from gate's scales to up's; 0: the columns have one scale
};

// ---- device functions -------------------------------------------------------------------------

// The scales that one thread needs for one stage: of its two rows, and of even and odd runs of 8
// columns.
struct StageScales {
  float row[2], run[2];
};

template <typename Shape>
__device__ StageScales LoadScales(const Fp8View& v, const Tile& tile, int block_of_k) {
  const int column = Shape::kActivate ? tile.column / 2 : tile.column;
  const auto* w = reinterpret_cast<const float*>(
      v.w_scales + static_cast<size_t>(v.groups.block[tile.group]) * v.groups.block_bytes);
  const int at = column / kScaleBlock * CeilDiv(v.product.k, kScaleBlock) + block_of_k;
  StageScales scales;
  scales.run[0] = w[at];
  scales.run[1] = w[at + v.up];
  const float* x = v.x_scales + static_cast<size_t>(block_of_k) * v.groups.num_rows + tile.row;
  const int row = static_cast<int>(threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    scales.row[half] = row + 8 * half < tile.rows ? x[row + 8 * half] : 0.0f;
  }
  return scales;
}

// The sums of one tile; the ring's stages go back as soon as nothing reads them.
template <typename Shape>
__device__ void Multiply(const Fp8View& v, const Tile& tile, typename Shape::Ring& ring,
                         Turn<Shape::kStages>& turn, float (&sum)[1][kPartSums]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
#pragma unroll
  for (int i = 0; i < kPartSums; ++i) sum[0][i] = 0.0f;
  for (int block = 0; block * kScaleBlock < v.product.k; ++block) {
    typename Shape::Stage& stage = ring.stage[turn.stage];
    const StageScales scales = LoadScales<Shape>(v, tile, block);
    const uint64_t x = TileDescriptor(stage.x + warpgroup * kWarpgroupRows * kBoxBytes);
    const uint64_t w = TileDescriptor(stage.w);
    float part[kPartSums];
    Wait(&ring.full[turn.stage], turn.parity);
    FenceSums();
#pragma unroll
    for (int i = 0; i < kProductsPerStage; ++i) {
      const uint64_t along = static_cast<uint64_t>(i) * kDescriptorStep;
      MultiplyTilesE4M3(part, x + along, w + along, i > 0);
    }
    CommitProducts();
    WaitSums(part);
    if (threadIdx.x % kWarp == 0) Arrive(&ring.empty[turn.stage]);
    turn.Next();
#pragma unroll
    for (int i = 0; i < kPartSums; ++i) {
      const float scale = scales.row[i % 4 / 2] * scales.run[i / 4 % 2];
      sum[0][i] = fmaf(part[i], scale, sum[0][i]);
    }
  }
}

// One run of 128 columns of one row, four per lane.
__device__ void QuantiseRun(const QuantiseRowsArgs& a, int row, int column, unsigned lane) {
  const int own = column + static_cast<int>(lane) * kPerLane;
  const size_t at = static_cast<size_t>(row) * a.width + own;
  __nv_bfloat16 x[kPerLane];
  uint2 words = {0, 0};
  if (own < a.width) {
    words = *reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(a.x) + at);
  }
  memcpy(x, &words, sizeof x);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    largest = max(largest, __float_as_uint(ToFloat(x[i])) & 0x7fffffffu);
  }
  largest = __reduce_max_sync(kFullWarp, largest);
  const float scale = largest == 0 ? 1.0f : __uint_as_float(largest) / kLargest;
  uint32_t values = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t value = __nv_cvt_float_to_fp8(ToFloat(x[i]) / scale, __NV_SATFINITE, __NV_E4M3);
    values |= value << 8 * i;
  }
  if (own < a.width) *reinterpret_cast<uint32_t*>(a.values + at) = values;
  if (lane == 0) {
    a.scales[static_cast<size_t>(column / kScaleBlock) * a.groups.num_rows + row] = scale;
  }
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kQuantiseRows* kWarp) QuantiseRowsKernel(QuantiseRowsArgs a) {
  int* first = &Shared<int>();  // [groups + 1]
  CountTiles<static_cast<int>(kQuantiseRows)>(a.groups, first);
  const int across = CeilDiv(a.width, kScaleBlock);
  const int tiles = first[a.groups.num_groups] * across;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile =
        FindTile<static_cast<int>(kQuantiseRows), kScaleBlock>(a.groups, first, across, t);
    if (warp < tile.rows) QuantiseRun(a, tile.row + warp, tile.column, threadIdx.x % kWarp);
  }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    Fp8MlpKernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                 Fp8View v) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is not launched
  typename Shape::Ring& ring = BeginRing<Shape>(v);
  if (threadIdx.x < Shape::kWarpgroups * kWarpgroup) {
    Consume<Shape>(v, ring, [&](const Tile& tile, auto& turn, auto& sum) {
      Multiply<Shape>(v, tile, ring, turn, sum);
    });
  } else if (threadIdx.x % kWarp == 0) {
    Produce<Shape>(v, x, w, ring);
  }
#endif
}

// ---- launchers --------------------------------------------------------------------------------

template <bool kActivate>
absl::Status LaunchProduct(const DeviceTraits& traits, const Operands& o, const Fp8View& view,
                           Stream stream) {
  using Small = TileShape<1, kPartColumns, 1, kActivate>;
  using Large = TileShape<1, kPartColumns, 2, kActivate>;
  if (view.groups.size == GroupSize::kSmall) {
    return LaunchTensor<Small>(traits, o, view, Fp8MlpKernel<Small>, stream);
  }
  return LaunchTensor<Large>(traits, o, view, Fp8MlpKernel<Large>, stream);
}

absl::Status LaunchQuantise(const DeviceTraits& traits, const QuantiseRowsArgs& a, Stream stream) {
  const LaunchShape shape = {
      .blocks = ResidentBlocks(a.groups, kQuantiseRows, CeilDiv(a.width, kScaleBlock),
                               kQuantiseBlocks * traits.multiprocessors),
      .threads = kQuantiseRows * kWarp,
      .shared_bytes = (static_cast<size_t>(a.groups.num_groups) + 1) * sizeof(int)};
  return Launch(shape, stream, QuantiseRowsKernel, a);
}

bool HasNothing(const ExpertGroups& groups) {
  return groups.num_groups == 0 || groups.num_rows == 0;
}

}  // namespace

absl::Status QuantiseRows(const QuantiseRowsArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckQuantiseRows(a));
  if (HasNothing(a.groups)) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const DeviceTraits traits, TraitsOfDevice());
  return LaunchQuantise(traits, a, stream);
}

absl::Status GroupedMlpFp8(const Fp8MlpArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckFp8Mlp(a));
  if (HasNothing(a.groups)) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const DeviceTraits traits, TraitsOfDevice());
  if (traits.major != 9) {
    return absl::UnimplementedError(
        absl::StrCat("grouped mlp fp8: not on compute capability ", traits.major));
  }
  const std::byte* arena = a.groups.arena;
  const ExpertShape sizes = {.hidden = a.shape.hidden, .inter = a.shape.inter};
  auto* activated = static_cast<__nv_bfloat16*>(a.activated);
  const auto up = static_cast<int>((a.shape.down_scales_offset() - a.shape.scales_offset()) /
                                   (2 * sizeof(float)));
  BALLAST_RETURN_IF_ERROR(
      LaunchQuantise(traits, {a.groups, a.shape.hidden, a.x, a.values, a.scales}, stream));
  BALLAST_RETURN_IF_ERROR(LaunchProduct<true>(
      traits, {a.values, arena},
      {{a.groups, FirstProduct(sizes), activated}, a.scales, arena + a.shape.scales_offset(), up},
      stream));
  BALLAST_RETURN_IF_ERROR(
      LaunchQuantise(traits, {a.groups, a.shape.inter, activated, a.values, a.scales}, stream));
  return LaunchProduct<false>(traits, {a.values, arena + a.shape.down_offset()},
                              {{a.groups, SecondProduct(sizes), static_cast<__nv_bfloat16*>(a.y)},
                               a.scales,
                               arena + a.shape.down_scales_offset(),
                               0},
                              stream);
}

}  // namespace ballast::cuda
