#ifndef BALLAST_COMM_MPI_TRANSPORT_H_
#define BALLAST_COMM_MPI_TRANSPORT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "comm/transport.h"

namespace ballast {

// The MPI side of a process: starts MPI, holds the one duplicate of the world communicator on which
// everything travels, and ends MPI. After start only point-to-point calls are made: a member that
// dies inside an MPI collective would hang the others for good.
class MpiRuntime {
 public:
  // COLLECTIVE over all processes of the job. Call once, from the thread that will run the steps.
  static absl::StatusOr<std::unique_ptr<MpiRuntime>> Start(int* argc, char*** argv);
  virtual ~MpiRuntime() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int local_rank() const = 0;  // among the processes of this host
  virtual int local_size() const = 0;
  virtual int node() const = 0;        // hosts are numbered by their lowest rank
  virtual std::vector<int32_t> node_of_rank() const = 0;
  virtual std::string library_version() const = 0;

  // COLLECTIVE, start-up only: every rank gets the leader's bytes (less than 2 GiB).
  virtual absl::Status Broadcast(std::string* bytes) = 0;
  // COLLECTIVE, start-up only: the highest of the ranks' values. With it the ranks agree on whether
  // start-up failed anywhere before any of them leaves.
  virtual int Highest(int value) = 0;

  virtual std::unique_ptr<Transport> MakeTransport() = 0;

  // Ends MPI in an orderly way. COLLECTIVE. Not to be called after a failure: leave with _exit.
  virtual void Finish() = 0;
};

}  // namespace ballast

#endif  // BALLAST_COMM_MPI_TRANSPORT_H_
