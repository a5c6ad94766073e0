// The grouped MLP for bf16 on Hopper's tensor cores.
//
// One warp copies tiles of x and of the parameters into a ring of stages; each warpgroup multiplies
// 64 rows of x by all columns of the tile. Blocks stay and walk over the tiles. silu(gate) * up is
// worked out from the registers in which the first product's sums are.
//
// Why these tiles (per multiprocessor and clock: 4096 flops of bf16, 128 bytes of shared memory,
// about 21 bytes of an H200's device memory, 24 to 30 of its L2):
// - 64 rows by 128 columns by 16 of k takes 64 clocks, reads 6 KiB of shared memory, 96 bytes per
//   clock, and uses 4 KiB of parameters, for which memory needs 195 clocks. So even a single row is
//   computed three times faster than its parameters come: few rows need no instruction of their
//   own, and with one instruction every row has the same bits everywhere.
// - Few rows per group: 64 by 128 by one warpgroup, 8 stages of 24 KiB, all of them under way,
// where
//   5 TB/s at 1 us need 36 KiB per multiprocessor. Of x come only as many atoms of 8 rows as the
//   group has. Narrow tiles, as there may be few: 9 groups by 4096 columns are 288 for 132
//   multiprocessors, three rounds; of 256 columns they would be two, each twice as long.
// - Many rows: 128 by 256 by two warpgroups, which share the parameters; 64 of k take 1024 clocks
//   and copy 48 KiB, 47 bytes per clock, from L2 but for the first time. That is more than L2 is
//   said to give, so it may well be the limit; copies that two multiprocessors share would halve
//   it.
// Registers: 128 sums per thread of at most 224 (288 threads); no warp has to give any away.
#include "kernels/grouped_mlp_tensor.cuh"

namespace ballast::cuda {
namespace {

// ---- device functions -------------------------------------------------------------------------

// The sums of one tile; the ring's stages go back as soon as nothing reads them.
template <typename Shape>
__device__ void Multiply(int k, typename Shape::Ring& ring, Turn<Shape::kStages>& turn,
                         float (&sum)[Shape::kParts][kPartSums]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const bool speaks = threadIdx.x % kWarp == 0;  // for its warp
  int previous = 0;
  for (int k0 = 0; k0 < k; k0 += Shape::kStepColumns) {
    typename Shape::Stage& stage = ring.stage[turn.stage];
    Wait(&ring.full[turn.stage], turn.parity);
    const uint64_t x = TileDescriptor(stage.x + warpgroup * kWarpgroupRows * kBoxBytes);
    FenceSums();
#pragma unroll
    for (int i = 0; i < kProductsPerStage; ++i) {
      const uint64_t along = static_cast<uint64_t>(i) * kDescriptorStep;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        const uint64_t w = TileDescriptor(stage.w + part * kPartColumns * kBoxBytes);
        MultiplyTiles(sum[part], x + along, w + along, k0 > 0 || i > 0);
      }
    }
    CommitProducts();
    if (k0 > 0) {
      WaitProducts<1>();  // those of the stage before
      if (speaks) Arrive(&ring.empty[previous]);
    }
    previous = turn.stage;
    turn.Next();
  }
#pragma unroll
  for (int part = 0; part < Shape::kParts; ++part) WaitSums(sum[part]);
  if (speaks) Arrive(&ring.empty[previous]);
}

// ---- kernels ----------------------------------------------------------------------------------

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    TensorMlpKernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                    TensorView v) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is not launched
  typename Shape::Ring& ring = BeginRing<Shape>(v);
  if (threadIdx.x < Shape::kWarpgroups * kWarpgroup) {
    Consume<Shape>(v, ring, [&](const Tile&, auto& turn, auto& sum) {
      Multiply<Shape>(v.product.k, ring, turn, sum);
    });
  } else if (threadIdx.x % kWarp == 0) {
    Produce<Shape>(v, x, w, ring);
  }
#endif
}

// ---- launchers --------------------------------------------------------------------------------

template <bool kActivate>
absl::Status LaunchProduct(const DeviceTraits& traits, const Operands& o, const TensorView& view,
                           Stream stream) {
  using Small = TileShape<2, 128, 1, kActivate>;
  using Large = TileShape<2, 256, 2, kActivate>;
  if (view.groups.size == GroupSize::kSmall) {
    return LaunchTensor<Small>(traits, o, view, TensorMlpKernel<Small>, stream);
  }
  return LaunchTensor<Large>(traits, o, view, TensorMlpKernel<Large>, stream);
}

}  // namespace

absl::Status GroupedMlpTensor(const GroupedMlpArgs& a, const DeviceTraits& traits, Stream stream) {
  const std::byte* arena = a.groups.arena;
  auto* activated = static_cast<__nv_bfloat16*>(a.activated);
  BALLAST_RETURN_IF_ERROR(LaunchProduct<true>(
      traits, {a.x, arena}, {a.groups, FirstProduct(a.shape), activated}, stream));
  return LaunchProduct<false>(traits, {activated, arena + a.shape.down_offset()},
                              {a.groups, SecondProduct(a.shape), static_cast<__nv_bfloat16*>(a.y)},
                              stream);
}

}  // namespace ballast::cuda
