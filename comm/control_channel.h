#ifndef BALLAST_COMM_CONTROL_CHANNEL_H_
#define BALLAST_COMM_CONTROL_CHANNEL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// A stream of frames between the leader and one rank, over a connected socket. Frames arrive whole
// and in order. A closed or broken socket is the death of the peer.
//
// Wire: magic u32, payload length u32, payload. A frame is at most kMaxFrameBytes.
// THREADS Send from any thread; receiving from one thread at a time.
class ControlChannel {
 public:
  static constexpr uint32_t kMaxFrameBytes = 64u << 20;

  // Takes over a connected stream socket and makes it non-blocking (and TCP_NODELAY where it is TCP).
  explicit ControlChannel(int fd);
  ~ControlChannel();
  ControlChannel(const ControlChannel&) = delete;
  ControlChannel& operator=(const ControlChannel&) = delete;

  // Two ends in one process (a socket pair).
  static absl::StatusOr<
      std::pair<std::unique_ptr<ControlChannel>, std::unique_ptr<ControlChannel>>>
  MakePair();

  // Queues the frame and writes what the socket takes at once; never blocks. The rest goes out with
  // later calls of Send, Flush or TryReceive.
  // ERRORS kUnavailable: the peer is gone; kResourceExhausted: more than 256 MiB wait to be sent
  absl::Status Send(std::span<const std::byte> payload);
  absl::Status Flush();
  bool HasUnsent() const;

  // The next whole frame, or nullopt when none has arrived. Never blocks.
  // ERRORS kUnavailable: the peer is gone; kInvalidArgument: not our protocol
  absl::StatusOr<std::optional<std::vector<std::byte>>> TryReceive();

  // Blocks until something can be received (true), or `timeout_ms` have passed (false).
  absl::StatusOr<bool> WaitReadable(int timeout_ms);

  int fd() const { return fd_; }

 private:
  // The implementer adds the buffers and the mutex of the sending side here.
  int fd_;
};

// Accepts the ranks' connections on the leader.
class ControlListener {
 public:
  // Listens on `host` at a port that the system chooses.
  static absl::StatusOr<std::unique_ptr<ControlListener>> Create(const std::string& host);
  ~ControlListener();
  int port() const;
  // Accepts `num_ranks` connections that introduce themselves with `token` and a rank each; returns
  // them by rank. A stranger's connection is closed and does not count.
  // ERRORS kDeadlineExceeded names the ranks that are missing
  absl::StatusOr<std::vector<std::unique_ptr<ControlChannel>>> AcceptRanks(
      int num_ranks, uint64_t token, int timeout_ms);

 private:
  ControlListener() = default;
  int fd_ = -1;
};

// The other side: connects to the leader and introduces this rank.
absl::StatusOr<std::unique_ptr<ControlChannel>> ConnectToLeader(const std::string& host, int port,
                                                                uint64_t token, int rank,
                                                                int timeout_ms);

}  // namespace ballast

#endif  // BALLAST_COMM_CONTROL_CHANNEL_H_
