#include <cuda_runtime.h>
#include <nccl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "comm/nccl_api.h"

namespace ballast {
namespace {

static_assert(static_cast<int>(NcclResult::kSuccess) == ncclSuccess);
static_assert(static_cast<int>(NcclResult::kUnhandledCudaError) == ncclUnhandledCudaError);
static_assert(static_cast<int>(NcclResult::kSystemError) == ncclSystemError);
static_assert(static_cast<int>(NcclResult::kInternalError) == ncclInternalError);
static_assert(static_cast<int>(NcclResult::kInvalidArgument) == ncclInvalidArgument);
static_assert(static_cast<int>(NcclResult::kInvalidUsage) == ncclInvalidUsage);
static_assert(static_cast<int>(NcclResult::kRemoteError) == ncclRemoteError);
static_assert(static_cast<int>(NcclResult::kInProgress) == ncclInProgress);
static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId));
// Added in 2.27 and 2.28; older headers would not even compile below, newer ones change the config.
static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0), "NCCL 2.28 or newer is needed");

absl::Status FromNccl(ncclResult_t result, const CallSite& site) {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  return NcclStatus(static_cast<NcclResult>(result), site, ncclGetLastError(nullptr));
}

absl::Status FromCuda(cudaError_t error, const CallSite& site) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // an error that the next launch must not be blamed for
  const std::string text =
      absl::StrCat(site.call, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
                   ") at ", site.file, ":", site.line);
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(text)
                                            : absl::InternalError(text);
}

#define BALLAST_SITE(call)    \
  CallSite {                  \
#call, __FILE__, __LINE__ \
  }
#define BALLAST_NCCL(call) FromNccl(call, BALLAST_SITE(call))
#define BALLAST_CUDA(call) FromCuda(call, BALLAST_SITE(call))

ncclConfig_t ToConfig(const NcclConfig& config) {
  ncclConfig_t result = NCCL_CONFIG_INITIALIZER;
  result.blocking = 0;
  if (config.max_ctas > 0) {
    result.minCTAs = 1;
    result.maxCTAs = config.max_ctas;
  }
  return result;
}

class Library : public NcclApi {
 public:
  absl::StatusOr<int> Version() override {
    int version = 0;
    BALLAST_RETURN_IF_ERROR(BALLAST_NCCL(ncclGetVersion(&version)));
    return version;
  }

