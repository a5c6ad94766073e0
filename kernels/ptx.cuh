// What CUDA C++ has no plain name for. The emulator of the tests has its own version of this header
// (tests/support/cuda_shim/kernels/ptx.cuh) with the same declarations; this and hopper.cuh are all
// that differs.
#ifndef BALLAST_KERNELS_PTX_CUH_
#define BALLAST_KERNELS_PTX_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace ballast::cuda {

// The block's shared memory, as large as the launch said.
template <typename T>
__device__ T& Shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

// Time on the device, in nanoseconds; its steps may be as coarse as a microsecond.
__device__ inline uint64_t NanosecondsNow() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Streaming accesses of 16 bytes, which leave the caches to others. ALIGNED 16
__device__ inline uint4 LoadStreaming(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}
// The bytes were written by another kernel or device since this kernel began: not through the
// read-only path.
__device__ inline uint4 LoadFresh(const void* at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline void StoreStreaming(void* at, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// To and from the memory of a peer: a store is seen by others after a fence and a release only.
__device__ inline void StorePeer(void* at, uint4 v) {
  StoreStreaming(at, v);
}
__device__ inline void StorePeer(int32_t* at, int32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}
__device__ inline int32_t LoadPeer(const int32_t* at) {
  int32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

// A flag: what was stored before the release is seen by whoever acquires the value.
__device__ inline void StoreRelease(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ inline uint32_t LoadAcquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_PTX_CUH_
