// What the CUDA kernels are built from. Their arithmetic is that of vector_math.h, operation by
// operation, and they are compiled with -fmad=false: a fused multiply-add stands where the source
// says fmaf, so bits are those of the CPU's kernels wherever a kernel keeps their order.
#ifndef BALLAST_KERNELS_DEVICE_CUH_
#define BALLAST_KERNELS_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/dtype.h"
#include "kernels/ptx.cuh"
#include "kernels/stream.h"

namespace ballast::cuda {

// ---- host -------------------------------------------------------------------------------------

struct LaunchShape {
  unsigned blocks = 1, threads = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident at once: they may wait for each other
};

// STREAM asynchronous. ERRORS kInternal: the launch was refused (or an earlier kernel failed)
template <typename... Params, typename... Args>
absl::Status Launch(const LaunchShape& shape, Stream stream, void (*kernel)(Params...),
                    Args&&... args) {
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("a launch of ", shape.blocks, " blocks of ",
                                          shape.threads,
                                          " threads failed: ", cudaGetErrorString(error)));
}

inline constexpr size_t kMostShared = 227 << 10;  // of a block, on Hopper

// Lets a kernel have as much shared memory as there is. Once for all launches: a limit that follows
// them would be too low for one that was captured or is about to be made.
template <auto* kKernel>
absl::Status AllowMostShared() {
  static const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared));
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("shared memory of a kernel: ", cudaGetErrorString(error)));
}

// Also where a + b is more than T can hold.
template <typename T>
__host__ __device__ constexpr T CeilDiv(T a, T b) {
  return a / b + (a % b != 0 ? 1 : 0);
}

// ---- device -----------------------------------------------------------------------------------

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline unsigned LanesBelow(unsigned lane) {
  return (1u << lane) - 1;
}

__device__ inline float ToFloat(float x) {
  return x;
}
__device__ inline float ToFloat(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ T RoundTo(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return __float2bfloat16_rn(x);
  }
}

__device__ inline void StoreAs(DType type, void* y, size_t at, float x) {
  if (type == DType::kF32) {
    static_cast<float*>(y)[at] = x;
  } else {
    static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(x);
  }
}

// The lanes of cpu::Dot. Half a warp works on a sum, thread i mod 16 on lane i; whole half warps
// call the functions below.
inline constexpr int kLanes = 16;

__device__ inline unsigned HalfWarp() {
  return 0xffffu << (threadIdx.x & 16u);
}

// cpu::SumLanes; every thread of the half warp gets the sum.
__device__ inline float SumLanes(float lane) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    lane += __shfl_xor_sync(HalfWarp(), lane, distance, kLanes);
  }
  return lane;
}

// cpu::SumLanes of sixteen sums at once: thread i gets the sum of lane[i]. Each exchange halves
// what a thread still adds up, so sixteen sums take 15 exchanges and not 64.
__device__ inline float SumLanesOfEach(const float (&lane)[kLanes]) {
  float v[kLanes];  // a copy, which stays in registers also where `lane` is a row of an array
#pragma unroll
  for (int i = 0; i < kLanes; ++i) v[i] = lane[i];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < distance; ++i) {
      const float given = upper ? v[i] : v[i + distance];
      const float kept = upper ? v[i + distance] : v[i];
      v[i] = kept + __shfl_xor_sync(HalfWarp(), given, distance, kLanes);
    }
  }
  return v[0];
}

// A 16-byte vector as its elements.
template <typename T>
union Vector {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 bits;
  T at[kSize];
  __device__ Vector() : bits{} {}
  __device__ explicit Vector(uint4 v) : bits(v) {}
};

// cpu::Exp
__device__ inline float Exp(float x) {
  // Not fminf and fmaxf: a NaN stays one.
  const float clamped = x < -87.5f ? -87.5f : x > 88.5f ? 88.5f : x;
  const float shifted = fmaf(clamped, 1.44269504088896341f, 12582912.0f);
  const float k = shifted - 12582912.0f;
  float r = fmaf(k, -0.693359375f, clamped);
  r = fmaf(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const int ki = __float_as_int(shifted) - 0x4b400000;
  const int half = ki >> 1;
  const float y = p * __int_as_float((half + 127) << 23) * __int_as_float((ki - half + 127) << 23);
  return x < -87.5f ? 0.0f : y;
}
__device__ inline float Sigmoid(float x) {
  return 1.0f / (1.0f + Exp(-x));
}
__device__ inline float Silu(float x) {
  return x * Sigmoid(x);
}

// Unsigned integers in the order of the floats, from 1 up; equal floats (also the two zeros) give
// equal keys. 0 is less than every float.
__device__ inline uint32_t OrderedKey(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 + 0 = 0
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float FromOrderedKey(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_DEVICE_CUH_
