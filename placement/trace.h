// What was recorded, turned into what the planners count: copies per logical expert.
#ifndef BALLAST_PLACEMENT_TRACE_H_
#define BALLAST_PLACEMENT_TRACE_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/npy.h"
#include "placement/step_counts.h"

namespace ballast {

// An array and the name that messages give it: its path.
struct NamedArray {
  std::string name;
  NpyArray array;
};

// Copies per step, layer and logical expert; the steps of a phase follow each other.
struct StepTrace {
  int32_t num_layers = 0;
  int32_t num_experts = 0;
  int64_t step_tokens = 0;             // tokens of each step, as the caller gave them
  int32_t top_k = 0;                   // of counts, where it is known: else 0
  int64_t dropped_tokens = 0;          // at the ends of the phases, less than a step each
  std::vector<int32_t> counts = {};    // [steps * layers * experts] of both kinds of token
  std::vector<int64_t> phase_offsets;  // [phases + 1] in steps
  std::vector<std::string> phase_names;
  // [steps * 2 * layers * experts] prefill, then decode; empty where all tokens count as one kind
  std::vector<int32_t> kind_counts = {};

  int64_t num_steps() const { return phase_offsets.empty() ? 0 : phase_offsets.back(); }
  // Tokens of a step: step_tokens, or, where top_k is known, what the counts of the layer with the
  // most copies say.
  int64_t tokens_of(int64_t index) const;
  // What the controller of a server would be given. Where top_k is not known the step's tokens
  // divide over the kinds as the copies of all layers do, at least one to each that has copies (so
  // a step of both kinds has two at the least).
  StepCounts counts_of(int64_t index) const;
  // [layers * experts]
  std::span<const int32_t> step(int64_t index) const;
  // [experts]
  std::span<const int32_t> layer(int64_t step_index, int32_t layer_index) const;

 private:
  int64_t TokensIn(std::span<const int32_t> of_layers) const;
};

struct TraceOptions {
  int64_t step_tokens = 1024;
  int32_t num_experts = 0;  // 0: as the arrays say (for ids: the largest id and one more)
  int32_t top_k = 0;        // experts of a token, for counts; 0: not known
};

// Counts one or more arrays, each a phase. An array of u8 or u16 holds ids, and is cut in steps of
// step_tokens; what is left at its end is dropped. An array of i32 or i64 holds counts already,
// with four dimensions those of prefill and decode.
//
// SHAPES  ids [tokens, layers, top-k] or [tokens, layers]
//         counts [steps, layers, experts] or [steps, 2, layers, experts]
// ERRORS  kInvalidArgument names the file and, where one number is wrong, its token (or step and
//         kind), layer and value, and what is allowed: ids in [0, E), counts in [0, 2^31), all
//         phases of one shape, at least one whole step in each
absl::StatusOr<StepTrace> CountSteps(std::span<const NamedArray> phases,
                                     const TraceOptions& options);

// Copies per layer and logical expert in a window.
struct LoadTable {
  int32_t num_layers = 0;
  int32_t num_experts = 0;
  std::vector<int64_t> load;  // [layers * experts]

  // [experts]
  std::span<const int64_t> layer(int32_t index) const;
};

// A load [layers, experts] of any type; a vector is one layer. Layers with fractions are scaled so
// that they add up to about 2^40 and then rounded: only ratios matter to a planner.
// ERRORS kInvalidArgument names the file, the layer, the expert and the value: NaN, infinite,
//        negative, a layer beyond 2^53; or a shape that is no load
absl::StatusOr<LoadTable> LoadFromArray(const NamedArray& array);

// The same from text: a line per layer, numbers separated by commas; a first line that begins with
// a letter is a heading. ERRORS as above, naming the line
absl::StatusOr<LoadTable> LoadFromCsv(const std::string& name, const std::string& text);
std::string LoadToCsv(const LoadTable& table);

// All steps of the trace together.
LoadTable TotalLoad(const StepTrace& trace);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_TRACE_H_
