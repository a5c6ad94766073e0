#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/random.h"

namespace ballast {

int32_t Sampler::Sample(std::span<const float> logits, const SamplingParams& params,
                        int64_t position) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (params.temperature == 0) return static_cast<int32_t>(largest - logits.begin());

  probability_.resize(logits.size());
  order_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    probability_[i] = std::exp((double{logits[i]} - double{*largest}) / params.temperature);
  }
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
    return probability_[a] > probability_[b];
  });
  double total = 0;
  for (int32_t id : order_) total += probability_[id];
  double kept = 0;
  size_t count = 0;
  while (count < order_.size() && (count == 0 || kept < params.top_p * total)) {
    kept += probability_[order_[count++]];
  }
  double left = RandomUniform(params.seed, static_cast<uint64_t>(position)) * kept;
  for (size_t i = 0; i + 1 < count; ++i) {
    left -= probability_[order_[i]];
    if (left < 0) return order_[i];
  }
  return order_[count - 1];
}

}  // namespace ballast
