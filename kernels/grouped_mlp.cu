// CUDA twin of grouped_mlp.cc on the ordinary arithmetic units, with the bits of the CPU.
//
// Half a warp computes 8 rows by 8 columns: lane j adds every sixteenth product, beginning with the
// j-th, as Dot's lane j does. 16 numbers from shared memory make 64 multiply-adds, which is what
// keeps both units busy; 64 sums per thread are what registers hold.
#include "base/status.h"
#include "kernels/grouped_mlp.cuh"

namespace ballast::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kLanes = 16;
constexpr int kRows = 32, kColumns = 32;     // of a tile: 4 by 4 half warps
constexpr int kStep = 64;                    // of k in shared memory at a time
constexpr int kBlocksPerMultiprocessor = 2;  // what their registers leave room for

// Rows that two half warps of a warp read are 4 apart: 4 * 68 floats are half of the banks.
struct Staged {
  alignas(16) float x[kRows][kStep + 4];
  alignas(16) float w[kColumns][kStep + 4];
};

template <typename T>
struct View {
  ExpertGroups groups;
  Product product;
  const T* x;
  const std::byte* parameters;  // of the product, in block 0
  T* out;
};

// ---- device functions -------------------------------------------------------------------------

// Adds v[o] over the lanes as SumLanes does; lane j gets the sum of v[j].
__device__ float SumOverLanes(float (&v)[kLanes], unsigned lane) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int half = kLanes / 2 >> step;
    const bool upper = (lane & static_cast<unsigned>(half)) != 0;
#pragma unroll
    for (int i = 0; i < kLanes / 2; ++i) {
      if (i >= half) continue;
      const float sent = upper ? v[i] : v[i + half];
      const float kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(kFullWarp, sent, half);
    }
  }
  return v[0];
}

// Columns k0 ... k0 + kStep - 1 of rows 0 ... 31 of a matrix [rows, k]; zeros beyond.
template <typename T>
__device__ void Stage(const T* from, int rows, int k, int k0, float (&to)[kRows][kStep + 4]) {
  constexpr int kVector = Vector<T>::kSize;
  constexpr int kPerRow = kStep / kVector;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, at = i % kPerRow * kVector;
    Vector<T> v;
    if (row < rows && k0 + at < k) {
      v.bits = *reinterpret_cast<const uint4*>(from + static_cast<size_t>(row) * k + k0 + at);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[row][at + j] = ToFloat(v.at[j]);
  }
}

// Which of a tile's columns are a half warp's: four of a run of 8, and those of the run behind it.
__device__ int ColumnOf(int across, int c) {
  return across / 2 * 16 + across % 2 * 4 + c / 4 * 8 + c % 4;
}

template <typename T, bool kActivate>
__device__ void StoreTile(const View<T>& v, const Tile& tile, int down, int across, unsigned lane,
                          float (&sum)[8][8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float first[kLanes], second[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      first[i] = sum[4 * h + i / 4][i % 4];
      second[i] = sum[4 * h + i / 4][4 + i % 4];
    }
    const float a = SumOverLanes(first, lane), b = SumOverLanes(second, lane);
    const int row = 8 * down + 4 * h + static_cast<int>(lane) / 4;
    const int column = tile.column + ColumnOf(across, static_cast<int>(lane) % 4);
    if (row >= tile.rows || column >= v.product.n) continue;
    T* out = v.out + static_cast<size_t>(tile.row + row) * v.product.out_width;
    if constexpr (kActivate) {
      out[column / 16 * 8 + column % 8] = RoundTo<T>(Silu(a) * b);
    } else {
      out[column] = RoundTo<T>(a);
      if (column + 8 < v.product.n) out[column + 8] = RoundTo<T>(b);
    }
  }
}

