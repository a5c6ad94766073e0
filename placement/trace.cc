#include "placement/trace.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr int64_t kMostCopies = int64_t{std::numeric_limits<int32_t>::max()};
constexpr int64_t kMostExperts = 1 << 16;
constexpr int64_t kMostCounts = int64_t{1} << 31;  // a trace of 8 GiB
constexpr int64_t kMostLayers = 1 << 16;
constexpr double kMostLoad = 0x1p53;         // the largest double of which all smaller integers are
constexpr double kScaledLayerLoad = 0x1p40;  // what a layer with fractions adds up to

bool HoldsIds(const NpyArray& array) {
  return array.type == NpyType::kU8 || array.type == NpyType::kU16;
}

// What every phase must share, from its type and shape.
struct Shape {
  bool ids;
  int64_t length, layers, width;  // width: top-k, or experts
  int64_t kinds;                  // of token that are told apart

  // Beside the length, which each phase has of its own.
  bool GoesWith(const Shape& other) const {
    return ids == other.ids && layers == other.layers && width == other.width &&
           kinds == other.kinds;
  }
};

absl::StatusOr<Shape> ShapeOf(const NamedArray& phase) {
  const std::vector<int64_t>& shape = phase.array.shape;
  const auto reject = [&](const char* allowed) {
    return absl::InvalidArgumentError(absl::StrCat(phase.name, ": ", ShapeText(shape), " of ",
                                                   NameOf(phase.array.type),
                                                   ", allowed: ", allowed));
  };
  if (!phase.array.is_integer()) return reject("ids of u8 or u16, or counts of i32 or i64");
  const bool ids = HoldsIds(phase.array);
  if (ids && shape.size() != 2 && shape.size() != 3) {
    return reject("[tokens, layers, top-k] or [tokens, layers]");
  }
  const bool by_kind = !ids && shape.size() == 4 && shape[1] == kNumTokenKinds;
  if (!ids && shape.size() != 3 && !by_kind) {
    return reject("[steps, layers, experts] or [steps, 2, layers, experts] (prefill, decode)");
  }
  const Shape result{.ids = ids,
                     .length = shape[0],
                     .layers = shape[by_kind ? 2 : 1],
                     .width = shape.size() == 2 ? 1 : shape.back(),
                     .kinds = by_kind ? kNumTokenKinds : 1};
  if (result.layers < 1 || result.layers > kMostLayers || result.width < 1 ||
      result.width > kMostExperts) {
    return reject("1 to 65536 layers, and as many ids or experts");
  }
  return result;
}

// Adds the ids of whole steps to the counts.
absl::Status CountIds(const NamedArray& phase, const Shape& shape, StepTrace* trace) {
  const int64_t num_steps = shape.length / trace->step_tokens;
  const size_t before = trace->counts.size();
  const size_t step_size = static_cast<size_t>(trace->num_layers) * trace->num_experts;
  trace->counts.resize(before + static_cast<size_t>(num_steps) * step_size, 0);
  int64_t at = 0;
  for (int64_t token = 0; token < shape.length; ++token) {
    const int64_t step = token / trace->step_tokens;
    for (int64_t layer = 0; layer < shape.layers; ++layer) {
      for (int64_t k = 0; k < shape.width; ++k) {
        const int64_t id = phase.array.IntegerAt(at++);
        if (id >= trace->num_experts) {
          return absl::InvalidArgumentError(
              absl::StrCat(phase.name, ": token ", token, " layer ", layer, " has expert ", id,
                           ", allowed: 0 to ", trace->num_experts - 1));
        }
        if (step >= num_steps) continue;  // dropped, but checked
        ++trace->counts[before + static_cast<size_t>(step) * step_size +
                        static_cast<size_t>(layer) * trace->num_experts + id];
      }
    }
  }
  trace->dropped_tokens += shape.length - num_steps * trace->step_tokens;
  return absl::OkStatus();
}

