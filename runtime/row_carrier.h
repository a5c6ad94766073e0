#ifndef BALLAST_RUNTIME_ROW_CARRIER_H_
#define BALLAST_RUNTIME_ROW_CARRIER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/nccl_communicator.h"
#include "kernels/device_memory.h"

namespace ballast {

// Carries rows between devices by NCCL, on a stream of its own beside the one that computes:
//
//   Connect (pair_bytes Plan Send Receive)* Halt
//
// and so on after another Connect, which also does without Halt. Where ranks are on several nodes,
// what crosses goes once per sender and node (comm/hierarchy.h).
//
// After an error what is under way stays so until Connect, which ends it.
// THREADS one. COLLECTIVE all ranks make the same calls in the same order.
class RowCarrier {
 public:
  struct Options {
    NcclApi* nccl = nullptr;
    int max_ctas = 0;             // NcclCommunicator::Options
    Stream stream = nullptr;      // that computes
    int64_t timeout_ms = 60'000;  // of every wait for another rank
  };
  static absl::StatusOr<std::unique_ptr<RowCarrier>> Create(const Options& options);
  ~RowCarrier();

  // The ranks between which it carries from now on. NCCL's communicator shrinks where ranks were
  // lost only, and is made anew else: where one comes back, or is of another past.
  // SHAPES job_ranks [communicator->size()]: their numbers in the job, ascending; node_of_rank too
  // REQUIRES `staging` (NcclCommunicator::Options) is the same in all calls
  // ERRORS `mine` of the lowest rank that has one; those of NcclCommunicator::Create; kInternal:
  //        what was under way does not end
  absl::Status Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                       std::span<const int32_t> node_of_rank, std::span<std::byte> staging,
                       const absl::Status& mine);

  // The streams come to their end: at once where nothing waits for a rank that is gone, else NCCL's
  // communicator is given up, and the next Connect makes one anew. Needs no other rank.
  // ERRORS kInternal: what was put on them does not end
  absl::Status Halt();

  // What goes from each rank (the row) to each (the column) in the next exchange: to be written,
  // the same on all ranks. SHAPES [R, R]
  std::span<size_t> pair_bytes() { return pair_bytes_; }
  // Lays the next exchange out. What goes to a rank is at send_offset of what is sent, without
  // gaps; what comes from it at recv_offset, in the order of the ranks.
  void Plan();
  size_t send_offset(size_t rank) const { return send_offsets_[rank]; }
  size_t recv_offset(size_t rank) const { return recv_offsets_[rank]; }

  // Sends what is planned, when the stream has come to where it is now. REQUIRES all ranks have
  // said what they send. STREAM `from` and `to` belong to the exchange until Receive ERRORS those
  // of NcclCommunicator's exchanges
  absl::Status Send(const std::byte* from, std::byte* to);
  // What comes on the stream from now on is done when all has come and gone.
  absl::Status Receive();
  // Until all that is on the stream is done; whom it waits for in vain the communicator misses.
  // ERRORS those of NcclCommunicator::Wait
  absl::Status Wait();

 private:
  RowCarrier(const Options& options, cuda::OwnedStream road, cuda::Event ready, cuda::Event come)
      : options_(options),
        road_(std::move(road)),
        ready_(std::move(ready)),
        come_(std::move(come)) {}
  void EndNccl();
  absl::StatusOr<bool> IsIdle() const;
  absl::Status AwaitIdle(int64_t timeout_ms, const std::function<absl::Status()>& look_around);
  absl::Status Complain(const absl::Status& status);

  const Options options_;
  const cuda::OwnedStream road_;
  cuda::Event ready_, come_;  // what is to be sent; what was to come
  Communicator* comm_ = nullptr;
  std::unique_ptr<NcclCommunicator> nccl_;
  std::vector<int32_t> members_;  // of nccl_: their numbers in the job
  int64_t generation_ = 0;        // the last that this rank has heard of
  int64_t joined_in_ = 0;         // the one in which nccl_ was made
  std::vector<size_t> pair_bytes_;
  std::vector<size_t> send_bytes_, send_offsets_, recv_bytes_, recv_offsets_;  // [R]
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_ROW_CARRIER_H_
