#ifndef BALLAST_RUNTIME_EXPERT_ARENA_H_
#define BALLAST_RUNTIME_EXPERT_ARENA_H_

#include <cstddef>
#include <cstdint>

namespace ballast {

// The blocks of experts in a rank's device memory.
struct ExpertArena {
  const std::byte* at = nullptr;
  size_t block_bytes = 0;
  int32_t num_blocks = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_EXPERT_ARENA_H_
