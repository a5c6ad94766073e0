// What the emulator knows of the threads, blocks and grids that are under way.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_STATE_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_STATE_H_

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "tests/support/cuda_shim/cuda_runtime.h"
#include "tests/support/cuda_shim/emulator.h"
#include "tests/support/cuda_shim/fiber.h"
#include "tests/support/cuda_shim/guarded.h"

namespace cuda_shim {

struct LateStore {
  void* to;
  std::byte bytes[16];
  size_t count;
};

inline void Apply(std::vector<LateStore>* stores) {
  for (const LateStore& store : *stores) std::memcpy(store.to, store.bytes, store.count);
  stores->clear();
}
inline void Append(std::vector<LateStore>* from, std::vector<LateStore>* to) {
  to->insert(to->end(), from->begin(), from->end());
  from->clear();
}

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index = {};
  unsigned number = 0;              // in the block
  bool starved = false;             // goes on when no other can
  const char* waits_for = nullptr;  // or null
  const void* sleeps_on = nullptr;  // or null
  uint64_t value = 0, argument = 0, result = 0;
  std::vector<LateStore> late;  // that only this thread's fence makes seen
};

// Lanes that wait for the others of their mask.
struct Meeting {
  const WarpOp* op;
  uint32_t mask, arrived;
};

struct Grid {
  Launch launch;
  std::vector<unsigned> to_start;  // blocks, the next one last
  unsigned running = 0;
  unsigned victim_block = ~0u, victim_thread = 0;  // that is starved, if any
  std::vector<LateStore> late;  // of blocks that are done: seen at the end of the grid
};

struct Block {
  Block(Grid* owner, unsigned number, uint64_t noise)
      : grid(owner), shared(owner->launch.shared_bytes, noise) {
    const Shape& shape = owner->launch.grid;
    index = {number % shape.x, number / shape.x % shape.y, number / (shape.x * shape.y)};
  }
  Grid* grid;
  uint3 index;
  Guarded shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<Meeting>> meetings;  // per warp
  unsigned alive = 0, at_barrier = 0;
  bool any = false;             // of those at the barrier
  std::vector<LateStore> late;  // stored before a barrier: any fence of the block makes them seen
  int under_way = 0;            // asynchronous work
  std::shared_ptr<void> state;  // of whatever else has some per block
};

struct Asynchronous {
  Block* block;
  std::function<void()> work;
};

}  // namespace cuda_shim

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_STATE_H_
