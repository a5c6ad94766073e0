#ifndef BALLAST_KERNELS_GATE_H_
#define BALLAST_KERNELS_GATE_H_

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "kernels/stream.h"

namespace ballast {

// The model's routing rule.
struct GateRule {
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int32_t num_groups = 1;         // expert groups; 1: no limit
  int32_t top_groups = 1;         // groups that a token may use
  bool renormalise = true;        // divide the k scores by their sum
  float scale = 1.0f;             // of the gate weights
};

// Chooses experts for each token, by sigmoid scores.
//
//   score = sigmoid(logit)    choice = score + bias
//   a group's score is the sum of its two best choices; experts outside the best top_groups groups
//   cannot be chosen; the top_k largest choices win; weight = score / (sum + 1e-20) * scale
//
// A NaN logit has score 0 and choice -inf.
// SHAPES logits [T, E] fp32; bias [E] fp32 or empty; ids, weights [T, K]; histogram [2, E],
//        overwritten: of the last num_prefill tokens, then of those before them
// ORDER  ids by choice, largest first; equal choices (also of groups) by the lower id
// SOURCE DeepSeek-V3 report (arXiv 2412.19437) §2.1.2; selection-only bias: arXiv 2408.15664
struct GateArgs {
  GateRule rule;
  int32_t num_tokens = 0;
  int32_t num_prefill = 0;  // the last of these tokens, which are counted apart
  std::span<const float> logits;
  std::span<const float> bias;
  std::span<int32_t> ids;
  std::span<float> weights;
  std::span<int32_t> histogram;
};

namespace cpu {
absl::Status Gate(const GateArgs& args, Stream stream);
}

}  // namespace ballast

#endif  // BALLAST_KERNELS_GATE_H_
