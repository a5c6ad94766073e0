#ifndef BALLAST_RUNTIME_SAMPLER_H_
#define BALLAST_RUNTIME_SAMPLER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/generation.h"

namespace ballast {

// Draws tokens. The token depends on the logits, the parameters and (seed, position) alone.
class Sampler {
 public:
  // `position` is that of the token to be drawn, counted from the start of the prompt.
  //   temperature 0: the largest logit
  //   else: softmax(logits / temperature), cut to the fewest most probable tokens that reach top_p
  // ORDER  ties to the lower id; sums in fp64 in descending order of probability
  int32_t Sample(std::span<const float> logits, const SamplingParams& params, int64_t position);

 private:
  std::vector<double> probability_;
  std::vector<int32_t> order_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_SAMPLER_H_
