// The device memory that the emulator lends.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/cuda_shim/emulator.h"
#include "tests/support/cuda_shim/guarded.h"

namespace cuda_shim {
namespace {

std::vector<std::unique_ptr<Guarded>>& DeviceBlocks() {
  static std::vector<std::unique_ptr<Guarded>> blocks;
  return blocks;
}

std::map<const void*, std::unique_ptr<Guarded>>& PinnedBlocks() {
  static std::map<const void*, std::unique_ptr<Guarded>> blocks;
  return blocks;
}

bool Holds(const Guarded& block, const void* at) {
  const auto* byte = static_cast<const std::byte*>(at);
  return byte >= block.data() && byte < block.data() + block.size();
}

// Bytes of the blocks of other processes, by where they are here.
std::map<void*, size_t>& OpenedBlocks() {
  static std::map<void*, size_t> blocks;
  return blocks;
}

}  // namespace

std::byte* AllocateDevice(size_t bytes) {
  DeviceBlocks().push_back(std::make_unique<Guarded>(bytes, Noise(), /*shareable=*/true));
  return DeviceBlocks().back()->data();
}

bool FreeDevice(void* block) {
  auto& blocks = DeviceBlocks();
  const auto it =
      std::find_if(blocks.begin(), blocks.end(), [&](const auto& b) { return b->data() == block; });
  if (it == blocks.end()) return false;
  const bool intact = (*it)->IntactGuards();
  blocks.erase(it);
  return intact;
}

size_t DeviceBytes() {
  size_t bytes = 0;
  for (const auto& block : DeviceBlocks()) bytes += block->size();
  return bytes;
}

bool CheckDeviceBlocks() {
  for (const auto& block : DeviceBlocks()) {
    if (block->IntactGuards()) continue;
    std::fprintf(stderr, "cuda_shim: a write outside of a block of %zu bytes\n", block->size());
    return false;
  }
  return true;
}

std::byte* AllocatePinned(size_t bytes) {
  auto block = std::make_unique<Guarded>(bytes, Noise());
  std::byte* const data = block->data();
  PinnedBlocks()[data] = std::move(block);
  return data;
}

bool FreePinned(void* block) {
  const auto it = PinnedBlocks().find(block);
  if (it == PinnedBlocks().end()) return false;
  const bool intact = it->second->IntactGuards();
  PinnedBlocks().erase(it);
  return intact;
}

bool IsReadLate(const void* from) {
  for (const auto& block : DeviceBlocks()) {
    if (Holds(*block, from)) return true;
  }
  for (const auto& [data, block] : PinnedBlocks()) {
    if (Holds(*block, from)) return true;
  }
  for (const auto& [data, bytes] : OpenedBlocks()) {
    const auto* byte = static_cast<const std::byte*>(from);
    if (byte >= data && byte < static_cast<const std::byte*>(data) + bytes) return true;
  }
  return false;
}

bool ExportDevice(void* block, SharedBlock* shared) {
  for (const auto& b : DeviceBlocks()) {
    if (b->data() != block) continue;
    *shared = {getpid(), b->file(), b->whole_size()};
    return true;
  }
  return false;
}

std::byte* OpenDevice(const SharedBlock& shared) {
  if (shared.process == getpid()) return nullptr;  // as CUDA has it
  const std::string path =
      "/proc/" + std::to_string(shared.process) + "/fd/" + std::to_string(shared.file);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  void* whole = mmap(nullptr, shared.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (whole == MAP_FAILED) return nullptr;
  std::byte* data = static_cast<std::byte*>(whole) + Guarded::kAlignment;
  OpenedBlocks()[data] = shared.bytes;
  return data;
}

bool CloseDevice(void* opened) {
  const auto it = OpenedBlocks().find(opened);
  if (it == OpenedBlocks().end()) return false;
  munmap(static_cast<std::byte*>(opened) - Guarded::kAlignment, it->second);
  OpenedBlocks().erase(it);
  return true;
}

}  // namespace cuda_shim
