// How the chunks of ExpertStore travel; its own matter.
#ifndef BALLAST_RUNTIME_EXPERT_FLOW_H_
#define BALLAST_RUNTIME_EXPERT_FLOW_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/expert_store.h"

namespace ballast {

// Stands before every chunk.
struct ExpertStore::ChunkHeader {
  static constexpr uint32_t kMagic = 0x4b4e4843;  // "CHNK"

  uint32_t magic;
  int32_t layer;
  int64_t plan_id;
  int64_t base_epoch;
  int32_t expert;
  uint32_t bytes;
  uint64_t offset;
  uint64_t block_checksum;  // of the whole expert, from the source's table
  int32_t fetch_block;      // of the source, to fetch the chunk from; kNoBlock: it is behind this
};

// The experts that go to or come from one peer, in plan order, and the one chunk under way. It goes
//   out:  copied out of its block into the message, then posted
//   in:   posted, then copied out of the message, or the peer's block, into its block
struct ExpertStore::Flow {
  explicit Flow(Memory* messages) : buffer(messages) {}

  int peer = 0;
  struct Item {
    int32_t layer, expert;
    int32_t staged;  // which of staged_, or -1: resident
  };
  std::vector<Item> items;
  size_t next = 0;    // item of the chunk under way, or of the next one
  size_t offset = 0;  // of that chunk
  bool posted = false;
  Transport::Handle handle = 0;
  BlockMemory::Ticket copying = kNothing;
  Buffer buffer;  // header in its own cache line, then the chunk

  bool done() const { return next == items.size() && !posted && copying == kNothing; }
  std::byte* chunk() const { return buffer.data() + kCacheLineBytes; }
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_EXPERT_FLOW_H_
