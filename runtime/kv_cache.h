#ifndef BALLAST_RUNTIME_KV_CACHE_H_
#define BALLAST_RUNTIME_KV_CACHE_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "kernels/decoder_ops.h"
#include "kernels/memory.h"
#include "runtime/model_config.h"

namespace ballast {

// The keys and values of all sequences of one rank, in blocks of kKvBlockTokens tokens over all
// layers. Zeroed at start, so that reading a block before it is full meets numbers.
class KvCache {
 public:
  // Counts blocks from then on; they have memory after Allocate.
  KvCache(const ModelConfig& config, DType type, int64_t bytes);
  // ERRORS kResourceExhausted
  absl::Status Allocate(Memory* memory);

  // Bytes of one block over all layers.
  static int64_t BlockBytes(const ModelConfig& config, DType type);

  int32_t num_blocks() const { return num_blocks_; }
  int32_t free_blocks() const { return static_cast<int32_t>(free_.size()); }
  size_t memory_bytes() const { return memory_.has_value() ? memory_->size() : 0; }
  int64_t bytes_used() const { return (num_blocks_ - free_blocks()) * block_bytes_; }

  // Takes `count` blocks. REQUIRES count <= free_blocks().
  std::vector<int32_t> Take(int32_t count);
  void Give(const std::vector<int32_t>& blocks);

  // REQUIRES Allocate
  KvLayerView layer(int32_t i) const;

 private:
  DType type_;
  int64_t block_bytes_;
  int32_t num_blocks_;
  size_t layer_bytes_;  // keys of one layer; values take as much
  size_t num_layers_;
  std::optional<Buffer> memory_;
  std::vector<int32_t> free_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_KV_CACHE_H_
