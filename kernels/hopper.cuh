// The instructions of Hopper (sm_90a) that the tensor paths use: copies of boxes by the copy
// engine, barriers that count bytes, products of a warpgroup. The emulator of the tests has its own
// version of this header (tests/support/cuda_shim/kernels/hopper.cuh) with the same declarations.
#ifndef BALLAST_KERNELS_HOPPER_CUH_
#define BALLAST_KERNELS_HOPPER_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/tensor_tiles.cuh"

namespace ballast::cuda {

// ---- host -------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// ERRORS kInternal: the driver has no such function, or refuses
inline absl::StatusOr<TensorMap> MakeTensorMap(const Matrices& m) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Asked of the runtime, so that a program that never comes here runs without a driver.
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool has = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return has ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return absl::InternalError("the driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {m.columns, m.rows, m.depth};
  const cuuint64_t strides[] = {m.row_bytes, m.matrix_bytes};
  const cuuint32_t box[] = {kBoxBytes / m.element_bytes, m.box_rows, 1};
  const cuuint32_t steps[] = {1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map, m.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8,
      3, const_cast<void*>(m.at), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return map;
  return absl::InternalError(absl::StrCat("cuTensorMapEncodeTiled of [", m.depth, ", ", m.rows,
                                          ", ", m.columns, "] failed: ", result));
}

// ---- barriers in shared memory ----------------------------------------------------------------

// A barrier's phase ends when `count` have arrived and all bytes that were announced are there.
// Waiting for parity p returns once the newest phase that ended has parity p; the phases have 0, 1,
// 0, ..., and the one "before the first" counts as ended.
using Barrier = uint64_t;

__device__ inline uint32_t SharedAddress(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
__device__ inline void InitBarrier(Barrier* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count)
               : "memory");
}
// What this thread has stored in shared memory, also barriers, the copy engine and the tensor cores
// see.
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void Arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ inline void ArriveExpecting(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void Wait(Barrier* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;}\n"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
}

// ---- copies -----------------------------------------------------------------------------------

// Copies the box at (matrix, row, column) to `to`, an atom or more, and tells the barrier. The
// bytes told are those of the whole box, whatever of it lies outside of the matrix.
__device__ inline void CopyBox(void* to, const TensorMap& map, Barrier* barrier, int column,
                               int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(SharedAddress(barrier)), "r"(column), "r"(row), "r"(matrix)
      : "memory");
}
__device__ inline void PrefetchMap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- products of a warpgroup: all of its 128 threads call these together ----------------------

// How a product finds a tile.
__device__ inline uint64_t TileDescriptor(const void* tile) {
  return DescriptorAt(SharedAddress(tile));
}

// Before the first product, and whenever the sums were touched since the last one.
__device__ inline void FenceSums() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the newest kLeft committed groups are done.
template <int kLeft>
__device__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Until all are done; the sums may then be read.
template <int kSums>
__device__ void WaitSums(float (&d)[kSums]) {
  WaitProducts<0>();
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = x w^T, or d += with `add`, of 64 rows of x, 128 rows of w and 16 columns of bf16. Begins it.
// Thread t has of d, for every run b of 8 rows of w, in [4 b] and [4 b + 1] row t / 32 * 16 + t %
// 32 / 4 of x by 8 b + t % 4 * 2 and the next; in [4 b + 2] and [4 b + 3] the row 8 further on.
#define BALLAST_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BALLAST_SUMS_8(i) BALLAST_SUMS_4(i), BALLAST_SUMS_4(i + 4)
__device__ inline void MultiplyTiles(float (&d)[64], uint64_t x, uint64_t w, bool add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;}\n"
      : BALLAST_SUMS_8(0), BALLAST_SUMS_8(8), BALLAST_SUMS_8(16), BALLAST_SUMS_8(24),
        BALLAST_SUMS_8(32), BALLAST_SUMS_8(40), BALLAST_SUMS_8(48), BALLAST_SUMS_8(56)
      : "l"(x), "l"(w), "r"(static_cast<int>(add)));
}
// The same of 32 columns of e4m3.
__device__ inline void MultiplyTilesE4M3(float (&d)[64], uint64_t x, uint64_t w, bool add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;}\n"
      : BALLAST_SUMS_8(0), BALLAST_SUMS_8(8), BALLAST_SUMS_8(16), BALLAST_SUMS_8(24),
        BALLAST_SUMS_8(32), BALLAST_SUMS_8(40), BALLAST_SUMS_8(48), BALLAST_SUMS_8(56)
      : "l"(x), "l"(w), "r"(static_cast<int>(add)));
}
#undef BALLAST_SUMS_8
#undef BALLAST_SUMS_4

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_HOPPER_CUH_
