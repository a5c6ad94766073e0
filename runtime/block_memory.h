// Where the blocks of packed experts lie, and how bytes get into them and out.
#ifndef BALLAST_RUNTIME_BLOCK_MEMORY_H_
#define BALLAST_RUNTIME_BLOCK_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "kernels/memory.h"

namespace ballast {

// The blocks of one rank, each of one packed expert: in the host's memory (HostBlocks) or a
// device's (DeviceBlocks). Who holds which expert, and what is believed, is ExpertStore's matter.
//
// What a ticket is given for may still be under way when the call returns; it never waits. All of
// it happens in the order in which it was started. So what was started for a block that nobody
// believes any more need not be waited for: whatever comes into the block later is later.
// THREADS one (the step thread).
class BlockMemory {
 public:
  using Ticket = int64_t;
  static constexpr Ticket kDone = 0;  // of what was done at once

  explicit BlockMemory(size_t block_bytes) : block_bytes_(block_bytes) {}
  virtual ~BlockMemory() = default;

  size_t block_bytes() const { return block_bytes_; }
  virtual int32_t num_blocks() const = 0;
  // An address of the memory that they lie in.
  virtual std::byte* Address(int32_t block) const = 0;
  virtual size_t memory_bytes() const = 0;  // of all blocks
  // More blocks, numbered after those there are. It may allocate, copy all there is and wait.
  // REQUIRES no step runs and, if the blocks are a device's, nothing uses their addresses
  // ERRORS kResourceExhausted
  virtual absl::Status AddBlocks(int32_t count) = 0;

  // Where the next content of a block is laid out by hand: one block at a time.
  virtual std::span<std::byte> FillRoom(int32_t block) = 0;
  // Brings it into the block. Waits. Returns the checksum of what lies in the block then.
  virtual absl::StatusOr<uint64_t> Fill(int32_t block) = 0;

  // Room for another thread to lay out what is to be written into the block: the block itself where
  // that can be. Empty: none is free now.
  virtual std::span<std::byte> TakeRoom(int32_t block) = 0;
  virtual void ReturnRoom(std::span<std::byte> room) = 0;

  // Messages that pieces come from and go to, and their headers, lie in memory of this.
  virtual Memory& messages() = 0;
  // No more can be started now.
  virtual bool IsFull() = 0;
  // Starts to copy a piece out of a block. REQUIRES !IsFull(), offset a multiple of 16, as below
  virtual absl::StatusOr<Ticket> Read(int32_t block, size_t offset, std::span<std::byte> to) = 0;
  // Starts to copy a piece into a block, from a message or a room. A block is written from its
  // begin to its end, without gaps.
  virtual absl::StatusOr<Ticket> Write(int32_t block, size_t offset,
                                       std::span<const std::byte> from) = 0;
  // Write from the same place of a block of another rank, at an address that it need not send.
  struct PeerBlock {
    int peer = 0;
    int32_t block = 0;
  };
  virtual absl::StatusOr<Ticket> Fetch(int32_t block, size_t offset, size_t bytes,
                                       PeerBlock from) = 0;
  // Whether the peer can Fetch what lies here.
  virtual bool IsOpenTo(int peer) const = 0;
  // Who the peers were counts no more: nobody can fetch from here, until they are told anew.
  virtual void ForgetPeers() = 0;
  // ERRORS what was under way has failed; nothing of it counts
  virtual absl::StatusOr<bool> IsDone(Ticket ticket) = 0;
  // The BlockChecksum of what Write and Fetch brought, as it lies in the block: of each piece when
  // it had come, or of all when the last one had. REQUIRES the block has been written to its end,
  // and all of that is done
  virtual uint64_t Written(int32_t block) const = 0;

  // A block whose checksum is taken, a part at a time.
  struct Reading {
    int32_t block = -1;
    size_t offset = 0;  // up to where reading has been started
    uint64_t checksum = 0;
    Ticket ticket = kDone;
  };
  // Starts to read on, or finds out that it is done. True: `checksum` is that of what lies in the
  // block. Takes no longer than a part of 64 KiB in the host's memory. REQUIRES !IsFull()
  virtual absl::StatusOr<bool> Advance(Reading* reading) = 0;

  // Until all that was started is done.
  virtual absl::Status Wait() = 0;

 private:
  const size_t block_bytes_;
};

// In the host's memory; whatever is started is done at once.
class HostBlocks : public BlockMemory {
 public:
  explicit HostBlocks(size_t block_bytes) : BlockMemory(block_bytes) {}

  int32_t num_blocks() const override { return static_cast<int32_t>(blocks_.size()); }
  std::byte* Address(int32_t block) const override { return blocks_[block]; }
  size_t memory_bytes() const override;
  absl::Status AddBlocks(int32_t count) override;
  std::span<std::byte> FillRoom(int32_t block) override { return Block(block); }
  absl::StatusOr<uint64_t> Fill(int32_t block) override;
  std::span<std::byte> TakeRoom(int32_t block) override { return Block(block); }
  void ReturnRoom(std::span<std::byte>) override {}
  Memory& messages() override { return HostMemory(); }
  bool IsFull() override { return false; }
  absl::StatusOr<Ticket> Read(int32_t block, size_t offset, std::span<std::byte> to) override;
  absl::StatusOr<Ticket> Write(int32_t block, size_t offset,
                               std::span<const std::byte> from) override;
  absl::StatusOr<Ticket> Fetch(int32_t, size_t, size_t, PeerBlock) override;
  bool IsOpenTo(int) const override { return false; }
  void ForgetPeers() override {}
  absl::StatusOr<bool> IsDone(Ticket) override { return true; }
  uint64_t Written(int32_t block) const override { return written_[block]; }
  absl::StatusOr<bool> Advance(Reading* reading) override;
  absl::Status Wait() override { return absl::OkStatus(); }

 private:
  std::span<std::byte> Block(int32_t block) const { return {blocks_[block], block_bytes()}; }

  std::vector<AlignedBuffer> memory_;
  std::vector<std::byte*> blocks_;  // in memory_
  std::vector<uint64_t> written_;   // per block
};

// Keeps a buffer that a posted message may still touch, as KeepForGood of comm/transport.h does.
void KeepForGood(Buffer buffer);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_BLOCK_MEMORY_H_
