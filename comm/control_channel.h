#ifndef BALLAST_COMM_CONTROL_CHANNEL_H_
#define BALLAST_COMM_CONTROL_CHANNEL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
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

  // Takes over a connected stream socket and makes it non-blocking (and TCP_NODELAY where it is
  // TCP).
  explicit ControlChannel(int fd);
  ~ControlChannel();
  ControlChannel(const ControlChannel&) = delete;
  ControlChannel& operator=(const ControlChannel&) = delete;

  // Two ends in one process (a socket pair).
  static absl::StatusOr<std::pair<std::unique_ptr<ControlChannel>, std::unique_ptr<ControlChannel>>>
  MakePair();

  // Queues the frame and writes what the socket takes at once; never blocks. The rest goes out with
  // later calls of Send, Flush or TryReceive.
  // ERRORS kUnavailable: the peer is gone; kResourceExhausted: more than 256 MiB wait to be sent
  //        kInvalidArgument: longer than kMaxFrameBytes
  absl::Status Send(std::span<const std::byte> payload);
  absl::Status Flush();
  bool HasUnsent() const { return unsent_bytes() > 0; }
  size_t unsent_bytes() const;

  // The next whole frame, or nullopt when none has arrived. Never blocks.
  // ERRORS kUnavailable: the peer is gone; kInvalidArgument: not our protocol
  absl::StatusOr<std::optional<std::vector<std::byte>>> TryReceive();

  // Blocks until something can be received (true), or `timeout_ms` have passed (false).
  absl::StatusOr<bool> WaitReadable(int timeout_ms);

  // Ends the connection both ways: both ends then find the peer gone. THREADS any.
  void Shutdown();

  int fd() const { return fd_; }

 private:
  absl::Status FlushLocked();
  // Something for TakeFrame: a whole frame, or bytes that are none.
  bool HasFrame() const;
  // The first whole frame in `in_`, if there is one.
  absl::StatusOr<std::optional<std::vector<std::byte>>> TakeFrame();

  const int fd_;
  mutable std::mutex send_mutex_;
  std::vector<std::byte> out_;  // guarded by send_mutex_; [out_at_, size) waits to be sent
  size_t out_at_ = 0;           // guarded by send_mutex_
  std::vector<std::byte> in_;   // the receiving thread's; [in_at_, size) was received, not taken
  size_t in_at_ = 0;
};

// Accepts the ranks' connections on the leader.
class ControlListener {
 public:
  // Listens on `host` (a name or an address) at a port that the system chooses.
  static absl::StatusOr<std::unique_ptr<ControlListener>> Create(const std::string& host);
  ~ControlListener();
  ControlListener(const ControlListener&) = delete;
  ControlListener& operator=(const ControlListener&) = delete;

  int port() const { return port_; }
  // Accepts `num_ranks` connections that introduce themselves with `token` and a rank each; returns
  // them by rank. A stranger's connection is closed and does not count. The leader's own rank may
  // connect from the same thread before this call.
  // ERRORS kDeadlineExceeded names the ranks that are missing
  absl::StatusOr<std::vector<std::unique_ptr<ControlChannel>>> AcceptRanks(int num_ranks,
                                                                           uint64_t token,
                                                                           int timeout_ms);

 private:
  ControlListener(int fd, int port) : fd_(fd), port_(port) {}
  const int fd_;
  const int port_;
};

// The other side: connects to the leader, trying again until it listens, and introduces this rank.
// ERRORS kDeadlineExceeded: no connection within `timeout_ms`; kInvalidArgument: unknown host
absl::StatusOr<std::unique_ptr<ControlChannel>> ConnectToLeader(const std::string& host, int port,
                                                                uint64_t token, int rank,
                                                                int timeout_ms);

}  // namespace ballast

#endif  // BALLAST_COMM_CONTROL_CHANNEL_H_
