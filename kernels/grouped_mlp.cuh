// What the paths of the grouped MLP share: their view of the arguments, and how blocks find tiles.
#ifndef BALLAST_KERNELS_GROUPED_MLP_CUH_
#define BALLAST_KERNELS_GROUPED_MLP_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/device.cuh"
#include "kernels/grouped_mlp.h"

namespace ballast::cuda {

// One of the two products, out [rows, ...] = x [rows, k] W^T with W [n, k] of the group's block.
// The first one's epilogue makes n / 2 columns of n.
struct Product {
  int n, k, out_width;
};
inline Product FirstProduct(const ExpertShape& s) {
  return {2 * s.inter, s.hidden, s.inter};
}
inline Product SecondProduct(const ExpertShape& s) {
  return {s.hidden, s.inter, s.hidden};
}

// Blocks of a grid that stays: as many as run at a time, or fewer where there cannot be as many
// tiles.
inline unsigned ResidentBlocks(const ExpertGroups& g, int tile_rows, int tiles_across,
                               int resident) {
  const int64_t tiles =
      int64_t{CeilDiv(g.max_rows, tile_rows) + std::min(g.num_groups, g.max_rows)} * tiles_across;
  return static_cast<unsigned>(std::clamp<int64_t>(tiles, 1, resident));
}

struct DeviceTraits {
  int multiprocessors = 0, major = 0;
};
inline absl::StatusOr<DeviceTraits> TraitsOfDevice() {
  int device = 0;
  DeviceTraits traits;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&traits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&traits.major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) return traits;
  return absl::InternalError(absl::StrCat("no device: ", cudaGetErrorString(error)));
}

// bf16 on Hopper. REQUIRES CheckGroupedMlp
absl::Status GroupedMlpTensor(const GroupedMlpArgs& args, const DeviceTraits& traits,
                              Stream stream);

// first[g] becomes the number of tiles, of kRows rows, of the groups before g; first[num_groups] of
// all. All threads of the block call it.
template <int kRows>
__device__ void CountTiles(const ExpertGroups& groups, int* first) {
  const int num = groups.num_groups;
  // All loads at once: a warp that waits for memory once per 32 groups takes longer than a tile.
  for (int g = static_cast<int>(threadIdx.x); g < num; g += static_cast<int>(blockDim.x)) {
    first[g + 1] = CeilDiv(groups.rows[g], kRows);
  }
  if (threadIdx.x == 0) first[0] = 0;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int lane = static_cast<int>(threadIdx.x);
    int before = 0;
    for (int base = 0; base < num; base += static_cast<int>(kWarp)) {
      const int g = base + lane;
      int sum = g < num ? first[g + 1] : 0;
      for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
        const int other = __shfl_up_sync(kFullWarp, sum, static_cast<unsigned>(distance));
        if (lane >= distance) sum += other;
      }
      if (g < num) first[g + 1] = before + sum;
      before += __shfl_sync(kFullWarp, sum, kWarp - 1);
    }
  }
  __syncthreads();
}

struct Tile {
  int group;
  int row, rows;  // its first row among all, how many of the group's there are from there on
  int column;
};

// Tile t of the grid's first[num_groups] * across. The tiles of a group that use the same
// parameters come one after the other: blocks that run together read them once from memory.
template <int kRows, int kColumns>
__device__ Tile FindTile(const ExpertGroups& groups, const int* first, int across, int t) {
  int low = 0, high = groups.num_groups - 1;  // the group is one of these
  while (low < high) {
    const int middle = (low + high) / 2;
    if (first[middle + 1] * across > t) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int down = first[low + 1] - first[low];
  const int in_group = t - first[low] * across;
  const int row = in_group % down * kRows;
  return {low, groups.begin[low] + row, groups.rows[low] - row, in_group / down * kColumns};
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_GROUPED_MLP_CUH_
