// The emulator's version of kernels/hopper.cuh.
#ifndef BALLAST_KERNELS_HOPPER_CUH_
#define BALLAST_KERNELS_HOPPER_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/tensor_tiles.cuh"
#include "tests/support/cuda_shim/hopper.h"

namespace ballast::cuda {

using TensorMap = cuda_shim::BoxMap;

inline absl::StatusOr<TensorMap> MakeTensorMap(const Matrices& m) {
  const TensorMap map = {static_cast<const std::byte*>(m.at),
                         m.columns,
                         m.rows,
                         m.depth,
                         m.row_bytes,
                         m.matrix_bytes,
                         m.element_bytes,
                         m.box_rows};
  if (const char* fault = cuda_shim::FaultOf(map); fault != nullptr) {
    return absl::InternalError(absl::StrCat("a tensor map with ", fault));
  }
  return map;
}

using Barrier = uint64_t;

inline void InitBarrier(Barrier* barrier, uint32_t count) {
  cuda_shim::BarrierInit(barrier, count);
}
inline void FenceAsyncProxy() {
  cuda_shim::AsyncProxyFence();
}
inline void Arrive(Barrier* barrier) {
  cuda_shim::BarrierArrive(barrier, 0);
}
inline void ArriveExpecting(Barrier* barrier, uint32_t bytes) {
  cuda_shim::BarrierArrive(barrier, bytes);
}
inline void Wait(Barrier* barrier, uint32_t parity) {
  cuda_shim::BarrierWait(barrier, parity);
}

inline void CopyBox(void* to, const TensorMap& map, Barrier* barrier, int column, int row,
                    int matrix) {
  cuda_shim::CopyBox(to, map, barrier, column, row, matrix);
}
inline void PrefetchMap(const TensorMap&) {}

inline uint64_t TileDescriptor(const void* tile) {
  return DescriptorAt(cuda_shim::SharedOffset(tile));
}
inline void FenceSums() {
  cuda_shim::SumsFence();
}
inline void CommitProducts() {
  cuda_shim::CommitProducts();
}
template <int kLeft>
void WaitProducts() {
  cuda_shim::WaitProducts(kLeft);
}
template <int kSums>
void WaitSums(float (&)[kSums]) {
  cuda_shim::WaitProducts(0);
}
inline void MultiplyTiles(float (&d)[64], uint64_t x, uint64_t w, bool add) {
  cuda_shim::BeginProduct(cuda_shim::Element::kBf16, d, 64, x, w, add);
}
inline void MultiplyTilesE4M3(float (&d)[64], uint64_t x, uint64_t w, bool add) {
  cuda_shim::BeginProduct(cuda_shim::Element::kE4m3, d, 64, x, w, add);
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_HOPPER_CUH_
