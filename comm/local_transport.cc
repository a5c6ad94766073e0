#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>

#include "base/check.h"
#include "comm/transport.h"

namespace ballast {
namespace {

// A posted message. Owned by the rank that posted it; the partner touches it only under the
// mailbox mutex and before it sets `done`.
struct Posted {
  int peer = 0;
  int tag = 0;
  std::byte* bytes = nullptr;
  size_t size = 0;
  size_t received = 0;
  bool truncated = false;
  std::atomic<bool> done{true};
};

// What waits to be matched on the way from one rank to another.
struct Lane {
  std::mutex mutex;
  std::deque<Posted*> sends;  // guarded by mutex
  std::deque<Posted*> recvs;  // guarded by mutex
};

// Takes the first entry with the tag out of the queue, or gives nullptr.
Posted* TakeMatching(std::deque<Posted*>& queue, int tag) {
  for (auto it = queue.begin(); it != queue.end(); ++it) {
    if ((*it)->tag != tag) continue;
    Posted* found = *it;
    queue.erase(it);
    return found;
  }
  return nullptr;
}

void Deliver(Posted& send, Posted& recv) {
  recv.truncated = send.size > recv.size;
  recv.received = recv.truncated ? 0 : send.size;
  if (recv.received > 0) std::memcpy(recv.bytes, send.bytes, send.size);
  send.done.store(true, std::memory_order_release);
  recv.done.store(true, std::memory_order_release);
}

}  // namespace

struct LocalFabric::State {
  explicit State(int n) : num_ranks(n), lanes(static_cast<size_t>(n) * n) {}
  Lane& lane(int from, int to) { return lanes[static_cast<size_t>(from) * num_ranks + to]; }
  int num_ranks;
  std::vector<Lane> lanes;
};

class LocalTransport : public Transport {
 public:
  LocalTransport(LocalFabric::State* fabric, int rank) : fabric_(fabric), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return fabric_->num_ranks; }

  absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) override {
    Posted& mine = Allocate(peer, tag);
    mine.bytes = const_cast<std::byte*>(bytes.data());  // only read by Deliver
    mine.size = bytes.size();
    Lane& lane = fabric_->lane(rank_, peer);
    std::lock_guard lock(lane.mutex);
    if (Posted* recv = TakeMatching(lane.recvs, tag)) {
      Deliver(mine, *recv);
    } else {
      lane.sends.push_back(&mine);
    }
    return last_;
  }

  absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) override {
    Posted& mine = Allocate(peer, tag);
    mine.bytes = bytes.data();
    mine.size = bytes.size();
    Lane& lane = fabric_->lane(peer, rank_);
    std::lock_guard lock(lane.mutex);
    if (Posted* send = TakeMatching(lane.sends, tag)) {
      Deliver(*send, mine);
    } else {
      lane.recvs.push_back(&mine);
    }
    return last_;
  }

  absl::StatusOr<bool> Test(Handle handle, size_t* received) override {
    Posted& mine = posted_[handle];
    if (!mine.done.load(std::memory_order_acquire)) return false;
    free_.push_back(handle);
    if (mine.truncated) {
      return absl::DataLossError("a message was longer than the room for it");
    }
    if (received != nullptr) *received = mine.received;
    return true;
  }

 private:
  Posted& Allocate(int peer, int tag) {
    BALLAST_CHECK(peer != rank_ && peer >= 0 && peer < size());
    if (free_.empty()) {
      free_.push_back(static_cast<Handle>(posted_.size()));
      posted_.emplace_back();
    }
    last_ = free_.back();
    free_.pop_back();
    Posted& mine = posted_[last_];
    mine.peer = peer;
    mine.tag = tag;
    mine.received = 0;
    mine.truncated = false;
    mine.done.store(false, std::memory_order_relaxed);
    return mine;
  }

  LocalFabric::State* fabric_;
  int rank_;
  std::deque<Posted> posted_;  // addresses are stable
  std::vector<Handle> free_;
  Handle last_ = -1;
};

LocalFabric::LocalFabric(int num_ranks) : state_(std::make_unique<State>(num_ranks)) {}
LocalFabric::~LocalFabric() = default;

std::unique_ptr<Transport> LocalFabric::MakeTransport(int rank) {
  return std::make_unique<LocalTransport>(state_.get(), rank);
}

}  // namespace ballast
