#ifndef BALLAST_COMM_COMMUNICATOR_H_
#define BALLAST_COMM_COMMUNICATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "comm/transport.h"

namespace ballast {

// Tags of the transport, one per purpose.
enum MessageTag : int { kTagCollective = 1, kTagMigration = 2 };

// Stands before every message of a collective. Both sides check it: a message of another epoch or
// of another collective is an error that names both, never wrong numbers.
struct MessageHeader {
  uint32_t magic = 0;
  uint32_t payload_bytes = 0;
  int64_t epoch = 0;      // of the placement under which the sender acts
  uint64_t sequence = 0;  // counts the collectives of the communicator
};

// Collectives over all ranks, built from point-to-point messages, each with a deadline.
//
// After an error the communicator is dead: every further call returns kUnavailable, and buffers of
// messages that are still posted are kept for the life of the process.
// COLLECTIVE all ranks make the same calls in the same order.
// THREADS one.
class Communicator {
 public:
  struct Options {
    int64_t deadline_ms = 60'000;  // of every wait
    // Asked now and then during a wait; an error ends the wait with it. Empty: never.
    std::function<absl::Status()> interrupted = {};
  };
  Communicator(Transport* transport, Options options);
  ~Communicator();

  int rank() const { return transport_->rank(); }
  int size() const { return transport_->size(); }
  int64_t deadline_ms() const { return options_.deadline_ms; }

  // Every rank's `mine` to everyone, in rank order.
  // SHAPES all [size() * mine.size()]
  // ERRORS kDeadlineExceeded names the ranks that did not answer; kInternal: another epoch or
  //        sequence number, with both values and the rank; what `interrupted` says
  absl::Status AllGather(int64_t epoch, std::span<const std::byte> mine, std::span<std::byte> all);

  // A variable exchange in two phases, so that work fits between them:
  //   (SendBuffer* Post Wait Received*)*
  // Pairs of ranks that exchange nothing send no message.
  class Exchange {
   public:
    explicit Exchange(Communicator* communicator);
    ~Exchange();

    // Room for a payload of `bytes` to `peer`, 64-byte aligned; written before Post.
    std::span<std::byte> SendBuffer(int peer, size_t bytes);
    // Starts the exchange. `send_bytes[p]`: length of the payload to p, at most what SendBuffer
    // gave. `recv_capacity[p]`: most that p may send. A zero on one side must be a zero on the
    // other.
    absl::Status Post(int64_t epoch, std::span<const size_t> send_bytes,
                      std::span<const size_t> recv_capacity);
    // ERRORS as AllGather
    absl::Status Wait();
    // The payload from `peer`, until the next SendBuffer or Post. A rank's own payload is not
    // copied.
    std::span<const std::byte> Received(int peer) const { return received_[peer]; }

   private:
    friend class Communicator;
    // Gives up the buffers that posted messages may still touch.
    void Abandon();
    absl::Status LookAround(int64_t deadline);
    struct Pending {
      int peer;
      bool is_recv;
      Transport::Handle handle;
    };
    Communicator* communicator_;
    std::vector<AlignedBuffer> send_, recv_;  // per peer; 64 bytes of header room, then the payload
    std::vector<std::span<const std::byte>> received_;
    std::vector<Pending> pending_;
    int64_t epoch_ = 0;
    uint64_t sequence_ = 0;
  };

  // For waits that are not for messages: what `interrupted` says. ERRORS those, and then all calls'
  absl::Status LookAround();
  // Likewise: this rank has waited for `peer` in vain.
  void Miss(int peer) { missing_.push_back(peer); }
  // Likewise: so long it was, and took so much of a processor.
  void CountWait(int64_t ns, int64_t cpu_ns) {
    wait_ns_ += ns;
    wait_cpu_ns_ += cpu_ns;
  }
  // Ranks that the last wait missed when its deadline passed.
  const std::vector<int>& missing() const { return missing_; }
  // Time, and CPU time, that this rank has spent in Wait and AllGather since the start.
  int64_t wait_ns() const { return wait_ns_; }
  int64_t wait_cpu_ns() const { return wait_cpu_ns_; }

 private:
  absl::Status Fail(absl::Status status);

  Transport* transport_;
  Options options_;
  absl::Status dead_;  // OK while alive
  std::vector<int> missing_;
  uint64_t sequence_ = 0;
  int64_t wait_ns_ = 0;
  int64_t wait_cpu_ns_ = 0;
  std::unique_ptr<Exchange> gather_;
  std::vector<size_t> gather_bytes_;
};

}  // namespace ballast

#endif  // BALLAST_COMM_COMMUNICATOR_H_
