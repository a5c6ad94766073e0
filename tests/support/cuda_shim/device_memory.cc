// The device memory that the emulator lends.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "tests/support/cuda_shim/emulator.h"
#include "tests/support/cuda_shim/guarded.h"

namespace cuda_shim {
namespace {

std::vector<std::unique_ptr<Guarded>>& DeviceBlocks() {
  static std::vector<std::unique_ptr<Guarded>> blocks;
  return blocks;
}

}  // namespace

std::byte* AllocateDevice(size_t bytes) {
  DeviceBlocks().push_back(std::make_unique<Guarded>(bytes, Noise()));
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

bool CheckDeviceBlocks() {
  for (const auto& block : DeviceBlocks()) {
    if (block->IntactGuards()) continue;
    std::fprintf(stderr, "cuda_shim: a write outside of a block of %zu bytes\n", block->size());
    return false;
  }
  return true;
}

}  // namespace cuda_shim
