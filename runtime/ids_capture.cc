#include "runtime/ids_capture.h"

#include <numeric>

#include "base/check.h"

namespace ballast {

IdsCapture::IdsCapture(int32_t rank, int32_t num_layers, int32_t top_k, int32_t id_bytes)
    : rank_(rank), num_layers_(num_layers), top_k_(top_k), id_bytes_(id_bytes) {}

void IdsCapture::Begin(uint32_t recording, std::span<const int32_t> rank_tokens) {
  RoutingFrame& out = routing();
  const int64_t begin = recording == out.recording ? out.step_end : 0;
  out.recording = recording;
  if (recording == 0) return;
  const auto own = rank_tokens.begin() + rank_;
  out.step_begin = begin;
  out.first = std::accumulate(rank_tokens.begin(), own, begin);
  out.step_end = std::accumulate(own, rank_tokens.end(), out.first);
  out.ids.resize(static_cast<size_t>(*own) * num_layers_ * top_k_ * id_bytes_);
  layer_ = 0;
}

void IdsCapture::TakeLayer(std::span<const int32_t> ids) {
  std::vector<std::byte>& out = routing().ids;
  BALLAST_CHECK(layer_ < num_layers_ && ids.size() * num_layers_ * id_bytes_ == out.size());
  const size_t stride = static_cast<size_t>(num_layers_) * top_k_ * id_bytes_;
  std::byte* row = out.data() + static_cast<size_t>(layer_) * top_k_ * id_bytes_;
  for (size_t t = 0; t < ids.size() / top_k_; ++t, row += stride) {
    for (int32_t k = 0; k < top_k_; ++k) {
      const uint32_t id = static_cast<uint32_t>(ids[t * top_k_ + k]);
      row[k * id_bytes_] = static_cast<std::byte>(id & 0xff);
      if (id_bytes_ == 2) row[k * 2 + 1] = static_cast<std::byte>(id >> 8);
    }
  }
  ++layer_;
}

}  // namespace ballast
