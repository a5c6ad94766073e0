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
  int32_t num_groups = 1;   // expert groups; 1: no limit
  int32_t top_groups = 1;   // groups that a token may use
  bool renormalise = true;  // divide the k scores by their sum
  float scale = 1.0f;       // of the gate weights
};

// Chooses experts for each token, by sigmoid scores.
//
//   score = sigmoid(logit)    choice = score + bias
//   a group's score is the sum of its two best choices; experts outside the best top_groups groups
//   cannot be chosen; the top_k largest choices win; weight = score / (sum + 1e-20) * scale
//
// A NaN logit has score 0 and choice -inf. A margin is what a bias must change before it changes
// the selection: the k-th choice minus the largest one left, the worst group taken minus the best
// one left; +inf where none is left.
// SHAPES logits [T, E] fp32; bias [E] fp32 or empty; ids, weights [T, K]; margin, group_margin [T]
//        or empty; histogram [2, E], overwritten: of the last num_prefill tokens, then of those
//        before them; workspace [2 E + 1] (CUDA only): zero before the first call, left zero
// ORDER  ids by choice, largest first; equal choices (also of groups) by the lower id; the sum in
//        the order of the ids
// ERRORS kInvalidArgument: CheckGate
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
  std::span<float> margin = {};
  std::span<float> group_margin = {};
  std::span<int32_t> workspace = {};
};

inline constexpr int32_t kMaxExperts = 2048;

// Whether the rule is one and the arrays fit it.
absl::Status CheckGate(const GateArgs& args);

namespace cpu {
absl::Status Gate(const GateArgs& args, Stream stream);
}
// The same bits. Pointers are to device memory. STREAM asynchronous, one launch.
// ERRORS also kInvalidArgument: more than kMaxTopK choices or kMaxGroups groups, a lane for each
namespace cuda {
inline constexpr int32_t kMaxTopK = 32;
inline constexpr int32_t kMaxGroups = 32;
absl::Status Gate(const GateArgs& args, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_GATE_H_
