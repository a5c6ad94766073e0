#include "base/status.h"
#include "kernels/device.cuh"
#include "kernels/hopper.cuh"
#include "tests/gpu/hopper_probe.h"

namespace ballast::testing {
namespace {

using namespace cuda;

constexpr int kXRows = 64, kWRows = 128;

struct Staged {
  alignas(kAtomBytes) unsigned char x[kXRows * kBoxBytes];
  alignas(kAtomBytes) unsigned char w[kWRows * kBoxBytes];
  Barrier barrier;
};

// ---- kernels ----------------------------------------------------------------------------------

__global__ void CopyKernel(const __grid_constant__ TensorMap map, int column, int row, int matrix,
                           int bytes, std::byte* dump) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& staged = Shared<Staged>();
  if (threadIdx.x == 0) {
    InitBarrier(&staged.barrier, 1);
    FenceAsyncProxy();
    ArriveExpecting(&staged.barrier, static_cast<uint32_t>(bytes));
    CopyBox(staged.w, map, &staged.barrier, column, row, matrix);
  }
  __syncthreads();
  Wait(&staged.barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) {
    dump[i] = static_cast<std::byte>(staged.w[i]);
  }
#endif
}

template <bool kIsE4M3>
__global__ void __launch_bounds__(128, 1)
    ProductKernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                  float* d) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto& staged = Shared<Staged>();
  if (threadIdx.x == 0) {
    InitBarrier(&staged.barrier, 1);
    FenceAsyncProxy();
    ArriveExpecting(&staged.barrier, (kXRows + kWRows) * kBoxBytes);
    CopyBox(staged.x, x, &staged.barrier, 0, 0, 0);
    CopyBox(staged.w, w, &staged.barrier, 0, 0, 0);
  }
  __syncthreads();
  Wait(&staged.barrier, 0);
  float sum[64];
  FenceSums();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t along = static_cast<uint64_t>(i) * kDescriptorStep;
    const uint64_t from = TileDescriptor(staged.x) + along, by = TileDescriptor(staged.w) + along;
    if constexpr (kIsE4M3) {
      MultiplyTilesE4M3(sum, from, by, i > 0);
    } else {
      MultiplyTiles(sum, from, by, i > 0);
    }
  }
  CommitProducts();
  WaitSums(sum);
  const unsigned row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const unsigned column = static_cast<unsigned>(i / 4 * 8 + i % 2) + threadIdx.x % 4 * 2;
    d[(row + static_cast<unsigned>(i % 4 / 2 * 8)) * kWRows + column] = sum[i];
  }
#endif
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status ProbeCopy(const Matrices& from, int column, int row, int matrix, std::byte* dump) {
  BALLAST_ASSIGN_OR_RETURN(const TensorMap map, MakeTensorMap(from));
  const int bytes = static_cast<int>(from.box_rows) * kBoxBytes;
  return Launch({.threads = 64, .shared_bytes = sizeof(Staged)}, nullptr, CopyKernel, map, column,
                row, matrix, bytes, dump);
}

absl::Status ProbeProduct(uint32_t element_bytes, const void* x, const void* w, float* d) {
  Matrices from = {.at = x,
                   .columns = kBoxBytes / element_bytes,
                   .rows = kXRows,
                   .row_bytes = kBoxBytes,
                   .matrix_bytes = kXRows * kBoxBytes,
                   .element_bytes = element_bytes,
                   .box_rows = kXRows};
  BALLAST_ASSIGN_OR_RETURN(const TensorMap x_map, MakeTensorMap(from));
  from.at = w;
  from.rows = from.box_rows = kWRows;
  from.matrix_bytes = kWRows * kBoxBytes;
  BALLAST_ASSIGN_OR_RETURN(const TensorMap w_map, MakeTensorMap(from));
  const LaunchShape shape = {.threads = 128, .shared_bytes = sizeof(Staged)};
  if (element_bytes == 1) return Launch(shape, nullptr, ProductKernel<true>, x_map, w_map, d);
  return Launch(shape, nullptr, ProductKernel<false>, x_map, w_map, d);
}

}  // namespace ballast::testing
