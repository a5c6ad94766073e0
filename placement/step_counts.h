// What one step counted, by kind of token.
#ifndef BALLAST_PLACEMENT_STEP_COUNTS_H_
#define BALLAST_PLACEMENT_STEP_COUNTS_H_

#include <array>
#include <cstdint>
#include <span>

namespace ballast {

// Why a token goes through the layers. The two kinds use other experts and come in other portions:
// a prompt brings thousands of tokens at once, generation one per sequence and step.
enum class TokenKind {
  kPrefill,  // of a sequence that lacks several
  kDecode,   // the one token that its sequence still lacks
};
inline constexpr int kNumTokenKinds = 2;
inline constexpr TokenKind kTokenKinds[] = {TokenKind::kPrefill, TokenKind::kDecode};

// A value per kind of token.
template <typename T>
struct PerKind : std::array<T, kNumTokenKinds> {
  T& operator[](TokenKind kind) { return this->data()[static_cast<size_t>(kind)]; }
  const T& operator[](TokenKind kind) const { return this->data()[static_cast<size_t>(kind)]; }
};

// Counts of one step, folded to logical experts under the epoch they were counted in.
struct StepCounts {
  // A step of one kind.
  static StepCounts Of(TokenKind kind, int64_t num_tokens, std::span<const int32_t> counts) {
    StepCounts step;
    step.num_tokens[kind] = num_tokens;
    step.counts[kind] = counts;
    return step;
  }

  PerKind<int64_t> num_tokens = {};
  // SHAPES [num_layers * E] copies over all ranks; may be empty where there is no token of the kind
  PerKind<std::span<const int32_t>> counts = {};
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_STEP_COUNTS_H_
