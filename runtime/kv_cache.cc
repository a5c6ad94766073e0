#include "runtime/kv_cache.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {
namespace {

int64_t LayerBlockBytes(const ModelConfig& c, DType type) {
  return int64_t{c.num_kv_heads} * kKvBlockTokens * c.head_dim * static_cast<int64_t>(SizeOf(type));
}

}  // namespace

int64_t KvCache::BlockBytes(const ModelConfig& config, DType type) {
  return 2 * config.num_layers * LayerBlockBytes(config, type);
}

KvCache::KvCache(const ModelConfig& config, DType type, int64_t bytes)
    : type_(type),
      block_bytes_(BlockBytes(config, type)),
      num_blocks_(static_cast<int32_t>(std::min<int64_t>(bytes / block_bytes_, INT32_MAX))),
      layer_bytes_(static_cast<size_t>(num_blocks_ * LayerBlockBytes(config, type))),
      num_layers_(static_cast<size_t>(config.num_layers)) {
  for (int32_t b = num_blocks_ - 1; b >= 0; --b) free_.push_back(b);
}

absl::Status KvCache::Allocate(Memory* memory) {
  memory_.emplace(memory);
  return memory_->EnsureSize(2 * layer_bytes_ * num_layers_);
}

std::vector<int32_t> KvCache::Take(int32_t count) {
  BALLAST_CHECK(count <= free_blocks());
  std::vector<int32_t> blocks(free_.end() - count, free_.end());
  free_.resize(free_.size() - static_cast<size_t>(count));
  return blocks;
}

void KvCache::Give(const std::vector<int32_t>& blocks) {
  free_.insert(free_.end(), blocks.begin(), blocks.end());
}

KvLayerView KvCache::layer(int32_t i) const {
  std::byte* keys = memory_->data() + 2 * layer_bytes_ * static_cast<size_t>(i);
  return {type_, keys, keys + layer_bytes_};
}

}  // namespace ballast
