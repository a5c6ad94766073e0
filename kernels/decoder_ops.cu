// CUDA twins of RmsNorm, SiluMul and Rotary: the same operations in the same order, so the same
// bits as the CPU's.
#include "kernels/decoder_ops.h"
#include "kernels/device.cuh"

namespace ballast::cuda {
namespace {

// ---- device functions -------------------------------------------------------------------------

constexpr int kLanes = 16;  // of a sum, as in vector_math.h: half a warp works on a row

// The binary tree of SumLanes; every lane of the half warp gets the sum.
__device__ float SumLanes(float lane) {
  const unsigned half_warp = 0xffffu << (threadIdx.x & 16u);
  for (int distance : {8, 4}) lane += __shfl_down_sync(half_warp, lane, distance, kLanes);
  // (s0 + s2) + (s1 + s3)
  lane += __shfl_down_sync(half_warp, lane, 2, kLanes);
  lane += __shfl_down_sync(half_warp, lane, 1, kLanes);
  return __shfl_sync(half_warp, lane, 0, kLanes);
}

__device__ void Store(void* y, DType type, size_t i, float value) {
  if (type == DType::kF32) {
    static_cast<float*>(y)[i] = value;
  } else {
    static_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16_rn(value);
  }
}

// ---- kernels ----------------------------------------------------------------------------------

// One half warp per row.
__global__ void RmsNormKernel(RmsNormArgs a) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / kLanes;
  if (row >= a.num_rows) return;
  const int lane = threadIdx.x % kLanes;
  const float* x = a.x + static_cast<size_t>(row) * a.width;
  float sum = 0.0f;
  for (int i = lane; i < a.width; i += kLanes) sum = fmaf(x[i], x[i], sum);
  const float mean_square = SumLanes(sum) / static_cast<float>(a.width);
  const float factor = 1.0f / sqrtf(mean_square + a.eps);
  for (int i = lane; i < a.width; i += kLanes) {
    const float value = x[i] * factor * a.weight[i];
    const size_t at = static_cast<size_t>(row) * a.width + i;
    if (a.y_act != nullptr) Store(a.y_act, a.act_type, at, value);
    if (a.y_f32 != nullptr) a.y_f32[at] = value;
  }
}

// One thread per element.
__global__ void SiluMulKernel(SiluMulArgs a) {
  const size_t at = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= static_cast<size_t>(a.num_rows) * a.width) return;
  const size_t row = at / a.width, column = at % a.width;
  const float gate = a.gate_up[row * 2 * a.width + column];
  const float up = a.gate_up[row * 2 * a.width + a.width + column];
  Store(a.y, a.act_type, at, Silu(gate) * up);
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

// ---- launchers --------------------------------------------------------------------------------

constexpr unsigned kThreads = 256;

// One thread for each of `count`.
LaunchShape Cover(size_t count) {
  return {.blocks = static_cast<unsigned>(CeilDiv(count, size_t{kThreads})), .threads = kThreads};
}

}  // namespace

absl::Status RmsNorm(const RmsNormArgs& a, Stream stream) {
  if (a.num_rows == 0) return absl::OkStatus();
  return Launch(Cover(static_cast<size_t>(a.num_rows) * kLanes), stream, RmsNormKernel, a);
}

absl::Status SiluMul(const SiluMulArgs& a, Stream stream) {
  const size_t count = static_cast<size_t>(a.num_rows) * a.width;
  if (count == 0) return absl::OkStatus();
  return Launch(Cover(count), stream, SiluMulKernel, a);
}

absl::Status Rotary(const RotaryArgs& a, Stream stream) {
  const size_t count = static_cast<size_t>(a.num_rows) * a.num_heads * (a.rotary_dim / 2);
  if (count == 0) return absl::OkStatus();
  return Launch(Cover(count), stream, RotaryKernel, a);
}

}  // namespace ballast::cuda
