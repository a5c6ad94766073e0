#ifndef BALLAST_COMM_TRANSPORT_H_
#define BALLAST_COMM_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"

namespace ballast {

// Non-blocking point-to-point messages between ranks: all that a backend has to give. Everything
// else (collectives, deadlines, epochs) is built on it once, in communicator.h.
//
// Messages between one pair of ranks under one tag arrive in the order they were posted.
// THREADS one thread per rank.
class Transport {
 public:
  using Handle = int32_t;  // of a posted message, from PostSend or PostRecv until Test says done

  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // The bytes must stay untouched until the handle is done. REQUIRES peer != rank().
  // ERRORS kUnavailable: the backend refused; the peer must be given up
  virtual absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) = 0;
  // Receives one message of at most bytes.size() bytes.
  virtual absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) = 0;

  // True once the message is through; the handle is then gone. `received` (may be null) gets the
  // length of a received message.
  // ERRORS kDataLoss: the message is longer than the room for it
  virtual absl::StatusOr<bool> Test(Handle handle, size_t* received) = 0;
};

// Keeps a buffer that a posted message may still touch until the process ends: never freed, never
// reused. THREADS any.
void KeepForGood(AlignedBuffer buffer);

// Ranks that are threads of one process.
class LocalFabric {
 public:
  explicit LocalFabric(int num_ranks);
  ~LocalFabric();
  // The transport of one rank. The fabric must outlive it.
  std::unique_ptr<Transport> MakeTransport(int rank);

 private:
  friend class LocalTransport;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_COMM_TRANSPORT_H_
