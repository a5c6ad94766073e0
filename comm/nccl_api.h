#ifndef BALLAST_COMM_NCCL_API_H_
#define BALLAST_COMM_NCCL_API_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"

// The handles of NCCL and CUDA by their own tags, so that host-only code needs neither's headers.
struct ncclComm;
struct CUstream_st;
struct CUevent_st;

namespace ballast {

using NcclComm = ncclComm*;
using GpuStream = CUstream_st*;
using GpuEvent = CUevent_st*;

// What NCCL's calls return, by NCCL's own numbers (nccl_library.cc asserts that they are equal).
enum class NcclResult : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

// Where in our code a call of NCCL or CUDA stands.
struct CallSite {
  const char* call;  // with its arguments, as it is written
  const char* file;
  int line;
};

// The status of a call of NCCL: OK for kSuccess and kInProgress (NcclApi::Settled says when what
// was begun is through).
//
// ERRORS kUnavailable: a peer or a link is lost; kInvalidArgument: a wrong use, with NCCL's last
//        error, and for NCCL's "Duplicate GPU" which two ranks stand on one GPU; kInternal: any
//        other, with call, file and line. ncclSystemError is one of those: a call of NCCL's to the
//        system failed here; for peers and networks it has ncclRemoteError.
// SOURCE NCCL user guide, ncclResult_t and Troubleshooting: Errors
absl::Status NcclStatus(NcclResult result, const CallSite& site, const std::string& last_error);

// What one rank shows to all others so that they can join one communicator.
struct NcclUniqueId {
  std::array<char, 128> bytes = {};
};

struct NcclConfig {
  int max_ctas = 0;  // most thread blocks that a call may hold on the device; 0: NCCL decides
};

// Which GPU a process has made its current one.
struct GpuIdentity {
  std::string host;
  std::string pci_bus_id;
  std::array<uint8_t, 16> uuid = {};  // all zero: not known
};

// The calls of NCCL and of the CUDA runtime that move rows between GPUs: the seam between
// nccl_communicator.cc and the libraries. Every communicator is made non-blocking: a call that OK
// answers may only have begun, and until Settled says true no other call may be made on the
// communicator but Settled and Abort.
//
// ERRORS all as NcclStatus; CUDA's: kResourceExhausted for memory, kInternal for any other
// THREADS as NCCL: one per communicator, with its device current; Shrink, Destroy and Abort any
class NcclApi {
 public:
  virtual ~NcclApi() = default;

  virtual absl::StatusOr<int> Version() = 0;
  virtual absl::StatusOr<GpuIdentity> CurrentDevice() = 0;
  virtual absl::StatusOr<NcclUniqueId> MakeUniqueId() = 0;

  // Begins to join the communicator of `size` ranks that `id` stands for.
  // COLLECTIVE all ranks; settled only when all have joined
  virtual absl::Status Init(const NcclUniqueId& id, int size, int rank, const NcclConfig& config,
                            NcclComm* comm) = 0;
  // Whether all that was begun on the communicator is through (on the host: kernels may still run).
  // ERRORS what has gone wrong in the background since the last call
  virtual absl::StatusOr<bool> Settled(NcclComm comm) = 0;

  // Sends and receives between these two are issued as one, when GroupEnd has settled. Of one pair
  // of ranks they match in the order of the calls. A group that was begun has to be ended, whatever
  // happens.
  virtual absl::Status GroupStart() = 0;
  virtual absl::Status GroupEnd() = 0;
  virtual absl::Status Send(std::span<const std::byte> bytes, int peer, NcclComm comm,
                            GpuStream stream) = 0;
  virtual absl::Status Recv(std::span<std::byte> bytes, int peer, NcclComm comm,
                            GpuStream stream) = 0;

  // Begins to end the communicator. COLLECTIVE all ranks; settled when what was issued is done
  virtual absl::Status Finalize(NcclComm comm) = 0;
  // Frees a communicator whose Finalize has settled.
  virtual absl::Status Destroy(NcclComm comm) = 0;
  // Ends what is running and frees the communicator; no other rank is needed.
  virtual absl::Status Abort(NcclComm comm) = 0;
  // Begins to make the communicator of all but `excluded`, numbered in the old order. `abort` ends
  // first what is running on the old one. `child` is written while the old one settles, so it has
  // to live until then; then the child has to settle.
  // COLLECTIVE all that are not excluded, with the same arguments
  virtual absl::Status Shrink(NcclComm comm, std::span<const int32_t> excluded, bool abort,
                              const NcclConfig& config, NcclComm* child) = 0;

  // Device to device, in the order of the stream. REQUIRES to.size() == from.size()
  virtual absl::Status Copy(std::span<std::byte> to, std::span<const std::byte> from,
                            GpuStream stream) = 0;
  virtual absl::StatusOr<GpuEvent> MakeEvent() = 0;
  virtual void FreeEvent(GpuEvent event) = 0;
  // The event happens when all that is on the stream now is done.
  virtual absl::Status Record(GpuEvent event, GpuStream stream) = 0;
  virtual absl::StatusOr<bool> Happened(GpuEvent event) = 0;
};

// The NCCL and the CUDA runtime that are linked; null in builds without BALLAST_WITH_NCCL.
NcclApi* NcclLibrary();

}  // namespace ballast

#endif  // BALLAST_COMM_NCCL_API_H_
