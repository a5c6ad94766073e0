#include "comm/peer_memory.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "base/hash.h"
#include "base/status.h"
#include "comm/agreement.h"

namespace ballast {
namespace {

// The running kernel's own number, which containers of one machine share; else the host's name.
uint64_t MachineNumber() {
  std::string name;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), name);
  if (name.empty()) {
    char host[256] = {};
    gethostname(host, sizeof host - 1);
    name = host;
  }
  return Hash64(std::as_bytes(std::span(name.data(), name.size()))) >> 1;  // a positive number
}

}  // namespace

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Create(
    std::unique_ptr<SharedDeviceMemory> memory, Communicator* world, int64_t epoch, size_t bytes) {
  std::unique_ptr<PeerMemory> peers(new PeerMemory(std::move(memory), world->rank(), bytes));
  peers->blocks_.resize(static_cast<size_t>(world->size()));
  MemoryHandle handle = {};
  const auto offer = [&]() -> absl::Status {
    BALLAST_ASSIGN_OR_RETURN(peers->blocks_[peers->rank_], peers->memory_->Allocate(bytes));
    BALLAST_ASSIGN_OR_RETURN(handle, peers->memory_->Export(peers->blocks_[peers->rank_]));
    return absl::OkStatus();
  };
  const AgreedValue values[] = {
      {"the size of shared device memory", static_cast<int64_t>(bytes)},
      {"the machine of ranks that share device memory", static_cast<int64_t>(MachineNumber())}};
  const auto offers = Agree(world, epoch, offer(), values, handle);
  absl::Status opened = offers.status();
  // All are told of one that cannot open a block, before any of them uses one.
  if (offers.ok()) {
    opened = Agree(world, epoch, peers->OpenAll(*offers, world->size()), {}, {}).status();
  }
  if (opened.ok()) return peers;
  // Where not even this is heard by all, another rank may have the block open: then it is kept.
  peers->Close(world, epoch).IgnoreError();
  return opened;
}

absl::Status PeerMemory::OpenAll(const std::vector<std::byte>& offers, int num_ranks) {
  for (int r = 0; r < num_ranks; ++r) {
    if (r == rank_) continue;  // a process cannot open a handle of its own
    MemoryHandle handle;
    std::memcpy(handle.data(), offers.data() + static_cast<size_t>(r) * handle.size(),
                handle.size());
    const auto block = memory_->Open(handle);
    if (!block.ok()) {
      return absl::Status(block.status().code(),
                          absl::StrCat("the device memory of rank ", r, ": ",
                                       std::string(block.status().message())));
    }
    blocks_[r] = *block;
  }
  return absl::OkStatus();
}

absl::Status PeerMemory::CloseOpened() {
  absl::Status first;
  for (size_t r = 0; r < blocks_.size(); ++r) {
    if (static_cast<int>(r) == rank_ || blocks_[r] == nullptr) continue;
    first.Update(memory_->Close(std::exchange(blocks_[r], nullptr)));
  }
  return first;
}

absl::Status PeerMemory::FreeOwn() {
  std::byte* own = std::exchange(blocks_[rank_], nullptr);
  return own == nullptr ? absl::OkStatus() : memory_->Free(own);
}

absl::Status PeerMemory::Close(Communicator* world, int64_t epoch) {
  // A block may go when nobody has it open any more.
  BALLAST_RETURN_IF_ERROR(Agree(world, epoch, CloseOpened(), {}, {}).status());
  return FreeOwn();
}

}  // namespace ballast
