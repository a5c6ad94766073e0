#include <cuda_runtime.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "comm/peer_memory.h"

namespace ballast {
namespace {

absl::Status StatusOf(cudaError_t error, absl::StatusCode code, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());  // it is told here, and not again to whoever asks next
  return absl::Status(code, absl::StrCat(call, ": ", cudaGetErrorString(error)));
}

static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(MemoryHandle));

class CudaMemory : public SharedDeviceMemory {
 public:
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    void* block = nullptr;
    BALLAST_RETURN_IF_ERROR(StatusOf(cudaMalloc(&block, bytes),
                                     absl::StatusCode::kResourceExhausted,
                                     absl::StrCat("cudaMalloc of ", bytes, " bytes").c_str()));
    absl::Status cleared =
        StatusOf(cudaMemset(block, 0, bytes), absl::StatusCode::kInternal, "cudaMemset");
    // It is asynchronous, and others would write here before it does.
    cleared.Update(StatusOf(cudaStreamSynchronize(nullptr), absl::StatusCode::kInternal,
                            "cudaStreamSynchronize"));
    if (cleared.ok()) return static_cast<std::byte*>(block);
    static_cast<void>(cudaFree(block));
    return cleared;
  }
  absl::Status Free(std::byte* block) override {
    return StatusOf(cudaFree(block), absl::StatusCode::kInternal, "cudaFree");
  }
  absl::StatusOr<MemoryHandle> Export(std::byte* block) override {
    cudaIpcMemHandle_t native;
    BALLAST_RETURN_IF_ERROR(StatusOf(cudaIpcGetMemHandle(&native, block),
                                     absl::StatusCode::kUnavailable, "cudaIpcGetMemHandle"));
    MemoryHandle handle;
    std::memcpy(handle.data(), &native, handle.size());
    return handle;
  }
  absl::StatusOr<std::byte*> Open(const MemoryHandle& handle) override {
    cudaIpcMemHandle_t native;
    std::memcpy(&native, handle.data(), handle.size());
    void* block = nullptr;
    BALLAST_RETURN_IF_ERROR(
        StatusOf(cudaIpcOpenMemHandle(&block, native, cudaIpcMemLazyEnablePeerAccess),
                 absl::StatusCode::kUnavailable, "cudaIpcOpenMemHandle"));
    return static_cast<std::byte*>(block);
  }
  absl::Status Close(std::byte* opened) override {
    return StatusOf(cudaIpcCloseMemHandle(opened), absl::StatusCode::kInternal,
                    "cudaIpcCloseMemHandle");
  }
};

}  // namespace

std::unique_ptr<SharedDeviceMemory> MakeCudaMemory() {
  return std::make_unique<CudaMemory>();
}

}  // namespace ballast