template <typename T, bool kActivate>
__device__ void ComputeTile(const View<T>& v, const Tile& tile, Staged* staged) {
  const unsigned lane = threadIdx.x % kLanes;
  const int half_warp = static_cast<int>(threadIdx.x) / kLanes;
  const int down = half_warp / 4, across = half_warp % 4;
  const int k = v.product.k;
  const T* x = v.x + static_cast<size_t>(tile.row) * k;
  const T* w =
      reinterpret_cast<const T*>(v.parameters + static_cast<size_t>(v.groups.block[tile.group]) *
                                                    v.groups.block_bytes) +
      static_cast<size_t>(tile.column) * k;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < k; k0 += kStep) {
    Stage(x, tile.rows, k, k0, staged->x);
    Stage(w, v.product.n - tile.column, k, k0, staged->w);
    __syncthreads();
    const int end = min(kStep, k - k0);
    for (int i = static_cast<int>(lane); i < end; i += kLanes) {
      float parameter[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) parameter[c] = staged->w[ColumnOf(across, c)][i];
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const float number = staged->x[8 * down + r][i];
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[r][c] = fmaf(number, parameter[c], sum[r][c]);
      }
    }
    __syncthreads();
  }
  StoreTile<T, kActivate>(v, tile, down, across, lane, sum);
}

// ---- kernels ----------------------------------------------------------------------------------

template <typename T, bool kActivate>
__global__ void __launch_bounds__(kThreads) PlainMlpKernel(View<T> v) {
  Staged* staged = &Shared<Staged>();
  int* first = reinterpret_cast<int*>(staged + 1);  // [groups + 1]
  CountTiles<kRows>(v.groups, first);
  const int across = CeilDiv(v.product.n, kColumns);
  const int tiles = first[v.groups.num_groups] * across;
  for (int t = static_cast<int>(blockIdx.x); t < tiles; t += static_cast<int>(gridDim.x)) {
    const Tile tile = FindTile<kRows, kColumns>(v.groups, first, across, t);
    ComputeTile<T, kActivate>(v, tile, staged);
  }
}

// ---- launchers --------------------------------------------------------------------------------

template <typename T, bool kActivate>
absl::Status LaunchProduct(const GroupedMlpArgs& a, const DeviceTraits& traits, View<T> view,
                           Stream stream) {
  const LaunchShape shape = {
      .blocks = ResidentBlocks(a.groups, kRows, CeilDiv(view.product.n, kColumns),
                               kBlocksPerMultiprocessor * traits.multiprocessors),
      .threads = kThreads,
      .shared_bytes =
          sizeof(Staged) + (static_cast<size_t>(a.groups.num_groups) + 1) * sizeof(int)};
  return Launch(shape, stream, PlainMlpKernel<T, kActivate>, view);
}

template <typename T>
absl::Status Plain(const GroupedMlpArgs& a, const DeviceTraits& traits, Stream stream) {
  T* activated = static_cast<T*>(a.activated);
  const View<T> first = {a.groups, FirstProduct(a.shape), static_cast<const T*>(a.x),
                         a.groups.arena, activated};
  BALLAST_RETURN_IF_ERROR((LaunchProduct<T, true>(a, traits, first, stream)));
  const View<T> second = {a.groups, SecondProduct(a.shape), activated,
                          a.groups.arena + a.shape.down_offset(), static_cast<T*>(a.y)};
  return LaunchProduct<T, false>(a, traits, second, stream);
}

}  // namespace

absl::Status GroupedMlp(const GroupedMlpArgs& a, Stream stream) {
  BALLAST_RETURN_IF_ERROR(CheckGroupedMlp(a));
  if (a.groups.num_groups == 0 || a.groups.num_rows == 0) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const DeviceTraits traits, TraitsOfDevice());
  const bool is_f32 = a.shape.dtype == DType::kF32;
  const bool can_tensor = !is_f32 && traits.major == 9;
  if (a.path == MlpPath::kTensor && !can_tensor) {
    return absl::UnimplementedError(absl::StrCat("grouped mlp: no tensor path for ",
                                                 NameOf(a.shape.dtype), " on compute capability ",
                                                 traits.major));
  }
  if (can_tensor && a.path != MlpPath::kPlain) return GroupedMlpTensor(a, traits, stream);
  return is_f32 ? Plain<float>(a, traits, stream) : Plain<__nv_bfloat16>(a, traits, stream);
}

}  // namespace ballast::cuda