absl::Status CopyCounts(const NamedArray& phase, const Shape& shape, StepTrace* trace) {
  const int64_t step_size = shape.layers * shape.width;
  std::vector<int64_t> totals(static_cast<size_t>(shape.layers));  // of a step
  const bool apart = shape.kinds > 1;
  size_t sum_at = trace->counts.size(), kind_at = trace->kind_counts.size();
  trace->counts.resize(sum_at + static_cast<size_t>(shape.length * step_size), 0);
  if (apart) trace->kind_counts.resize(kind_at + static_cast<size_t>(shape.length * 2 * step_size));
  int64_t at = 0;
  for (int64_t step = 0; step < shape.length; ++step, sum_at += static_cast<size_t>(step_size)) {
    std::fill(totals.begin(), totals.end(), 0);
    for (int64_t kind = 0; kind < shape.kinds; ++kind) {
      size_t to = sum_at;
      for (int64_t layer = 0; layer < shape.layers; ++layer) {
        for (int64_t e = 0; e < shape.width; ++e) {
          const int64_t count = phase.array.IntegerAt(at++);
          if (count < 0 || count > kMostCopies - totals[layer]) {
            return absl::InvalidArgumentError(
                absl::StrCat(phase.name, ": step ", step,
                             !apart      ? ""
                             : kind == 0 ? " prefill"
                                         : " decode",
                             " layer ", layer, " expert ", e, " has count ", count,
                             ", allowed: 0 and more, less than 2^31 in all of a layer and step"));
          }
          totals[layer] += count;
          trace->counts[to++] += static_cast<int32_t>(count);
          if (apart) trace->kind_counts[kind_at++] = static_cast<int32_t>(count);
        }
      }
    }
  }
  return absl::OkStatus();
}

// The number of experts: as asked for, or as the arrays say.
absl::StatusOr<int32_t> ExpertsOf(std::span<const NamedArray> phases, const Shape& first,
                                  int32_t asked) {
  if (!first.ids) {
    if (asked != 0 && asked != first.width) {
      return absl::InvalidArgumentError(absl::StrCat(phases[0].name, ": counts of ", first.width,
                                                     " experts, but ", asked, " were asked for"));
    }
    return static_cast<int32_t>(first.width);
  }
  if (asked > 0) return asked;
  int64_t largest = 0;
  for (const NamedArray& phase : phases) {
    const int64_t size = phase.array.num_elements();
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, phase.array.IntegerAt(i));
  }
  return static_cast<int32_t>(largest + 1);
}

absl::Status RejectLoad(const std::string& name, int64_t layer, int64_t expert, double value) {
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": layer ", layer, " expert ", expert, " has load ", value,
                   ", allowed: numbers from 0, together at most 2^53 in a layer"));
}

// Checks the numbers of one layer and appends them as whole copies.
absl::Status AppendLayer(const std::string& name, std::span<const double> values,
                         LoadTable* table) {
  double total = 0.0;
  bool whole = true;
  for (size_t e = 0; e < values.size(); ++e) {
    total += values[e];
    if (!(values[e] >= 0.0 && total <= kMostLoad)) {
      return RejectLoad(name, table->num_layers, static_cast<int64_t>(e), values[e]);
    }
    whole = whole && values[e] == std::floor(values[e]);
  }
  for (double value : values) {
    table->load.push_back(std::llround(whole ? value : value / total * kScaledLayerLoad));
  }
  ++table->num_layers;
  return absl::OkStatus();
}

}  // namespace

std::span<const int32_t> StepTrace::step(int64_t index) const {
  const size_t size = static_cast<size_t>(num_layers) * num_experts;
  return std::span(counts).subspan(static_cast<size_t>(index) * size, size);
}

std::span<const int32_t> StepTrace::layer(int64_t step_index, int32_t layer_index) const {
  return step(step_index).subspan(static_cast<size_t>(layer_index) * num_experts, num_experts);
}

int64_t StepTrace::TokensIn(std::span<const int32_t> of_layers) const {
  int64_t most = 0;
  for (size_t at = 0; at < of_layers.size(); at += static_cast<size_t>(num_experts)) {
    const auto layer = of_layers.subspan(at, static_cast<size_t>(num_experts));
    most = std::max(most, std::accumulate(layer.begin(), layer.end(), int64_t{0}));
  }
  return most / top_k;
}

