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
#include "kernels/grouped_mlp_tensor.cuh"

namespace ballast::cuda {
namespace {

constexpr int kWideFrom = 4096;  // columns, from which on tiles are 256 wide

// ---- device functions
// -------------------------------------------------------------------------------

// The sums of one tile; the ring's stages go back as soon as nothing reads them.
template <typename Shape>
__device__ void Multiply(int k, typename Shape::Ring& ring, Turn<Shape::kStages>& turn,
                         float (&sum)[Shape::kColumns / 2]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const bool speaks = threadIdx.x % kWarp == 0;  // for its warp
  int previous = 0;
  for (int k0 = 0; k0 < k; k0 += Shape::kStepColumns) {
    typename Shape::Stage& stage = ring.stage[turn.stage];
    Wait(&ring.full[turn.stage], turn.parity);
    const uint64_t x = TileDescriptor(stage.x + warpgroup * kWarpgroupRows * kBoxBytes);
    const uint64_t w = TileDescriptor(stage.w);
    FenceSums();
#pragma unroll
    for (int i = 0; i < kBoxBytes / kProductBytes; ++i) {
      const uint64_t along = static_cast<uint64_t>(i * kProductBytes / 16);
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

// ---- kernels
// ----------------------------------------------------------------------------------------

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

// ---- launchers
// --------------------------------------------------------------------------------------

template <typename Shape>
absl::Status LaunchShaped(const DeviceTraits& traits, const Operands& o, const TensorView& view,
                          Stream stream) {
  return LaunchTensor<Shape>(traits, o, view, TensorMlpKernel<Shape>, stream);
}

template <bool kActivate>
absl::Status LaunchProduct(const DeviceTraits& traits, const Operands& o, const TensorView& view,
                           Stream stream) {
  const bool wide = view.product.n >= kWideFrom, small = view.groups.size == GroupSize::kSmall;
  const auto launch = wide ? (small ? LaunchShaped<TileShape<2, 256, 1, kActivate>>
                                    : LaunchShaped<TileShape<2, 256, 2, kActivate>>)
                           : (small ? LaunchShaped<TileShape<2, 128, 1, kActivate>>
                                    : LaunchShaped<TileShape<2, 128, 2, kActivate>>);
  return launch(traits, o, view, stream);
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
