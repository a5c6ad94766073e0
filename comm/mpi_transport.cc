#include "comm/mpi_transport.h"

#include <mpi.h>

#include <algorithm>
#include <climits>
#include <vector>

#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

absl::Status MpiError(const char* call, int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  return absl::UnavailableError(
      absl::StrCat(call, " failed: ", std::string(text, static_cast<size_t>(length))));
}

class MpiTransport : public Transport {
 public:
  explicit MpiTransport(MPI_Comm comm) : comm_(comm) {
    MPI_Comm_rank(comm, &rank_);
    MPI_Comm_size(comm, &size_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) override {
    BALLAST_CHECK(bytes.size() <= INT_MAX);
    const Handle handle = Allocate();
    const int code = MPI_Isend(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, peer, tag,
                               comm_, &requests_[handle]);
    if (code != MPI_SUCCESS) return MpiError("MPI_Isend", code);
    return handle;
  }

  absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) override {
    BALLAST_CHECK(bytes.size() <= INT_MAX);
    const Handle handle = Allocate();
    const int code = MPI_Irecv(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, peer, tag,
                               comm_, &requests_[handle]);
    if (code != MPI_SUCCESS) return MpiError("MPI_Irecv", code);
    return handle;
  }

  absl::StatusOr<bool> Test(Handle handle, size_t* received) override {
    int done = 0;
    MPI_Status status;
    const int code = MPI_Test(&requests_[handle], &done, &status);
    if (code != MPI_SUCCESS) {
      int error_class = 0;
      MPI_Error_class(code, &error_class);
      if (error_class == MPI_ERR_TRUNCATE) {
        return absl::DataLossError("a message was longer than the room for it");
      }
      return MpiError("MPI_Test", code);
    }
    if (done == 0) return false;
    if (received != nullptr) {
      int count = 0;
      MPI_Get_count(&status, MPI_BYTE, &count);
      *received = static_cast<size_t>(std::max(count, 0));
    }
    free_.push_back(handle);
    return true;
  }

 private:
  Handle Allocate() {
    if (free_.empty()) {
      free_.push_back(static_cast<Handle>(requests_.size()));
      requests_.push_back(MPI_REQUEST_NULL);
    }
    const Handle handle = free_.back();
    free_.pop_back();
    return handle;
  }

  MPI_Comm comm_;
  int rank_ = 0;
  int size_ = 0;
  std::vector<MPI_Request> requests_;
  std::vector<Handle> free_;
};

class MpiRuntimeImpl : public MpiRuntime {
 public:
  absl::Status Init(int* argc, char*** argv) {
    int provided = 0;
    int code = MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
    if (code != MPI_SUCCESS) return MpiError("MPI_Init_thread", code);
    if (provided < MPI_THREAD_FUNNELED) {
      return absl::FailedPreconditionError(
          "this MPI library does not allow threads beside its own");
    }
    code = MPI_Comm_dup(MPI_COMM_WORLD, &comm_);
    if (code != MPI_SUCCESS) return MpiError("MPI_Comm_dup", code);
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
    MPI_Comm host;
    code = MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host);
    if (code != MPI_SUCCESS) return MpiError("MPI_Comm_split_type", code);
    MPI_Comm_rank(host, &local_rank_);
    MPI_Comm_size(host, &local_size_);
    int lowest = rank_;
    MPI_Bcast(&lowest, 1, MPI_INT, 0, host);
    MPI_Comm_free(&host);
    std::vector<int> lowest_of_rank(static_cast<size_t>(size_));
    MPI_Allgather(&lowest, 1, MPI_INT, lowest_of_rank.data(), 1, MPI_INT, comm_);
    std::vector<int> hosts = lowest_of_rank;
    std::sort(hosts.begin(), hosts.end());
    hosts.erase(std::unique(hosts.begin(), hosts.end()), hosts.end());
    for (int low : lowest_of_rank) {
      node_of_rank_.push_back(static_cast<int32_t>(
          std::lower_bound(hosts.begin(), hosts.end(), low) - hosts.begin()));
    }
    return absl::OkStatus();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return local_rank_; }
  int local_size() const override { return local_size_; }
  int node() const override { return node_of_rank_[static_cast<size_t>(rank_)]; }
  std::vector<int32_t> node_of_rank() const override { return node_of_rank_; }

  std::string library_version() const override {
    char text[MPI_MAX_LIBRARY_VERSION_STRING];
    int length = 0;
    MPI_Get_library_version(text, &length);
    const std::string all(text, static_cast<size_t>(length));
    return all.substr(0, all.find(','));
  }

  absl::Status Broadcast(std::string* bytes) override {
    BALLAST_CHECK(bytes->size() <= INT32_MAX);
    int length = static_cast<int>(bytes->size());
    int code = MPI_Bcast(&length, 1, MPI_INT, 0, comm_);
    if (code == MPI_SUCCESS) {
      bytes->resize(static_cast<size_t>(length));
      code = MPI_Bcast(bytes->data(), length, MPI_BYTE, 0, comm_);
    }
    return code == MPI_SUCCESS ? absl::OkStatus() : MpiError("MPI_Bcast", code);
  }

  int Highest(int value) override {
    int highest = value;
    MPI_Allreduce(&value, &highest, 1, MPI_INT, MPI_MAX, comm_);
    return highest;
  }

  std::unique_ptr<Transport> MakeTransport() override {
    return std::make_unique<MpiTransport>(comm_);
  }

  void Finish() override {
    MPI_Comm_free(&comm_);
    MPI_Finalize();
  }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1, local_rank_ = 0, local_size_ = 1;
  std::vector<int32_t> node_of_rank_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<MpiRuntime>> MpiRuntime::Start(int* argc, char*** argv) {
  auto runtime = std::make_unique<MpiRuntimeImpl>();
  BALLAST_RETURN_IF_ERROR(runtime->Init(argc, argv));
  return runtime;
}

}  // namespace ballast
