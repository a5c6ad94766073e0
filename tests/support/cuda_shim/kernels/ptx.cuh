// The emulator's version of kernels/ptx.cuh.
#ifndef BALLAST_KERNELS_PTX_CUH_
#define BALLAST_KERNELS_PTX_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ballast::cuda {

template <typename T>
T& Shared() {
  return *reinterpret_cast<T*>(cuda_shim::SharedMemory());
}

inline uint64_t NanosecondsNow() {
  cuda_shim::Yield();
  return cuda_shim::Nanoseconds();
}

inline uint4 LoadStreaming(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) cuda_shim::Trap("a misaligned load");
  uint4 v;
  std::memcpy(&v, at, sizeof v);
  return v;
}
inline uint4 LoadFresh(const void* at) {
  return LoadStreaming(at);
}
inline void StoreStreaming(void* at, uint4 v) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) cuda_shim::Trap("a misaligned store");
  std::memcpy(at, &v, sizeof v);
}

inline void StorePeer(void* at, uint4 v) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) cuda_shim::Trap("a misaligned store");
  cuda_shim::StoreLate(at, &v, sizeof v);
}
inline void StorePeer(int32_t* at, int32_t v) {
  cuda_shim::StoreLate(at, &v, sizeof v);
}
inline int32_t LoadPeer(const int32_t* at) {
  cuda_shim::Yield();
  return *at;
}

// A release orders what this thread stored and what it saw at barriers.
inline void StoreRelease(uint32_t* flag, uint32_t value) {
  cuda_shim::Fence();
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);  // other processes may read it
}
inline uint32_t LoadAcquire(const uint32_t* flag) {
  cuda_shim::Yield();
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_PTX_CUH_
