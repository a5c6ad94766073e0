#include <algorithm>

#include "base/status.h"
#include "kernels/row_moves.cuh"
#include "kernels/row_moves.h"

namespace ballast::cuda {
namespace {

constexpr int kMostBlocks = 1056;  // 8 on each of 132 multiprocessors

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kRowThreads) GatherRowsKernel(GatherRowsArgs a) {
  for (int i = static_cast<int>(blockIdx.x); i < a.num_rows; i += static_cast<int>(gridDim.x)) {
    const int from = a.index[i];
    if (from < 0) continue;
    std::byte* const to = a.out + static_cast<size_t>(i) * a.row_bytes;
    CopyRow<false>(a.in + static_cast<size_t>(from) * a.row_bytes, &to, 1, a.row_bytes);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) CombineRowsKernel(CombineRowsArgs a) {
  Results& results = Shared<Results>();
  const int vectors = a.width / Vector<T>::kSize;
  for (int t = static_cast<int>(blockIdx.x); t < a.num_tokens; t += static_cast<int>(gridDim.x)) {
    __syncthreads();  // the results of the token before are read
    const int k = static_cast<int>(threadIdx.x);
    if (k < a.top_k) {
      const size_t copy = static_cast<size_t>(t) * a.top_k + k;
      results.weight[k] = a.weights[copy];
      results.row[k] = a.results + static_cast<size_t>(a.index[copy]) * a.width * sizeof(T);
    }
    __syncthreads();
    const size_t first = static_cast<size_t>(t) * a.width;
    AddResults<T>(results, a.top_k, vectors, a.base + first, a.out + first);
  }
}

LaunchShape ShapeFor(int32_t num_rows, size_t shared_bytes) {
  return {static_cast<unsigned>(std::min(num_rows, kMostBlocks)), kRowThreads, shared_bytes};
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status GatherRows(const GatherRowsArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckGatherRows(a));
  if (a.num_rows == 0) return absl::OkStatus();
  return Launch(ShapeFor(a.num_rows, 0), stream, GatherRowsKernel, a);
}

absl::Status CombineRows(const CombineRowsArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckCombineRows(a));
  if (a.num_tokens == 0) return absl::OkStatus();
  const LaunchShape shape = ShapeFor(a.num_tokens, sizeof(Results));
  if (a.type == DType::kF32) return Launch(shape, stream, CombineRowsKernel<float>, a);
  return Launch(shape, stream, CombineRowsKernel<__nv_bfloat16>, a);
}

}  // namespace ballast::cuda
