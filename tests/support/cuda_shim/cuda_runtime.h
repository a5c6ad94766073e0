// Stands for the CUDA toolkit's header of this name where kernels are compiled as C++ and run by
// the emulator: what our kernels and their tests use of it, and no more.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_RUNTIME_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_RUNTIME_H_

#include <math.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tests/support/cuda_shim/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// ---- vector types -----------------------------------------------------------------------------
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Set by the emulator before a thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- block and warp ---------------------------------------------------------------------------
inline void __syncthreads() {
  cuda_shim::Barrier();
}
inline int __syncthreads_or(int predicate) {
  return cuda_shim::BarrierOr(predicate != 0);
}
inline void __threadfence() {
  cuda_shim::Fence();
}
inline void __threadfence_block() {
  cuda_shim::Yield();
}
inline void __threadfence_system() {
  cuda_shim::Fence();
}

namespace cuda_shim {

template <typename T>
uint64_t Bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T FromBits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Sets result[i] = lane(i) for every lane of the mask.
template <typename Lane>
void ForLanes(uint32_t mask, uint64_t* result, const Lane& lane) {
  for (uint32_t i = 0; i < 32; ++i) {
    if (mask >> i & 1) result[i] = lane(i);
  }
}

// argument: the lane to read from, worked out by the caller; a lane outside the mask gives noise.
inline constexpr WarpOp kShuffle = {
    "__shfl_sync",
    [](uint32_t mask, const uint64_t* value, const uint64_t* from, uint64_t* result) {
      ForLanes(mask, result, [&](uint32_t i) {
        const uint64_t lane = from[i];
        return lane < 32 && (mask >> lane & 1) ? value[lane] : 0x7ff4dead7fa4dead;
      });
    }};
inline constexpr WarpOp kBallot = {
    "__ballot_sync", [](uint32_t mask, const uint64_t* value, const uint64_t*, uint64_t* result) {
      uint64_t votes = 0;
      for (uint32_t i = 0; i < 32; ++i) votes |= (mask >> i & 1) && value[i] ? 1u << i : 0;
      ForLanes(mask, result, [&](uint32_t) { return votes; });
    }};
inline constexpr WarpOp kMatchAny = {
    "__match_any_sync",
    [](uint32_t mask, const uint64_t* value, const uint64_t*, uint64_t* result) {
      ForLanes(mask, result, [&](uint32_t i) {
        uint64_t same = 0;
        for (uint32_t j = 0; j < 32; ++j)
          same |= (mask >> j & 1) && value[j] == value[i] ? 1u << j : 0;
        return same;
      });
    }};
inline constexpr WarpOp kSyncWarp = {"__syncwarp",
                                     [](uint32_t, const uint64_t*, const uint64_t*, uint64_t*) {}};

template <typename T, typename Fold>
void Reduce(uint32_t mask, const uint64_t* value, uint64_t* result) {
  bool any = false;
  T all{};
  for (uint32_t i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    all = any ? Fold{}(all, FromBits<T>(value[i])) : FromBits<T>(value[i]);
    any = true;
  }
  ForLanes(mask, result, [&](uint32_t) { return Bits(all); });
}
struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
template <typename T, typename Fold>
T ReduceInWarp(const char* name, uint32_t mask, T value) {
  const WarpOp op = {name, [](uint32_t m, const uint64_t* v, const uint64_t*, uint64_t* r) {
                       Reduce<T, Fold>(m, v, r);
                     }};
  return FromBits<T>(InWarp(op, mask, Bits(value), 0));
}

inline unsigned Lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

}  // namespace cuda_shim

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_shim::InWarp(cuda_shim::kSyncWarp, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(cuda_shim::InWarp(cuda_shim::kBallot, mask, predicate != 0, 0));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(
      cuda_shim::InWarp(cuda_shim::kMatchAny, mask, cuda_shim::Bits(value), 0));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned from =
      (cuda_shim::Lane() & ~(width - 1u)) + (static_cast<unsigned>(lane) & (width - 1u));
  return cuda_shim::FromBits<T>(
      cuda_shim::InWarp(cuda_shim::kShuffle, mask, cuda_shim::Bits(value), from));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned own = cuda_shim::Lane();
  unsigned from = own ^ static_cast<unsigned>(lanes);
  if ((from & ~(width - 1u)) > (own & ~(width - 1u))) from = own;  // later segments are not read
  return cuda_shim::FromBits<T>(
      cuda_shim::InWarp(cuda_shim::kShuffle, mask, cuda_shim::Bits(value), from));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned own = cuda_shim::Lane();
  const unsigned from = (own & (width - 1u)) >= delta ? own - delta : own;
  return cuda_shim::FromBits<T>(
      cuda_shim::InWarp(cuda_shim::kShuffle, mask, cuda_shim::Bits(value), from));
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_shim::ReduceInWarp<T, cuda_shim::Add>("__reduce_add_sync", mask, value);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_shim::ReduceInWarp<T, cuda_shim::Max>("__reduce_max_sync", mask, value);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_shim::ReduceInWarp<T, cuda_shim::Min>("__reduce_min_sync", mask, value);
}

// ---- memory -----------------------------------------------------------------------------------
namespace cuda_shim {
// Others may come before and after an atomic operation.
template <typename T, typename Change>
T Atomically(T* at, const Change& change) {
  Yield();
  const T before = *at;
  *at = change(before);
  Yield();
  return before;
}
}  // namespace cuda_shim

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return cuda_shim::Atomically(at, [&](T before) { return static_cast<T>(before + value); });
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  return cuda_shim::Atomically(at, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_shim::Atomically(at, [&](T before) { return before == compare ? value : before; });
}

// ---- numbers ----------------------------------------------------------------------------------
using std::max;
using std::min;
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}

// ---- the runtime ------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = CUstream_st*;
struct CUevent_st;
using cudaEvent_t = CUevent_st*;
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
struct cudaDeviceProp {
  char name[256];
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest);
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** block, size_t bytes);
cudaError_t cudaFree(void* block);
cudaError_t cudaMemGetInfo(size_t* left, size_t* all);
inline constexpr unsigned cudaHostAllocPortable = 1;
cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* block);
struct cudaIpcMemHandle_t {
  char reserved[64];
};
inline constexpr unsigned cudaIpcMemLazyEnablePeerAccess = 1;
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* block);
cudaError_t cudaIpcOpenMemHandle(void** block, cudaIpcMemHandle_t handle, unsigned flags);
cudaError_t cudaIpcCloseMemHandle(void* opened);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaDeviceSynchronize();

struct CUgraph_st;
struct CUgraphExec_st;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t SetSharedLimit(const void* kernel, int bytes);
template <typename T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
  return SetSharedLimit(reinterpret_cast<const void*>(kernel), bytes);
}
template <typename T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int, size_t) {
  *blocks = 4;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttributeValue {
  int cooperative = 0;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
cudaError_t LaunchInShim(const cudaLaunchConfig_t& config, const void* kernel,
                         std::function<void()> body);

// The arguments are copied at the launch, as a kernel's are.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  return LaunchInShim(*config, reinterpret_cast<const void*>(kernel),
                      [kernel, copies = std::tuple<Params...>(std::forward<Args>(args)...)] {
                        std::apply(kernel, copies);
                      });
}

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_RUNTIME_H_
