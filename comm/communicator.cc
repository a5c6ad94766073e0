#include "comm/communicator.h"

#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"
#include "comm/relax.h"

namespace ballast {
namespace {

constexpr uint32_t kMagic = 0x4c4c4142;  // "BALL"
// The header has a cache line to itself, so that payloads are aligned on both sides.
constexpr size_t kHeaderRoom = kCacheLineBytes;
static_assert(sizeof(MessageHeader) <= kHeaderRoom);

}  // namespace

void KeepForGood(AlignedBuffer buffer) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<AlignedBuffer>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(buffer));
}

Communicator::Communicator(Transport* transport, Options options)
    : transport_(transport), options_(std::move(options)) {
  gather_ = std::make_unique<Exchange>(this);
  gather_bytes_.resize(static_cast<size_t>(size()));
}

Communicator::~Communicator() = default;

absl::Status Communicator::Fail(absl::Status status) {
  if (dead_.ok()) {
    dead_ = absl::UnavailableError(
        absl::StrCat("the communicator has failed before: ", std::string(status.message())));
  }
  return status;
}

absl::Status Communicator::LookAround() {
  if (!dead_.ok()) return dead_;
  const absl::Status interrupted = options_.interrupted ? options_.interrupted() : absl::OkStatus();
  return interrupted.ok() ? interrupted : Fail(interrupted);
}

absl::Status Communicator::AllGather(int64_t epoch, std::span<const std::byte> mine,
                                     std::span<std::byte> all) {
  if (!dead_.ok()) return dead_;
  const size_t bytes = mine.size();
  BALLAST_CHECK(all.size() == bytes * static_cast<size_t>(size()));
  for (int peer = 0; peer < size(); ++peer) {
    gather_bytes_[static_cast<size_t>(peer)] = bytes;
    std::memcpy(gather_->SendBuffer(peer, bytes).data(), mine.data(), bytes);
  }
  BALLAST_RETURN_IF_ERROR(gather_->Post(epoch, gather_bytes_, gather_bytes_));
  BALLAST_RETURN_IF_ERROR(gather_->Wait());
  for (int peer = 0; peer < size(); ++peer) {
    const auto from = gather_->Received(peer);
    if (from.size() != bytes) {
      return Fail(absl::InternalError(absl::StrCat("all-gather: rank ", peer, " sent ", from.size(),
                                                   " bytes, rank ", rank(), " expected ", bytes)));
    }
    std::memcpy(all.data() + static_cast<size_t>(peer) * bytes, from.data(), bytes);
  }
  return absl::OkStatus();
}

Communicator::Exchange::Exchange(Communicator* communicator)
    : communicator_(communicator),
      send_(static_cast<size_t>(communicator->size())),
      recv_(static_cast<size_t>(communicator->size())),
      received_(static_cast<size_t>(communicator->size())) {}

Communicator::Exchange::~Exchange() {
  Abandon();
}

void Communicator::Exchange::Abandon() {
  for (const Pending& pending : pending_) {
    auto& buffers = pending.is_recv ? recv_ : send_;
    KeepForGood(std::move(buffers[static_cast<size_t>(pending.peer)]));
  }
  pending_.clear();
}

std::span<std::byte> Communicator::Exchange::SendBuffer(int peer, size_t bytes) {
  if (!communicator_->dead_.ok()) Abandon();
  AlignedBuffer& buffer = send_[static_cast<size_t>(peer)];
  buffer.EnsureSize(kHeaderRoom + bytes);
  return {buffer.data() + kHeaderRoom, bytes};
}