int64_t StepTrace::tokens_of(int64_t index) const {
  return top_k == 0 ? step_tokens : TokensIn(step(index));
}

StepCounts StepTrace::counts_of(int64_t index) const {
  if (kind_counts.empty())
    return StepCounts::Of(TokenKind::kPrefill, tokens_of(index), step(index));
  const size_t size = static_cast<size_t>(num_layers) * num_experts;
  StepCounts result;
  PerKind<int64_t> copies = {};  // of all layers
  for (TokenKind kind : kTokenKinds) {
    const size_t at = static_cast<size_t>(index) * kNumTokenKinds + static_cast<size_t>(kind);
    result.counts[kind] = std::span(kind_counts).subspan(at * size, size);
    copies[kind] =
        std::accumulate(result.counts[kind].begin(), result.counts[kind].end(), int64_t{0});
    if (top_k > 0) result.num_tokens[kind] = TokensIn(result.counts[kind]);
  }
  if (top_k > 0) return result;
  int64_t& prefill = result.num_tokens[TokenKind::kPrefill];
  int64_t& decode = result.num_tokens[TokenKind::kDecode];
  const int64_t of_prefill = copies[TokenKind::kPrefill], of_decode = copies[TokenKind::kDecode];
  if (of_prefill == 0 || of_decode == 0) {
    prefill = of_prefill > 0 ? step_tokens : 0;
    decode = of_decode > 0 ? step_tokens : 0;
    return result;
  }
  const double share =
      static_cast<double>(of_prefill) / static_cast<double>(of_prefill + of_decode);
  prefill = std::clamp<int64_t>(std::llround(static_cast<double>(step_tokens) * share), 1,
                                std::max<int64_t>(1, step_tokens - 1));
  decode = std::max<int64_t>(1, step_tokens - prefill);
  return result;
}

absl::StatusOr<StepTrace> CountSteps(std::span<const NamedArray> phases,
                                     const TraceOptions& options) {
  if (phases.empty()) return absl::InvalidArgumentError("a trace needs at least one file");
  if (options.step_tokens < 1 || options.num_experts < 0 || options.num_experts > kMostExperts) {
    return absl::InvalidArgumentError(
        absl::StrCat("step_tokens is ", options.step_tokens, " and experts is ",
                     options.num_experts, ", allowed: at least 1, and 0 to ", kMostExperts));
  }
  BALLAST_ASSIGN_OR_RETURN(const Shape first, ShapeOf(phases[0]));
  StepTrace trace;
  trace.num_layers = static_cast<int32_t>(first.layers);
  trace.step_tokens = options.step_tokens;
  if (!first.ids) trace.top_k = options.top_k;
  trace.phase_offsets.push_back(0);
  BALLAST_ASSIGN_OR_RETURN(trace.num_experts, ExpertsOf(phases, first, options.num_experts));
  for (const NamedArray& phase : phases) {
    BALLAST_ASSIGN_OR_RETURN(const Shape shape, ShapeOf(phase));
    if (!shape.GoesWith(first)) {
      return absl::InvalidArgumentError(
          absl::StrCat(phase.name, ": ", ShapeText(phase.array.shape), " of ",
                       NameOf(phase.array.type), " does not go with ", phases[0].name, ": ",
                       ShapeText(phases[0].array.shape), " of ", NameOf(phases[0].array.type)));
    }
    const int64_t num_steps = shape.ids ? shape.length / options.step_tokens : shape.length;
    if (num_steps == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(phase.name, ": ", shape.length, shape.ids ? " tokens" : " steps",
                       " make no step of ", options.step_tokens, " tokens"));
    }
    const int64_t sums_and_kinds = shape.kinds == 1 ? 1 : 1 + shape.kinds;
    const int64_t step_size = int64_t{trace.num_layers} * trace.num_experts * sums_and_kinds;
    if (num_steps > kMostCounts / step_size - trace.num_steps()) {
      return absl::InvalidArgumentError(
          absl::StrCat(phase.name, ": ", num_steps, " steps (after ", trace.num_steps(), ") of ",
                       trace.num_layers, " layers and ", trace.num_experts, " experts",
                       shape.kinds == 1 ? "" : " for each kind and for both",
                       ", allowed: ", kMostCounts, " counts in all; larger steps have fewer"));
    }
    BALLAST_RETURN_IF_ERROR(shape.ids ? CountIds(phase, shape, &trace)
                                      : CopyCounts(phase, shape, &trace));
    trace.phase_offsets.push_back(trace.phase_offsets.back() + num_steps);
    trace.phase_names.push_back(phase.name);
  }
  return trace;
}

