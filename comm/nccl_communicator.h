#ifndef BALLAST_COMM_NCCL_COMMUNICATOR_H_
#define BALLAST_COMM_NCCL_COMMUNICATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/agreement.h"
#include "comm/communicator.h"
#include "comm/hierarchy.h"
#include "comm/nccl_agreement.h"
#include "comm/nccl_api.h"

namespace ballast {

// Moves rows between the GPUs of all ranks by NCCL.
//
//   Create (AllToAllV | HierarchicalAllToAllV | Wait)* (Shrink | Abort | Destroy)
//
// What ranks have to agree about goes over the point-to-point world (communicator.h), never over
// NCCL: no rank enters a call of NCCL that waits for others before all have said that they will.
// NCCL is used without blocking and every wait has a deadline. Calls that may block inside NCCL all
// the same (abort, destroy, shrink) run on a thread that is left behind if it does not come back.
//
// After an error the communicator is dead: every further call returns kUnavailable, what was issued
// may still run on the device and touch its buffers until Shrink or Abort, and all that is left to
// do is one of these two.
//
// A communicator holds at most Options::max_ctas thread blocks of the device. Give the one that
// migrates experts few: its kernels wait for peers while they hold them, and one that held the
// whole device could keep out the kernels that the peers wait for.
//
// COLLECTIVE all ranks make the same calls in the same order.
// THREADS one, with the rank's device current.
//
// What runs on devices of several ranks is not checked by any test here: with one GPU NCCL makes
// only communicators of one rank. The tests run all of this against a fake of NCCL
// (tests/support/fake_nccl.h), and a communicator of one rank on a device (tests/gpu).
class NcclCommunicator {
 public:
  struct Options {
    // Of each call but Wait, and once more for an abort at its end. At most a third of the world's:
    // there the ranks wait for those that wait here.
    int64_t deadline_ms = 20'000;
    int max_ctas = 0;  // 0: NCCL decides
    // [size] which node each rank is on (any numbers); empty: all on one.
    std::vector<int32_t> node_of_rank = {};
    // Device memory for rows that this rank hands on to others of its node; the same size on all
    // ranks. Lives as long as the communicator and its successors by Shrink.
    std::span<std::byte> staging = {};
    // Asked now and then during a wait; an error ends the wait with it. Empty: never.
    std::function<absl::Status()> interrupted = {};
  };

  // Joins all ranks of `world`; their numbers are the same here. The current device is this rank's.
  //
  // REQUIRES options.node_of_rank is the same on all ranks (checked)
  // ERRORS the same on all ranks, with the number of the rank that failed; kInvalidArgument: two
  //        ranks on one GPU, options or versions of NCCL that differ; kDeadlineExceeded: joining
  //        took too long; or `world`'s, which may differ
  // COLLECTIVE all ranks of `world`, which is used only here; `epoch` as in AllGather
  static absl::StatusOr<std::unique_ptr<NcclCommunicator>> Create(NcclApi* api, Communicator* world,
                                                                  int64_t epoch, Options options);
  // As Destroy; a failure is logged.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return hierarchy_.num_ranks(); }
  const Hierarchy& hierarchy() const { return hierarchy_; }

  // Device memory, and which part of it goes to or comes from each rank.
  struct Args {
    const std::byte* send;
    std::span<const size_t> send_bytes, send_offsets;  // [size]
    std::byte* recv;
    std::span<const size_t> recv_bytes, recv_offsets;  // [size]
  };
  // Sends each rank its part, directly.
  //
  //   recv of d [recv_offsets[s], + recv_bytes[s])  =  send of s [send_offsets[d], + send_bytes[d])
  //
  // REQUIRES recv_bytes[s] on d is send_bytes[d] on s. Pairs with nothing to send need no message;
  //          a rank's own part is copied
  // ERRORS kDeadlineExceeded: NCCL has not issued it in time; what `interrupted` says; NCCL's
  // STREAM returns when all is issued to `stream`; both buffers belong to it until Wait or until
  //        later work of the stream
  absl::Status AllToAllV(const Args& args, GpuStream stream);

