// NCCL on one device: a communicator of one rank. Exits 77 where there is no device, unless
// BALLAST_REQUIRE_GPU=1 says that there has to be one. More ranks need more devices: nothing here
// says that rows reach another one.
#include <cuda_runtime.h>
#include <nccl.h>
#include <nccl_device.h>
#include <sched.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "comm/nccl_communicator.h"

namespace ballast {
namespace {

constexpr int kSkipped = 77;
constexpr int64_t kDeadlineMs = 30'000;
constexpr size_t kBytes = 1 << 20;

#define BALLAST_TEST_CUDA(call)                                                         \
  do {                                                                                  \
    if (const cudaError_t error = (call); error != cudaSuccess) {                       \
      return absl::InternalError(absl::StrCat(#call, ": ", cudaGetErrorString(error))); \
    }                                                                                   \
  } while (false)
#define BALLAST_TEST_NCCL(call)                                                         \
  do {                                                                                  \
    if (const ncclResult_t result = (call); result != ncclSuccess) {                    \
      return absl::InternalError(absl::StrCat(#call, ": ", ncclGetLastError(nullptr))); \
    }                                                                                   \
  } while (false)

// Two buffers of the device, a stream, and the first buffer's bytes.
struct Device {
  std::byte *send = nullptr, *recv = nullptr, *staging = nullptr;
  cudaStream_t stream = nullptr;
  std::vector<std::byte> bytes = std::vector<std::byte>(kBytes);

  absl::Status Prepare() {
    void* memory[3] = {};
    for (void*& block : memory) BALLAST_TEST_CUDA(cudaMalloc(&block, kBytes));
    send = static_cast<std::byte*>(memory[0]);
    recv = static_cast<std::byte*>(memory[1]);
    staging = static_cast<std::byte*>(memory[2]);
    BALLAST_TEST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (size_t i = 0; i < kBytes; ++i) bytes[i] = static_cast<std::byte>(i * 7 + i / 251);
    BALLAST_TEST_CUDA(cudaMemcpy(send, bytes.data(), kBytes, cudaMemcpyHostToDevice));
    return Clear();
  }
  absl::Status Clear() {
    BALLAST_TEST_CUDA(cudaMemset(recv, 0, kBytes));
    BALLAST_TEST_CUDA(cudaDeviceSynchronize());
    return absl::OkStatus();
  }
  // Whether `recv` has at `to` what `send` has at `from`.
  absl::Status Check(size_t from, size_t to, size_t count) {
    std::vector<std::byte> got(count);
    BALLAST_TEST_CUDA(cudaMemcpy(got.data(), recv + to, count, cudaMemcpyDeviceToHost));
    if (std::memcmp(got.data(), bytes.data() + from, count) == 0) return Clear();
    return absl::DataLossError("the bytes that arrived are not those that were sent");
  }
};

absl::Status SettleAll(NcclComm comm) {
  const int64_t deadline = NowNs() + kDeadlineMs * 1'000'000;
  while (NowNs() < deadline) {
    BALLAST_ASSIGN_OR_RETURN(const bool settled, NcclLibrary()->Settled(comm));
    if (settled) return absl::OkStatus();
    sched_yield();
  }
  return absl::DeadlineExceededError("NCCL does not settle");
}

// All of the communicator that one rank can do.
absl::Status CheckCommunicator(Device* device) {
  LocalFabric fabric(1);
  const auto transport = fabric.MakeTransport(0);
  Communicator world(transport.get(), {.deadline_ms = 2 * kDeadlineMs});
  BALLAST_ASSIGN_OR_RETURN(
      const auto comm,
      NcclCommunicator::Create(
          NcclLibrary(), &world, 0,
          {.deadline_ms = kDeadlineMs, .max_ctas = 4, .staging = {device->staging, kBytes}}));
  const size_t count[] = {1000}, from[] = {24}, to[] = {512}, first[] = {0};
  BALLAST_RETURN_IF_ERROR(comm->AllToAllV({.send = device->send,
                                           .send_bytes = count,
                                           .send_offsets = from,
                                           .recv = device->recv,
                                           .recv_bytes = count,
                                           .recv_offsets = to},
                                          device->stream));
  BALLAST_RETURN_IF_ERROR(comm->Wait(device->stream, kDeadlineMs));
  BALLAST_RETURN_IF_ERROR(device->Check(from[0], to[0], count[0]));
  BALLAST_RETURN_IF_ERROR(comm->HierarchicalAllToAllV(
      {.send = device->send, .recv = device->recv, .pair_bytes = count, .recv_offsets = to},
      device->stream));
  BALLAST_RETURN_IF_ERROR(comm->Wait(device->stream, kDeadlineMs));
  BALLAST_RETURN_IF_ERROR(device->Check(first[0], to[0], count[0]));
  BALLAST_ASSIGN_OR_RETURN(
      const auto second,
      NcclCommunicator::Create(NcclLibrary(), &world, 0, {.deadline_ms = kDeadlineMs}));
  BALLAST_RETURN_IF_ERROR(second->Abort());
  if (!absl::IsUnavailable(second->Wait(device->stream, kDeadlineMs))) {
    return absl::InternalError("an aborted communicator does not refuse");
  }
  return comm->Destroy();
}

// A message of NCCL to its own rank: groups that are in progress, kernels and events.
absl::Status CheckSendToSelf(NcclComm comm, Device* device) {
  NcclApi* const api = NcclLibrary();
  BALLAST_RETURN_IF_ERROR(api->GroupStart());
  BALLAST_RETURN_IF_ERROR(api->Send({device->send, kBytes}, 0, comm, device->stream));
  BALLAST_RETURN_IF_ERROR(api->Recv({device->recv, kBytes}, 0, comm, device->stream));
  BALLAST_RETURN_IF_ERROR(api->GroupEnd());
  BALLAST_RETURN_IF_ERROR(SettleAll(comm));
  BALLAST_TEST_CUDA(cudaStreamSynchronize(device->stream));
  return device->Check(0, 0, kBytes);
}

// Whether kernels may use windows. Registering alone does not tell: without support it gives a
// handle that no kernel may touch. Making a device communicator does.
absl::Status ProbeWindows(NcclComm comm) {
  void* memory = nullptr;
  BALLAST_TEST_NCCL(ncclMemAlloc(&memory, kBytes));
  ncclWindow_t window = nullptr;
  const ncclResult_t begun =
      ncclCommWindowRegister(comm, memory, kBytes, &window, NCCL_WIN_COLL_SYMMETRIC);
  if (begun != ncclSuccess && begun != ncclInProgress) {
    return absl::InternalError(absl::StrCat("ncclCommWindowRegister: ", ncclGetLastError(comm)));
  }
  BALLAST_RETURN_IF_ERROR(SettleAll(comm));
#ifdef NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER
  ncclDevCommRequirements requirements = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
#else
  ncclDevCommRequirements requirements = {};
#endif
  requirements.lsaBarrierCount = 1;
  ncclDevComm_t device_comm = {};
  const ncclResult_t made = ncclDevCommCreate(comm, &requirements, &device_comm);
  const bool refused = made == ncclInvalidUsage;
  if (made != ncclSuccess && made != ncclInProgress && !refused) {
    return absl::InternalError(absl::StrCat("ncclDevCommCreate: ", ncclGetLastError(comm)));
  }
  if (!refused) {
    BALLAST_RETURN_IF_ERROR(SettleAll(comm));
    BALLAST_TEST_NCCL(ncclDevCommDestroy(comm, &device_comm));
  }
  std::printf("windows for kernels: %s\n", refused ? "not supported" : "supported");
  BALLAST_TEST_NCCL(ncclCommWindowDeregister(comm, window));
  BALLAST_RETURN_IF_ERROR(SettleAll(comm));
  BALLAST_TEST_NCCL(ncclMemFree(memory));
  return absl::OkStatus();
}

absl::Status CheckAll() {
  Device device;
  BALLAST_RETURN_IF_ERROR(device.Prepare());
  BALLAST_RETURN_IF_ERROR(CheckCommunicator(&device));
  NcclApi* const api = NcclLibrary();
  BALLAST_ASSIGN_OR_RETURN(const int version, api->Version());
  std::printf("NCCL %d\n", version);
  BALLAST_ASSIGN_OR_RETURN(const NcclUniqueId id, api->MakeUniqueId());
  NcclComm comm = nullptr;
  BALLAST_RETURN_IF_ERROR(api->Init(id, 1, 0, {}, &comm));
  BALLAST_RETURN_IF_ERROR(SettleAll(comm));
  BALLAST_RETURN_IF_ERROR(CheckSendToSelf(comm, &device));
  BALLAST_RETURN_IF_ERROR(ProbeWindows(comm));
  BALLAST_RETURN_IF_ERROR(api->Finalize(comm));
  BALLAST_RETURN_IF_ERROR(SettleAll(comm));
  return api->Destroy(comm);
}

int Main() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    const char* const required = std::getenv("BALLAST_REQUIRE_GPU");
    const bool fails = required != nullptr && std::string(required) == "1";
    std::printf("%s: no device: %s\n", fails ? "FAILED" : "skipped",
                error == cudaSuccess ? "there is none" : cudaGetErrorString(error));
    return fails ? 1 : kSkipped;
  }
  const absl::Status status = CheckAll();
  std::printf("%s\n", status.ok() ? "passed" : status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace ballast

int main() {
  return ballast::Main();
}