std::span<const int64_t> LoadTable::layer(int32_t index) const {
  return std::span(load).subspan(static_cast<size_t>(index) * num_experts, num_experts);
}

absl::StatusOr<LoadTable> LoadFromArray(const NamedArray& array) {
  const std::vector<int64_t>& shape = array.array.shape;
  const int64_t layers = shape.size() == 2 ? shape[0] : 1;
  const int64_t experts = shape.empty() ? 0 : shape.back();
  if (shape.empty() || shape.size() > 2 || layers < 1 || layers > kMostLayers || experts < 1 ||
      experts > kMostExperts) {
    return absl::InvalidArgumentError(
        absl::StrCat(array.name, ": a load of shape ", ShapeText(shape),
                     ", allowed: [layers, experts] or [experts] with 1 to 65536 of each"));
  }
  LoadTable table;
  table.num_experts = static_cast<int32_t>(experts);
  std::vector<double> values(static_cast<size_t>(experts));
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (int64_t e = 0; e < experts; ++e) values[e] = array.array.NumberAt(layer * experts + e);
    BALLAST_RETURN_IF_ERROR(AppendLayer(array.name, values, &table));
  }
  return table;
}

absl::StatusOr<LoadTable> LoadFromCsv(const std::string& name, const std::string& text) {
  LoadTable table;
  int64_t number = 0;
  std::vector<double> values;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty()) continue;
    if (number == 1 && std::isalpha(static_cast<unsigned char>(line[0])) != 0) continue;
    values.clear();
    for (absl::string_view field : absl::StrSplit(line, ',')) {
      double value = 0.0;
      if (!absl::SimpleAtod(field, &value)) {
        return absl::InvalidArgumentError(
            absl::StrCat(name, ": line ", number, " field ", values.size() + 1, " is '",
                         field.substr(0, 40), "', allowed: a number"));
      }
      values.push_back(value);
    }
    if (table.num_layers == 0) table.num_experts = static_cast<int32_t>(values.size());
    if (static_cast<int32_t>(values.size()) != table.num_experts) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": line ", number, " has ",
                                                     values.size(), " numbers; the first has ",
                                                     table.num_experts));
    }
    BALLAST_RETURN_IF_ERROR(AppendLayer(name, values, &table));
  }
  if (table.num_layers == 0) return absl::InvalidArgumentError(absl::StrCat(name, ": no numbers"));
  return table;
}

std::string LoadToCsv(const LoadTable& table) {
  std::string text;
  for (int32_t layer = 0; layer < table.num_layers; ++layer) {
    const std::span<const int64_t> load = table.layer(layer);
    for (size_t e = 0; e < load.size(); ++e) absl::StrAppend(&text, e > 0 ? "," : "", load[e]);
    text += '\n';
  }
  return text;
}

LoadTable TotalLoad(const StepTrace& trace) {
  LoadTable table{.num_layers = trace.num_layers, .num_experts = trace.num_experts, .load = {}};
  table.load.assign(static_cast<size_t>(trace.num_layers) * trace.num_experts, 0);
  for (int64_t t = 0; t < trace.num_steps(); ++t) {
    const std::span<const int32_t> counts = trace.step(t);
    for (size_t i = 0; i < counts.size(); ++i) table.load[i] += counts[i];
  }
  return table;
}

}  // namespace ballast
