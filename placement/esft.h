#ifndef BALLAST_PLACEMENT_ESFT_H_
#define BALLAST_PLACEMENT_ESFT_H_

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "base/npy.h"

namespace ballast {

// The text of one layer, and the name that messages give it.
struct NamedText {
  std::string name;
  std::string text;
};

struct EsftArrays {
  NpyArray ids;      // u8 (u16 where an id needs it) [tokens, layers, top-k]
  NpyArray weights;  // u16 [tokens, layers, top-k] gate weight * 10,000, rounded
};

// Reads the routing that ESFT publishes: one text per layer, one line per sample. A line has the
// expert ids of its tokens one after another (top-k for each), an empty column, and as many gate
// weights, all separated by tabs. Samples follow each other in the result.
//
// ERRORS kInvalidArgument names the file, the line and what is wrong: ids without weights, a number
//        of ids that top_k does not divide, a field that is no id or no weight in [0, 6.5], layers
//        with different samples
// SOURCE github.com/deepseek-ai/ESFT, results/expert_scores, commit 579a7711
absl::StatusOr<EsftArrays> ParseEsft(std::span<const NamedText> layers, int32_t top_k);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_ESFT_H_
