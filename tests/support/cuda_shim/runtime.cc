// The functions of the CUDA runtime, over the emulator.
#include <sched.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/support/cuda_shim/cuda_runtime.h"
#include "tests/support/cuda_shim/stream.h"

namespace {

// Threads take turns: each function of the runtime is one, and so is each attempt to wait.
struct Turn {
  const std::lock_guard<std::mutex> lock{cuda_shim::Mutex()};
};

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t Note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// An error stays with the context until the next schedule, as a device's does until its reset.
cudaError_t Sound() {
  return Note(cuda_shim::LastFailure()[0] == '\0' ? cudaSuccess : cudaErrorLaunchFailure);
}

std::atomic<uint64_t> blocking_calls = 0;

// In turns of its own.
cudaError_t Settle(CUstream_st* stream, bool all) {
  ++blocking_calls;
  for (;; sched_yield()) {
    const Turn turn;
    if (stream != nullptr && stream->captured != nullptr) return Note(cudaErrorInvalidValue);
    if (!cuda_shim::RunUntilIdle(stream, all)) return Note(cudaErrorLaunchFailure);
    if (!cuda_shim::IsIdle(stream, all)) continue;
    return Note(cuda_shim::CheckDeviceBlocks() ? cudaSuccess : cudaErrorLaunchFailure);
  }
}

}  // namespace

uint64_t cuda_shim::BlockingCalls() {
  return blocking_calls;
}
std::mutex& cuda_shim::Mutex() {
  static std::mutex mutex;
  return mutex;
}