absl::Status Communicator::Exchange::Post(int64_t epoch, std::span<const size_t> send_bytes,
                                          std::span<const size_t> recv_capacity) {
  Communicator& comm = *communicator_;
  if (!comm.dead_.ok()) return comm.dead_;
  BALLAST_CHECK(pending_.empty());
  epoch_ = epoch;
  sequence_ = ++comm.sequence_;
  const int self = comm.rank();
  for (int peer = 0; peer < comm.size(); ++peer) {
    const size_t p = static_cast<size_t>(peer);
    received_[p] = {};
    if (peer == self || recv_capacity[p] == 0) continue;
    recv_[p].EnsureSize(kHeaderRoom + recv_capacity[p]);
    auto handle = comm.transport_->PostRecv(peer, kTagCollective,
                                            {recv_[p].data(), kHeaderRoom + recv_capacity[p]});
    if (!handle.ok()) return comm.Fail(handle.status());
    pending_.push_back({peer, true, *handle});
  }
  // Peers above this rank first: the ranks do not all start with rank 0.
  for (int i = 1; i <= comm.size(); ++i) {
    const int peer = (self + i) % comm.size();
    const size_t p = static_cast<size_t>(peer);
    if (send_bytes[p] == 0) continue;
    if (peer == self) {
      received_[p] = {send_[p].data() + kHeaderRoom, send_bytes[p]};
      continue;
    }
    const MessageHeader header{kMagic, static_cast<uint32_t>(send_bytes[p]), epoch, sequence_};
    std::memcpy(send_[p].data(), &header, sizeof header);
    auto handle = comm.transport_->PostSend(peer, kTagCollective,
                                            {send_[p].data(), kHeaderRoom + send_bytes[p]});
    if (!handle.ok()) return comm.Fail(handle.status());
    pending_.push_back({peer, false, *handle});
  }
  return absl::OkStatus();
}

// Whether to go on waiting.
absl::Status Communicator::Exchange::LookAround(int64_t deadline) {
  Communicator& comm = *communicator_;
  BALLAST_RETURN_IF_ERROR(comm.LookAround());
  if (NowNs() <= deadline) return absl::OkStatus();
  std::string missing;
  for (const Pending& pending : pending_) {
    absl::StrAppend(&missing, missing.empty() ? "" : ", ", pending.is_recv ? "from " : "to ",
                    pending.peer);
    comm.missing_.push_back(pending.peer);
  }
  return comm.Fail(absl::DeadlineExceededError(
      absl::StrCat("rank ", comm.rank(), " waited ", comm.options_.deadline_ms, " ms in exchange ",
                   sequence_, "; messages missing: ", missing)));
}

absl::Status Communicator::Exchange::Wait() {
  Communicator& comm = *communicator_;
  if (!comm.dead_.ok()) return comm.dead_;
  const int64_t begin = NowNs(), cpu_begin = ThreadCpuNs();
  const int64_t deadline = begin + comm.options_.deadline_ms * 1'000'000;
  for (int polls = 0; !pending_.empty(); ++polls) {
    for (size_t i = 0; i < pending_.size();) {
      const Pending pending = pending_[i];
      size_t received = 0;
      auto done = comm.transport_->Test(pending.handle, &received);
      if (!done.ok()) {
        return comm.Fail(absl::Status(
            done.status().code(),
            absl::StrCat("rank ", comm.rank(), " at epoch ", epoch_, ", exchange ", sequence_,
                         ", message ", pending.is_recv ? "from" : "to", " rank ", pending.peer,
                         ": ", std::string(done.status().message()))));
      }
      if (!*done) {
        ++i;
        continue;
      }
      pending_[i] = pending_.back();
      pending_.pop_back();
      if (!pending.is_recv) continue;
      const size_t p = static_cast<size_t>(pending.peer);
      MessageHeader header;
      std::memcpy(&header, recv_[p].data(), sizeof header);
      if (received < kHeaderRoom || header.magic != kMagic || header.sequence != sequence_ ||
          header.epoch != epoch_ || header.payload_bytes + kHeaderRoom != received) {
        return comm.Fail(absl::InternalError(
            absl::StrCat("rank ", comm.rank(), " at epoch ", epoch_, ", exchange ", sequence_,
                         " got a message of ", received, " bytes from rank ", pending.peer,
                         " at epoch ", header.epoch, ", exchange ", header.sequence)));
      }
      received_[p] = {recv_[p].data() + kHeaderRoom, header.payload_bytes};
    }
    if (pending_.empty()) break;
    if (polls % kPollsPerLook == kPollsPerLook - 1) BALLAST_RETURN_IF_ERROR(LookAround(deadline));
    Relax(polls);
  }
  comm.wait_ns_ += NowNs() - begin;
  comm.wait_cpu_ns_ += ThreadCpuNs() - cpu_begin;
  return absl::OkStatus();
}

}  // namespace ballast
