// CUDA twins of the decoder's operations but attention (attention.cu): the same operations in the
// same order, so the same bits as the CPU's.
#include "kernels/decoder_ops.h"
#include "kernels/device.cuh"

namespace ballast::cuda {
namespace {

// ---- device functions -------------------------------------------------------------------------

// One thread for each element of rows of a width.
struct Element {
  int64_t at, row, column;
};
__device__ Element OwnElement(int width) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  return {at, at / width, at % width};
}

// Choices in order: the larger first, then the lower id.
__device__ uint64_t ChoiceKey(float x, int id) {
  uint32_t key = OrderedKey(x);
  if (x != x) key = id == 0 ? 0xffffffffu : 0;
  return uint64_t{key} << 32 | ~static_cast<uint32_t>(id);
}

__device__ uint64_t LargestOfWarp(uint64_t key) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    key = max(key, __shfl_xor_sync(kFullWarp, key, distance));
  }
  return key;
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void EmbedKernel(EmbedArgs a) {
  const Element e = OwnElement(a.width);
  if (e.row >= a.num_rows) return;
  a.y[e.at] = a.table[static_cast<int64_t>(a.token[e.row]) * a.width + e.column];
}

__global__ void AddKernel(AddArgs a) {
  const Element e = OwnElement(a.width);
  if (e.row >= a.num_rows) return;
  a.y[e.at] += a.x[e.at];
}

__global__ void AddBiasKernel(AddBiasArgs a) {
  const Element e = OwnElement(a.width);
  if (e.row >= a.num_rows) return;
  a.y[e.at] += a.bias[e.column];
}

// One half warp per head.
__global__ void RmsNormKernel(RmsNormArgs a, int64_t stride) {
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t row = unit / a.num_heads, head = unit % a.num_heads * a.width;
  if (row >= a.num_rows) return;
  const int lane = threadIdx.x % kLanes;
  const float* x = a.x + (a.row != nullptr ? a.row[row] : row) * stride + head;
  float sum = 0.0f;
  for (int i = lane; i < a.width; i += kLanes) sum = fmaf(x[i], x[i], sum);
  const float mean_square = SumLanes(sum) / static_cast<float>(a.width);
  const float factor = 1.0f / sqrtf(mean_square + a.eps);
  for (int i = lane; i < a.width; i += kLanes) {
    const float value = x[i] * factor * a.weight[i];
    const int64_t at = row * stride + head + i;
    if (a.y_act != nullptr) StoreAs(a.act_type, a.y_act, at, value);
    if (a.y_f32 != nullptr) a.y_f32[at] = value;
  }
}

__global__ void SiluMulKernel(SiluMulArgs a) {
  const Element e = OwnElement(a.width);
  if (e.row >= a.num_rows) return;
  const float* gate = a.gate_up + e.row * 2 * a.width;
  StoreAs(a.act_type, a.y, e.at, Silu(gate[e.column]) * gate[a.width + e.column]);
}

// One thread per pair of elements that turn together.
__global__ void RotaryKernel(RotaryArgs a) {
  const int half = a.rotary_dim / 2;
  const size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= static_cast<size_t>(a.num_rows) * a.num_heads * half) return;
  const int i = static_cast<int>(at % half);
  const size_t head = at / half % a.num_heads, row = at / half / a.num_heads;
  float* x = a.x + row * a.stride + head * a.head_dim;
  const float cos = a.cos[static_cast<size_t>(a.position[row]) * half + i];
  const float sin = a.sin[static_cast<size_t>(a.position[row]) * half + i];
  const float low = x[i], high = x[i + half];
  x[i] = fmaf(low, cos, -(high * sin));
  x[i + half] = fmaf(high, cos, low * sin);
}

// One block per row.
__global__ void ArgmaxKernel(ArgmaxArgs a) {
  uint64_t* of_warp = &Shared<uint64_t>();
  const float* x = a.x + static_cast<int64_t>(blockIdx.x) * a.width;
  uint64_t best = 0;
  for (int i = threadIdx.x; i < a.width; i += blockDim.x) best = max(best, ChoiceKey(x[i], i));
  best = LargestOfWarp(best);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  best = LargestOfWarp(threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : 0);
  if (threadIdx.x == 0) a.id[blockIdx.x] = static_cast<int32_t>(~static_cast<uint32_t>(best));
}

// ---- launchers --------------------------------------------------------------------------------

constexpr unsigned kThreads = 256;

// Launches one thread for each of `count`; none is no launch.
template <typename... Params, typename... Args>
absl::Status LaunchOver(size_t count, Stream stream, void (*kernel)(Params...), Args&&... args) {
  if (count == 0) return absl::OkStatus();
  const size_t blocks = CeilDiv(count, size_t{kThreads});
  return Launch({.blocks = static_cast<unsigned>(blocks), .threads = kThreads}, stream, kernel,
                std::forward<Args>(args)...);
}

template <typename Args>
size_t NumElements(const Args& a) {
  return static_cast<size_t>(a.num_rows) * a.width;
}

}  // namespace

absl::Status Embed(const EmbedArgs& a, Stream stream) {
  return LaunchOver(NumElements(a), stream, EmbedKernel, a);
}

absl::Status Add(const AddArgs& a, Stream stream) {
  return LaunchOver(NumElements(a), stream, AddKernel, a);
}

absl::Status AddBias(const AddBiasArgs& a, Stream stream) {
  return LaunchOver(NumElements(a), stream, AddBiasKernel, a);
}

absl::Status RmsNorm(const RmsNormArgs& a, Stream stream) {
  const size_t heads = static_cast<size_t>(a.num_rows) * a.num_heads;
  return LaunchOver(heads * kLanes, stream, RmsNormKernel, a, a.row_stride());
}

absl::Status SiluMul(const SiluMulArgs& a, Stream stream) {
  return LaunchOver(NumElements(a), stream, SiluMulKernel, a);
}

absl::Status Rotary(const RotaryArgs& a, Stream stream) {
  const size_t pairs = static_cast<size_t>(a.num_rows) * a.num_heads * (a.rotary_dim / 2);
  return LaunchOver(pairs, stream, RotaryKernel, a);
}

absl::Status Argmax(const ArgmaxArgs& a, Stream stream) {
  if (a.num_rows == 0) return absl::OkStatus();
  constexpr unsigned kRowThreads = 1024;  // there are few rows, and they are long
  const LaunchShape shape = {.blocks = static_cast<unsigned>(a.num_rows),
                             .threads = kRowThreads,
                             .shared_bytes = kRowThreads / kWarp * sizeof(uint64_t)};
  return Launch(shape, stream, ArgmaxKernel, a);
}

}  // namespace ballast::cuda