  absl::StatusOr<GpuIdentity> CurrentDevice() override {
    int device = 0;
    BALLAST_RETURN_IF_ERROR(BALLAST_CUDA(cudaGetDevice(&device)));
    device_ = device;
    cudaDeviceProp properties;
    BALLAST_RETURN_IF_ERROR(BALLAST_CUDA(cudaGetDeviceProperties(&properties, device)));
    char bus_id[32] = {};
    BALLAST_RETURN_IF_ERROR(BALLAST_CUDA(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, device)));
    char host[256] = {};
    if (gethostname(host, sizeof host - 1) != 0) return absl::InternalError("gethostname failed");
    GpuIdentity identity{.host = host, .pci_bus_id = bus_id};
    std::memcpy(identity.uuid.data(), properties.uuid.bytes, identity.uuid.size());
    return identity;
  }

  absl::StatusOr<NcclUniqueId> MakeUniqueId() override {
    ncclUniqueId id;
    BALLAST_RETURN_IF_ERROR(BALLAST_NCCL(ncclGetUniqueId(&id)));
    NcclUniqueId result;
    std::memcpy(result.bytes.data(), id.internal, result.bytes.size());
    return result;
  }

  absl::Status Init(const NcclUniqueId& id, int size, int rank, const NcclConfig& config,
                    NcclComm* comm) override {
    ncclUniqueId unique_id;
    std::memcpy(unique_id.internal, id.bytes.data(), id.bytes.size());
    ncclConfig_t settings = ToConfig(config);
    return BALLAST_NCCL(ncclCommInitRankConfig(comm, size, unique_id, rank, &settings));
  }

  absl::StatusOr<bool> Settled(NcclComm comm) override {
    ncclResult_t state = ncclSuccess;
    BALLAST_RETURN_IF_ERROR(BALLAST_NCCL(ncclCommGetAsyncError(comm, &state)));
    BALLAST_RETURN_IF_ERROR(FromNccl(state, {"in the background", __FILE__, __LINE__}));
    return state == ncclSuccess;
  }

  absl::Status GroupStart() override { return BALLAST_NCCL(ncclGroupStart()); }
  absl::Status GroupEnd() override { return BALLAST_NCCL(ncclGroupEnd()); }

  absl::Status Send(std::span<const std::byte> bytes, int peer, NcclComm comm,
                    GpuStream stream) override {
    return BALLAST_NCCL(ncclSend(bytes.data(), bytes.size(), ncclUint8, peer, comm, stream));
  }
  absl::Status Recv(std::span<std::byte> bytes, int peer, NcclComm comm,
                    GpuStream stream) override {
    return BALLAST_NCCL(ncclRecv(bytes.data(), bytes.size(), ncclUint8, peer, comm, stream));
  }

  absl::Status Finalize(NcclComm comm) override { return BALLAST_NCCL(ncclCommFinalize(comm)); }
  absl::Status Destroy(NcclComm comm) override {
    BALLAST_RETURN_IF_ERROR(UseDevice());
    return BALLAST_NCCL(ncclCommDestroy(comm));
  }
  absl::Status Abort(NcclComm comm) override {
    BALLAST_RETURN_IF_ERROR(UseDevice());
    return BALLAST_NCCL(ncclCommAbort(comm));
  }

  absl::Status Shrink(NcclComm comm, std::span<const int32_t> excluded, bool abort,
                      const NcclConfig& config, NcclComm* child) override {
    BALLAST_RETURN_IF_ERROR(UseDevice());
    std::vector<int> sorted(excluded.begin(), excluded.end());  // NCCL sorts it in place
    ncclConfig_t settings = ToConfig(config);
    return BALLAST_NCCL(ncclCommShrink(comm, sorted.data(), static_cast<int>(sorted.size()), child,
                                       &settings, abort ? NCCL_SHRINK_ABORT : NCCL_SHRINK_DEFAULT));
  }

  absl::Status Copy(std::span<std::byte> to, std::span<const std::byte> from,
                    GpuStream stream) override {
    BALLAST_CHECK(to.size() == from.size());
    return BALLAST_CUDA(
        cudaMemcpyAsync(to.data(), from.data(), from.size(), cudaMemcpyDeviceToDevice, stream));
  }

  absl::StatusOr<GpuEvent> MakeEvent() override {
    cudaEvent_t event = nullptr;
    BALLAST_RETURN_IF_ERROR(BALLAST_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)));
    return event;
  }
  void FreeEvent(GpuEvent event) override { cudaEventDestroy(event); }
  absl::Status Record(GpuEvent event, GpuStream stream) override {
    return BALLAST_CUDA(cudaEventRecord(event, stream));
  }
  absl::StatusOr<bool> Happened(GpuEvent event) override {
    const cudaError_t state = cudaEventQuery(event);
    if (state == cudaErrorNotReady) {
      cudaGetLastError();  // it would be taken for an error of the next launch
      return false;
    }
    BALLAST_RETURN_IF_ERROR(FromCuda(state, BALLAST_SITE(cudaEventQuery(event))));
    return true;
  }

 private:
  // Calls that run on a thread of their own find its device there: NCCL would come back to that one
  // and so make it a context on a device that is another rank's.
  absl::Status UseDevice() { return BALLAST_CUDA(cudaSetDevice(device_)); }

  std::atomic<int> device_ = 0;  // the rank's
};

}  // namespace

NcclApi* NcclLibrary() {
  static Library library;
  return &library;
}

}  // namespace ballast