struct CUevent_st {
  // One more for each record; a wait is for the number at the time that it was asked for.
  std::shared_ptr<uint64_t> recorded = std::make_shared<uint64_t>(0);
  std::shared_ptr<uint64_t> at_ns = std::make_shared<uint64_t>(0);
  uint64_t wanted = 0;
};

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_shim::LastFailure() : cudaGetErrorName(error);
}
cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 8;  // all alike, and one at a time
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "emulator");
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // A small Hopper: grids that are sized by it have more to do than blocks.
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 2;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** block, size_t bytes) {
  const Turn turn;
  ++blocking_calls;
  *block = cuda_shim::AllocateDevice(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* block) {
  if (block == nullptr) return cudaSuccess;
  const cudaError_t settled = Settle(nullptr, true);
  const Turn turn;
  return cuda_shim::FreeDevice(block) ? settled : Note(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* all) {
  const Turn turn;
  *all = size_t{8} << 30;
  *left = *all - cuda_shim::DeviceBytes();
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned) {
  const Turn turn;
  ++blocking_calls;
  *block = cuda_shim::AllocatePinned(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* block) {
  const Turn turn;
  if (block == nullptr) return cudaSuccess;
  ++blocking_calls;
  return cuda_shim::FreePinned(block) ? Sound() : Note(cudaErrorInvalidValue);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* block) {
  const Turn turn;
  cuda_shim::SharedBlock shared;
  if (!cuda_shim::ExportDevice(block, &shared)) return Note(cudaErrorInvalidValue);
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle, &shared, sizeof shared);
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** block, cudaIpcMemHandle_t handle, unsigned) {
  const Turn turn;
  ++blocking_calls;
  cuda_shim::SharedBlock shared;
  std::memcpy(&shared, &handle, sizeof shared);
  *block = cuda_shim::OpenDevice(shared);
  return *block == nullptr ? Note(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void* opened) {
  const cudaError_t settled = Settle(nullptr, true);
  const Turn turn;
  return cuda_shim::CloseDevice(opened) ? settled : Note(cudaErrorInvalidValue);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const Turn turn;
  if (bytes == 0) return Sound();
  // The driver copies memory that is not pinned by itself.
  blocking_calls += !cuda_shim::IsReadLate(from) || !cuda_shim::IsReadLate(to);
  if (cuda_shim::IsReadLate(from)) {
    cuda_shim::Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  } else {
    const auto* first = static_cast<const std::byte*>(from);
    cuda_shim::Enqueue(stream, [to, read = std::vector<std::byte>(first, first + bytes)] {
      std::memcpy(to, read.data(), read.size());
    });
  }
  return Sound();
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return Settle(nullptr, false);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Turn turn;
  cuda_shim::Enqueue(stream, [=] { std::memset(to, value, bytes); });
  return Sound();
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  cudaMemsetAsync(to, value, bytes, nullptr);
  return Settle(nullptr, false);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Turn turn;
  *stream = cuda_shim::MakeStream();
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const cudaError_t settled = Settle(stream, false);
  const Turn turn;
  cuda_shim::FreeStream(stream);
  return settled;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return Settle(stream, false);
}
cudaError_t cudaDeviceSynchronize() {
  return Settle(nullptr, true);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Turn turn;
  cuda_shim::RunAWhile();
  const cudaError_t sound = Sound();
  if (sound != cudaSuccess) return sound;
  return cuda_shim::IsIdle(stream, false) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ++blocking_calls;
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Turn turn;
  cuda_shim::Enqueue(stream,
                     [recorded = event->recorded, at_ns = event->at_ns, number = ++event->wanted] {
                       *recorded = number;
                       *at_ns = cuda_shim::Nanoseconds();
                     });
  return Sound();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Turn turn;
  cuda_shim::EnqueueWait(
      stream, [recorded = event->recorded, number = event->wanted] { return *recorded >= number; });
  return Sound();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Turn turn;
  if (*event->recorded < event->wanted) cuda_shim::RunAWhile();
  const cudaError_t sound = Sound();
  if (sound != cudaSuccess) return sound;
  return *event->recorded >= event->wanted ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const Turn turn;
  // A copy takes no turn of the emulator's; no time is zero.
  *ms = static_cast<float>(*end->at_ns - *begin->at_ns + 1) * 1e-6f;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return cudaEventQuery(event) == cudaSuccess ? cudaSuccess : Settle(nullptr, true);
}

namespace {

// How much shared memory each kernel may have, where that has been asked for.
std::map<const void*, size_t>& SharedLimits() {
  static std::map<const void*, size_t> limits;
  return limits;
}

}  // namespace

cudaError_t SetSharedLimit(const void* kernel, int bytes) {
  const Turn turn;
  SharedLimits()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t LaunchInShim(const cudaLaunchConfig_t& config, const void* kernel,
                         std::function<void()> body) {
  const Turn turn;
  const auto shape = [](dim3 d) { return cuda_shim::Shape{d.x, d.y, d.z}; };
  cuda_shim::Launch launch;
  launch.grid = shape(config.gridDim);
  launch.block = shape(config.blockDim);
  launch.shared_bytes = config.dynamicSmemBytes;
  launch.body = std::move(body);
  const auto limit = SharedLimits().find(kernel);
  const size_t most_shared = limit == SharedLimits().end() ? 48 << 10 : limit->second;
  if (launch.grid.count() == 0 || launch.block.count() == 0 || launch.block.count() > 1024 ||
      launch.shared_bytes > most_shared) {
    return Note(cudaErrorInvalidConfiguration);
  }
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative &&
        launch.grid.count() * launch.block.count() > cuda_shim::kMostResident) {
      return Note(cudaErrorCooperativeLaunchTooLarge);
    }
  }
  cuda_shim::Enqueue(config.stream, std::move(launch));
  return Sound();
}

// ---- graphs -----------------------------------------------------------------------------------

struct CUgraphExec_st {
  std::deque<cuda_shim::Work> work;
};

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Turn turn;
  if (stream == nullptr || stream->captured != nullptr) return Note(cudaErrorInvalidValue);
  stream->captured = std::make_unique<CUgraph_st>();
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Turn turn;
  if (stream == nullptr || stream->captured == nullptr) return Note(cudaErrorInvalidValue);
  *graph = stream->captured.release();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  ++blocking_calls;
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Turn turn;
  if (stream == nullptr) return Note(cudaErrorInvalidValue);
  stream->work.insert(stream->work.end(), exec->work.begin(), exec->work.end());
  return Sound();
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
