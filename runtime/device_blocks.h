// The blocks of packed experts in a device's memory. Built where CUDA is, or the emulator of the
// tests.
#ifndef BALLAST_RUNTIME_DEVICE_BLOCKS_H_
#define BALLAST_RUNTIME_DEVICE_BLOCKS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device_memory.h"
#include "kernels/memory.h"
#include "runtime/block_memory.h"

namespace ballast {

// One arena that a rank's device computes from: block b is at arena() + b * stride().
//
// All of it goes over a side stream of its own, of the lowest priority: a step's stream waits for
// none of it. Pieces come from and go to pinned memory of the host, or straight from the arena of
// another rank (SetPeers). Checksums are the device's, of a whole block as it lies there when its
// last piece has come, by few thread blocks. Once made, nothing but AddBlocks, SetPeers, Fill and
// Wait allocates, frees or waits, so nothing takes a lock of the driver for long: memory is there,
// kernels are loaded, and every kind of copy has been made once.
//
// Who brings a block into use again after a flip sees to it that no kernel reads it by the tables
// from before: the side stream waits for the streams of steps no more than they for it.
// THREADS one (the step thread), with the rank's device current (cuda::UseDevice); a room that was
// taken is any thread's, which then needs no device.
class DeviceBlocks : public BlockMemory {
 public:
  struct Options {
    size_t block_bytes = 0;  // of one packed expert
    int32_t num_blocks = 0;  // at least 1
    // Where they are to lie, for instance what PeerMemory has of this rank, which is zeroed and
    // outlives this; empty: in memory of its own. What does not hold num_blocks is not taken.
    std::span<std::byte> arena = {};
    int32_t rooms = 2;                   // for reads: one that hangs keeps its room
    int32_t checksum_thread_blocks = 4;  // how much of the device a checksum may take
  };
  // ERRORS kResourceExhausted: there is not so much memory; kInvalidArgument: the arena is too
  //        small or not aligned; kInternal
  static absl::StatusOr<std::unique_ptr<DeviceBlocks>> Create(const Options& options);
  ~DeviceBlocks() override;

  static constexpr size_t kAlignment = 256;  // of blocks
  static constexpr size_t StrideOf(size_t block_bytes) { return RoundUp(block_bytes, kAlignment); }

  // All of these may change when blocks are added, and only then.
  std::byte* arena() const { return arena_; }
  size_t stride() const { return StrideOf(block_bytes()); }
  int32_t num_blocks() const override { return num_blocks_; }

  // Until ForgetPeers the blocks of other ranks lie at `arenas`, at this process' addresses, in
  // arenas of the same stride, and those ranks know this arena's address too. Waits. SHAPES
  // [ranks], null: not to be reached, as this rank itself REQUIRES no plan is staged. ERRORS
  // kInternal: one cannot be read
  absl::Status SetPeers(std::vector<const std::byte*> arenas);

  std::byte* Address(int32_t block) const override {
    return arena_ + static_cast<size_t>(block) * stride();
  }
  // The arena, and two words for each block. On top come the rooms, in pinned memory.
  size_t memory_bytes() const override;
  // Where the arena has no room for them: a larger one is made, all blocks are copied to it, and
  // peers cannot fetch from it before the next SetPeers; meanwhile both are there.
  absl::Status AddBlocks(int32_t count) override;
  std::span<std::byte> FillRoom(int32_t block) override;
  absl::StatusOr<uint64_t> Fill(int32_t block) override;
  std::span<std::byte> TakeRoom(int32_t block) override;
  void ReturnRoom(std::span<std::byte> room) override;
  Memory& messages() override { return cuda::PinnedMemory(); }
  bool IsFull() override;
  absl::StatusOr<Ticket> Read(int32_t block, size_t offset, std::span<std::byte> to) override;
  absl::StatusOr<Ticket> Write(int32_t block, size_t offset,
                               std::span<const std::byte> from) override;
  absl::StatusOr<Ticket> Fetch(int32_t block, size_t offset, size_t bytes, PeerBlock from) override;
  bool IsOpenTo(int peer) const override;
  void ForgetPeers() override { peers_.clear(); }
  absl::StatusOr<bool> IsDone(Ticket ticket) override;
  uint64_t Written(int32_t block) const override { return told_.as<uint64_t>()[block]; }
  absl::StatusOr<bool> Advance(Reading* reading) override;
  absl::Status Wait() override;

 private:
  DeviceBlocks(const Options& options, cuda::OwnedStream side);
  absl::Status Make();
  absl::Status TryAll();
  absl::StatusOr<Ticket> BringIn(int32_t block, size_t offset, const std::byte* from, size_t bytes);
  absl::Status TakeSum(int32_t block, int32_t word);
  absl::StatusOr<Ticket> Mark();
  absl::Status LookAround();
  std::span<std::byte> Room(int32_t room) const;

  Options options_;
  cuda::OwnedStream side_;
  Buffer own_arena_;
  std::byte* arena_ = nullptr;
  int32_t num_blocks_ = 0, capacity_ = 0;
  Buffer sums_, told_;  // [2 * capacity_] on the device and as the host was told: of what was
                        // written to each block, then of readings
  Buffer empty_sum_;    // pinned: what a sum begins with
  Buffer scratch_;      // on the device: what copies to try it go to
  Buffer rooms_;        // pinned: options_.rooms, then the one for Fill
  std::vector<int32_t> free_rooms_;
  std::vector<cuda::Event> marks_;  // of tickets, round and round
  Ticket started_ = kDone, ended_ = kDone;
  std::vector<const std::byte*> peers_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DEVICE_BLOCKS_H_