  struct HierarchicalArgs {
    const std::byte* send;  // at the offsets of hierarchy().SendOffsets
    std::byte* recv;
    std::span<const size_t> pair_bytes;    // [size, size]: from the row's rank to the column's
    std::span<const size_t> recv_offsets;  // [size]
  };
  // The same result, with one message per sender and other node (hierarchy.h).
  //
  // REQUIRES pair_bytes is the same on all ranks
  // ERRORS as AllToAllV; kInvalidArgument, on all ranks: staging memory is too small for one of
  //        them, with the bytes that it needs; nothing was issued, the communicator lives
  // STREAM as AllToAllV; one such exchange after the other, as they share the staging memory
  absl::Status HierarchicalAllToAllV(const HierarchicalArgs& args, GpuStream stream);

  // Waits until all that is on `stream` now is done.
  // ERRORS kDeadlineExceeded names the ranks that the last exchange had messages with;
  //        kUnavailable: a peer or a link is lost; what `interrupted` says; other errors of NCCL
  absl::Status Wait(GpuStream stream, int64_t deadline_ms);

  // Whether the last exchange had messages from or to `peer`.
  bool HadMessagesWith(int peer) const { return peers_[static_cast<size_t>(peer)] != kNone; }

  // The communicator of `survivors`, numbered in their order; this one is dead and freed. If it was
  // dead on any of them, what runs on it is aborted first.
  //
  // REQUIRES `world` is that of the survivors, which are ascending and fewer than all; without a
  //          fault nothing that was issued still runs
  // ERRORS the same on all of them, with the number in `world` of the rank that failed; among them
  //        kUnavailable if it has aborted already. Both communicators are gone then, and Create
  //        over `world` is what is left
  // COLLECTIVE all survivors; without a fault the others have to end theirs by Abort
  absl::StatusOr<std::unique_ptr<NcclCommunicator>> Shrink(Communicator* world, int64_t epoch,
                                                           std::span<const int32_t> survivors);

  // Ends at once, whatever runs; needs no other rank. A second time it does nothing.
  // ERRORS kDeadlineExceeded: NCCL does not come back; its memory stays lost
  absl::Status Abort();

  // Ends when all that was issued is done, or as Abort when dead. A second time it does nothing.
  // COLLECTIVE all ranks, if alive
  // ERRORS kDeadlineExceeded: not all ranks have come, or something issued does not end; aborted
  absl::Status Destroy();

 private:
  NcclCommunicator(NcclApi* api, int rank, Options options);

  absl::Status Join(const NcclUniqueId& id);
  absl::Status ShrinkTo(std::span<const int32_t> excluded, bool abort, NcclCommunicator* child);
  // All ranks of `world` have `made` or none.
  static absl::StatusOr<std::unique_ptr<NcclCommunicator>> Confirm(
      Communicator* world, int64_t epoch, const absl::Status& joined,
      std::unique_ptr<NcclCommunicator> made);

  template <typename Calls>
  absl::Status Group(Calls calls);
  template <typename Done>
  absl::Status Poll(int64_t deadline_ms, const char* what, Done done);
  // Until all that was begun at NCCL is through.
  absl::Status Settle(int64_t deadline_ms, const char* what);
  absl::Status Send(std::span<const std::byte> bytes, int peer, GpuStream stream);
  absl::Status Recv(std::span<std::byte> bytes, int peer, GpuStream stream);
  void BeginExchange();
  std::string PeersOfExchange() const;
  absl::Status Fail(const absl::Status& status);
  void Die(const std::string& why);
  // Runs `call` on a thread of its own, which is left behind if it takes longer.
  absl::Status CallWithin(int64_t deadline_ms, const char* what,
                          std::function<absl::Status()> call) const;

  enum PeerUse : uint8_t { kNone = 0, kSendsTo = 1, kRecvsFrom = 2 };

  NcclApi* api_;
  int rank_;
  Options options_;
  Hierarchy hierarchy_;
  NcclComm comm_ = nullptr;
  GpuEvent event_ = nullptr;    // of Wait
  absl::Status dead_;           // OK while alive
  uint64_t exchange_ = 0;       // counts the exchanges
  std::vector<uint8_t> peers_;  // [size] PeerUse of the last exchange
};

}  // namespace ballast

#endif  // BALLAST_COMM_NCCL_COMMUNICATOR_H_
