// A half warp computes kSide x kSide products, thread i lane i of each: a tile of x and one of w
// pass through shared memory, and of each of them a thread needs kSide numbers for kSide * kSide
// steps. The lanes are added at the end.
#include "kernels/device.cuh"
#include "kernels/device_matmul.h"
#include "kernels/matmul_row_major.h"

namespace ballast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kHalfWarps = kThreads / kLanes;
constexpr int kSide = 8;
constexpr int kUnitsAcross = 8;  // half warps beside each other
constexpr int kRows = kHalfWarps / kUnitsAcross * kSide;
constexpr int kColumns = kUnitsAcross * kSide;
constexpr int kDepth = 64;  // of k, at a time
// Padded so that the two half warps of a warp, kSide rows apart, read from different banks.
constexpr int kStride = kDepth + 2;
static_assert(kSide * kStride % 32 == kLanes && kThreads % kDepth == 0);

// ---- device functions -------------------------------------------------------------------------

// What a block of threads shares.
struct Tiles {
  float x[kRows][kStride];
  float w[kColumns][kStride];
};

// Fills a tile with the rows from `first` and the columns from `begin` of a matrix [rows, k]; zeros
// outside of it.
template <typename T, int kTileRows>
__device__ void LoadTile(const T* matrix, int rows, int k, int first, int begin,
                         float (&tile)[kTileRows][kStride]) {
  const int column = threadIdx.x % kDepth;
#pragma unroll
  for (int r = threadIdx.x / kDepth; r < kTileRows; r += kThreads / kDepth) {
    const bool inside = first + r < rows && begin + column < k;
    tile[r][column] =
        inside ? ToFloat(matrix[static_cast<size_t>(first + r) * k + begin + column]) : 0.0f;
  }
}

// One step of k for all products of the thread; product (r, c) is sum[r / 2][r % 2 * kSide + c].
__device__ void MultiplyLane(const float (*x)[kStride], const float (*w)[kStride], int at,
                             float (&sum)[kSide / 2][kLanes]) {
  float column[kSide];
#pragma unroll
  for (int c = 0; c < kSide; ++c) column[c] = w[c][at];
#pragma unroll
  for (int r = 0; r < kSide; ++r) {
    const float row = x[r][at];
#pragma unroll
    for (int c = 0; c < kSide; ++c) {
      float& own = sum[r / 2][r % 2 * kSide + c];
      own = fmaf(row, column[c], own);
    }
  }
}

// ---- kernels ----------------------------------------------------------------------------------

// One block per kRows x kColumns of y. Blocks that share rows of w follow each other.
template <typename T>
__global__ void __launch_bounds__(kThreads) PlainMatmulKernel(PlainMatmulArgs a, int row_blocks) {
  Tiles& tiles = Shared<Tiles>();
  const T* x = static_cast<const T*>(a.x);
  const T* w = static_cast<const T*>(a.w);
  const int first_row = blockIdx.x % row_blocks * kRows;
  const int first_column = blockIdx.x / row_blocks * kColumns;
  const int unit = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int unit_row = unit / kUnitsAcross * kSide, unit_column = unit % kUnitsAcross * kSide;
  float sum[kSide / 2][kLanes] = {};
  for (int begin = 0; begin < a.k; begin += kDepth) {
    LoadTile(x, a.m, a.k, first_row, begin, tiles.x);
    LoadTile(w, a.n, a.k, first_column, begin, tiles.w);
    __syncthreads();
    // A step behind the end would be one of zeros, which turns -0 into 0.
    const int end = min(kDepth, a.k - begin);
#pragma unroll 1
    for (int at = lane; at < end; at += kLanes) {
      MultiplyLane(&tiles.x[unit_row], &tiles.w[unit_column], at, sum);
    }
    __syncthreads();
  }
#pragma unroll
  for (int pair = 0; pair < kSide / 2; ++pair) {
    const float y = SumLanesOfEach(sum[pair]);
    const int row = first_row + unit_row + 2 * pair + lane / kSide;
    const int column = first_column + unit_column + lane % kSide;
    if (row < a.m && column < a.n) a.y[static_cast<size_t>(row) * a.n + column] = y;
  }
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status PlainMatmul(const PlainMatmulArgs& a, Stream stream) {
  if (a.m == 0 || a.n == 0) return absl::OkStatus();
  const int row_blocks = CeilDiv(a.m, kRows), column_blocks = CeilDiv(a.n, kColumns);
  const LaunchShape shape = {
      .blocks = static_cast<unsigned>(row_blocks) * static_cast<unsigned>(column_blocks),
      .threads = kThreads,
      .shared_bytes = sizeof(Tiles)};
  return a.dtype == DType::kF32
             ? Launch(shape, stream, PlainMatmulKernel<float>, a, row_blocks)
             : Launch(shape, stream, PlainMatmulKernel<__nv_bfloat16>, a, row_blocks);
}

namespace {

class PlainDeviceMatmul : public RowMajorMatmul {
 public:
  PlainDeviceMatmul(int n, int k, DType dtype) : RowMajorMatmul(n, k, dtype) {}

  absl::Status Run(const void* x, int m, const std::byte* packed, float* y,
                   Stream stream) override {
    return PlainMatmul({.m = m, .n = n(), .k = k(), .dtype = dtype(), .x = x, .w = packed, .y = y},
                       stream);
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Matmul>> MakePlainDeviceMatmul(int n, int k, DType dtype) {
  return std::make_unique<PlainDeviceMatmul>(n, k, dtype);
}

}  // namespace ballast::cuda
