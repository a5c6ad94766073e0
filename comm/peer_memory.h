#ifndef BALLAST_COMM_PEER_MEMORY_H_
#define BALLAST_COMM_PEER_MEMORY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace ballast {

// What another process needs to open a block of device memory.
using MemoryHandle = std::array<std::byte, 64>;

// Device memory that processes of one machine can lend each other.
// THREADS one, with the rank's device current.
class SharedDeviceMemory {
 public:
  virtual ~SharedDeviceMemory() = default;
  // Zeroed. ERRORS kResourceExhausted
  virtual absl::StatusOr<std::byte*> Allocate(size_t bytes) = 0;
  // Waits for what runs on the device.
  virtual absl::Status Free(std::byte* block) = 0;
  virtual absl::StatusOr<MemoryHandle> Export(std::byte* block) = 0;
  // A block of another process, at an address of this one. ERRORS kUnavailable: these devices do
  // not reach each other
  virtual absl::StatusOr<std::byte*> Open(const MemoryHandle& handle) = 0;
  virtual absl::Status Close(std::byte* opened) = 0;
};
// CUDA's, by its handles for other processes; only where CUDA is built in.
std::unique_ptr<SharedDeviceMemory> MakeCudaMemory();

// One block of device memory per rank, which all ranks can address: the arenas of the exchange
// (kernels/exchange.h) where all ranks are processes of one machine.
//
// A rank that ends without Close keeps its block until its process ends: others may still write
// there.
class PeerMemory {
 public:
  // ERRORS the same on all ranks, with the number of the rank that failed: kInvalidArgument: sizes
  //        that differ, ranks on several machines; those of SharedDeviceMemory
  // COLLECTIVE all ranks of `world`; `epoch` as in AllGather
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Create(
      std::unique_ptr<SharedDeviceMemory> memory, Communicator* world, int64_t epoch, size_t bytes);

  size_t bytes() const { return bytes_; }
  // SHAPES [R]: the block of each rank, at this process' address for it
  const std::vector<std::byte*>& blocks() const { return blocks_; }

  // Gives all blocks back. REQUIRES nothing on any device uses them any more
  // ERRORS as Create. COLLECTIVE all ranks
  absl::Status Close(Communicator* world, int64_t epoch);

 private:
  PeerMemory(std::unique_ptr<SharedDeviceMemory> memory, int rank, size_t bytes)
      : memory_(std::move(memory)), rank_(rank), bytes_(bytes) {}
  absl::Status OpenAll(const std::vector<std::byte>& offers, int num_ranks);
  absl::Status CloseOpened();
  absl::Status FreeOwn();

  std::unique_ptr<SharedDeviceMemory> memory_;
  int rank_;
  size_t bytes_;
  std::vector<std::byte*> blocks_;  // null: not opened, or closed
};

}  // namespace ballast

#endif  // BALLAST_COMM_PEER_MEMORY_H_
