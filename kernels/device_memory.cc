#include "kernels/device_memory.h"

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace ballast::cuda {
namespace {

constexpr int kOldestMajor = 8;  // sm_80

absl::Status StatusOf(cudaError_t error, const char* call,
                      absl::StatusCode code = absl::StatusCode::kInternal) {
  if (error == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());  // it is told here, and not again to whoever asks next
  return absl::Status(code, absl::StrCat(call, ": ", cudaGetErrorString(error)));
}

class CudaMemory : public Memory {
 public:
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    void* block = nullptr;
    BALLAST_RETURN_IF_ERROR(StatusOf(cudaMalloc(&block, bytes == 0 ? 1 : bytes),
                                     absl::StrCat("device memory, ", bytes, " bytes").c_str(),
                                     absl::StatusCode::kResourceExhausted));
    absl::Status cleared = StatusOf(cudaMemset(block, 0, bytes), "cudaMemset");
    // It is asynchronous, and not in the order of any other stream.
    cleared.Update(StatusOf(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"));
    if (cleared.ok()) return static_cast<std::byte*>(block);
    Free(static_cast<std::byte*>(block));
    return cleared;
  }
  void Free(std::byte* block) override {
    if (block != nullptr) static_cast<void>(cudaFree(block));
  }
  absl::Status Write(std::byte* to, std::span<const std::byte> from, Stream stream) override {
    return StatusOf(cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyDefault, stream),
                    "a copy to the device");
  }
  absl::Status Read(std::span<std::byte> to, const std::byte* from, Stream stream) override {
    BALLAST_RETURN_IF_ERROR(
        StatusOf(cudaMemcpyAsync(to.data(), from, to.size(), cudaMemcpyDefault, stream),
                 "a copy from the device"));
    return Wait(stream);
  }
};

class CudaPinnedMemory : public Memory {
 public:
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    void* block = nullptr;
    BALLAST_RETURN_IF_ERROR(
        StatusOf(cudaHostAlloc(&block, bytes == 0 ? 1 : bytes, cudaHostAllocPortable),
                 absl::StrCat("pinned memory, ", bytes, " bytes").c_str(),
                 absl::StatusCode::kResourceExhausted));
    return static_cast<std::byte*>(std::memset(block, 0, bytes));
  }
  void Free(std::byte* block) override {
    if (block != nullptr) static_cast<void>(cudaFreeHost(block));
  }
  absl::Status Write(std::byte* to, std::span<const std::byte> from, Stream stream) override {
    return HostMemory().Write(to, from, stream);
  }
  absl::Status Read(std::span<std::byte> to, const std::byte* from, Stream stream) override {
    return HostMemory().Read(to, from, stream);
  }
};

}  // namespace

Memory& DeviceMemory() {
  static CudaMemory memory;
  return memory;
}

Memory& PinnedMemory() {
  static CudaPinnedMemory memory;
  return memory;
}

absl::Status UseDevice(int32_t device) {
  constexpr int kLeastConnections = 8;
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", /*overwrite=*/0);
  const char* const connections = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  if (std::atoi(connections) < kLeastConnections) {
    return absl::FailedPreconditionError(absl::StrCat(
        "CUDA_DEVICE_MAX_CONNECTIONS is ", connections, ", allowed: ", kLeastConnections,
        " and above: streams must not stand behind each other"));
  }
  int count = 0;
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaGetDeviceCount(&count), "looking for devices", absl::StatusCode::kUnavailable));
  if (device >= count) {
    return absl::UnavailableError(
        absl::StrCat("device ", device, " is wanted, the machine has ", count,
                     "; ranks that share one would wait for each other's kernels"));
  }
  BALLAST_RETURN_IF_ERROR(StatusOf(cudaSetDevice(device), "cudaSetDevice"));
  int major = 0;
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute"));
  if (major >= kOldestMajor) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("device ", device, " has compute capability ",
                                                    major, ", allowed: ", kOldestMajor,
                                                    " and above"));
}

int64_t FreeMemory() {
  size_t left = 0, all = 0;
  if (cudaMemGetInfo(&left, &all) != cudaSuccess) return 0;
  return static_cast<int64_t>(left);
}

absl::Status Copy(void* to, const void* from, size_t bytes, Stream stream) {
  return StatusOf(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
}

absl::Status Wait(Stream stream) {
  return StatusOf(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

absl::StatusOr<bool> IsDone(Stream stream) {
  const cudaError_t error = cudaStreamQuery(stream);
  if (error == cudaErrorNotReady) return false;
  BALLAST_RETURN_IF_ERROR(StatusOf(error, "cudaStreamQuery"));
  return true;
}

absl::StatusOr<OwnedStream> OwnedStream::Create(Priority priority) {
  int low = 0, high = 0;
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaDeviceGetStreamPriorityRange(&low, &high), "cudaDeviceGetStreamPriorityRange"));
  Stream stream = nullptr;
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                            priority == Priority::kLow ? low : high),
               "cudaStreamCreateWithPriority"));
  return OwnedStream(stream);
}

OwnedStream::~OwnedStream() {
  if (stream_ != nullptr) static_cast<void>(cudaStreamDestroy(stream_));
}

absl::StatusOr<Event> Event::Create() {
  cudaEvent_t event = nullptr;
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate"));
  return Event(event);
}

Event::~Event() {
  if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
}

absl::Status Event::Record(Stream stream) {
  return StatusOf(cudaEventRecord(event_, stream), "cudaEventRecord");
}

absl::StatusOr<bool> Event::IsDone() const {
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  BALLAST_RETURN_IF_ERROR(StatusOf(error, "cudaEventQuery"));
  return true;
}

absl::Status Event::HoldBack(Stream stream) const {
  return StatusOf(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
}

absl::StatusOr<Graph> Graph::Capture(Stream stream, const std::function<absl::Status()>& work) {
  BALLAST_RETURN_IF_ERROR(
      StatusOf(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture"));
  absl::Status captured = work();
  cudaGraph_t graph = nullptr;
  captured.Update(StatusOf(cudaStreamEndCapture(stream, &graph), "the end of a capture"));
  cudaGraphExec_t exec = nullptr;
  if (captured.ok()) {
    captured = StatusOf(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  }
  if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
  if (!captured.ok()) return captured;
  return Graph(exec);
}

Graph::~Graph() {
  if (graph_ != nullptr) static_cast<void>(cudaGraphExecDestroy(graph_));
}

absl::Status Graph::Launch(Stream stream) const {
  return StatusOf(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch");
}

}  // namespace ballast::cuda
