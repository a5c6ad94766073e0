#include "placement/esft.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr int64_t kMostId = 65535;
constexpr double kWeightScale = 10000.0;
constexpr double kMostWeight = 6.5;  // scaled, it fits 16 bits

// One layer: ids and weights of all tokens, and where each sample ends.
struct Layer {
  std::vector<int64_t> ids;
  std::vector<int64_t> weights;
  std::vector<size_t> sample_ends;
};

absl::Status Wrong(const NamedText& file, int64_t line, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(file.name, ": line ", line, " ", what));
}

absl::Status ReadLine(const NamedText& file, int64_t number, absl::string_view line, int32_t top_k,
                      Layer* layer) {
  const std::vector<absl::string_view> halves = absl::StrSplit(line, "\t\t");
  if (halves.size() != 2) {
    return Wrong(file, number, "has no ids and weights with an empty column between them");
  }
  const size_t before = layer->ids.size();
  for (absl::string_view field : absl::StrSplit(halves[0], '\t')) {
    int64_t id = -1;
    if (!absl::SimpleAtoi(field, &id) || id < 0 || id > kMostId) {
      return Wrong(file, number,
                   absl::StrCat("token ", (layer->ids.size() - before) / top_k, " has expert '",
                                field.substr(0, 40), "', allowed: 0 to ", kMostId));
    }
    layer->ids.push_back(id);
  }
  for (absl::string_view field : absl::StrSplit(halves[1], '\t')) {
    double weight = -1.0;
    if (!absl::SimpleAtod(field, &weight) || !(weight >= 0.0 && weight <= kMostWeight)) {
      return Wrong(file, number,
                   absl::StrCat("token ", (layer->weights.size() - before) / top_k, " has weight '",
                                field.substr(0, 40), "', allowed: 0 to ", kMostWeight));
    }
    layer->weights.push_back(std::llround(weight * kWeightScale));
  }
  if (layer->ids.size() != layer->weights.size() || (layer->ids.size() - before) % top_k != 0) {
    return Wrong(file, number,
                 absl::StrCat("has ", layer->ids.size() - before, " ids and ",
                              layer->weights.size() - before,
                              " weights, allowed: as many of both, a multiple of top-k ", top_k));
  }
  layer->sample_ends.push_back(layer->ids.size());
  return absl::OkStatus();
}

absl::StatusOr<Layer> ReadLayer(const NamedText& file, int32_t top_k) {
  Layer layer;
  int64_t number = 0;
  for (absl::string_view line : absl::StrSplit(file.text, '\n')) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (!line.empty()) {
      BALLAST_RETURN_IF_ERROR(ReadLine(file, number, line, top_k, &layer));
    }
  }
  if (layer.ids.empty()) return Wrong(file, number, "ends the file without a sample");
  return layer;
}

}  // namespace

absl::StatusOr<EsftArrays> ParseEsft(std::span<const NamedText> layers, int32_t top_k) {
  if (layers.empty() || top_k < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(layers.size(), " layers of top-", top_k, ", allowed: at least one of both"));
  }
  std::vector<Layer> read;
  for (const NamedText& file : layers) {
    BALLAST_ASSIGN_OR_RETURN(Layer layer, ReadLayer(file, top_k));
    read.push_back(std::move(layer));
    if (read.back().sample_ends == read[0].sample_ends) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        file.name, ": ", read.back().sample_ends.size(), " samples of ",
        read.back().ids.size() / top_k, " tokens; ", layers[0].name, " has ",
        read[0].sample_ends.size(), " of ", read[0].ids.size() / top_k, " or cuts them elsewhere"));
  }
  std::vector<int64_t> ids, weights;
  const size_t num_tokens = read[0].ids.size() / top_k;
  for (size_t token = 0; token < num_tokens; ++token) {
    for (const Layer& layer : read) {
      const ptrdiff_t first = static_cast<ptrdiff_t>(token) * top_k;
      ids.insert(ids.end(), layer.ids.begin() + first, layer.ids.begin() + first + top_k);
      weights.insert(weights.end(), layer.weights.begin() + first,
                     layer.weights.begin() + first + top_k);
    }
  }
  const std::vector<int64_t> shape = {static_cast<int64_t>(num_tokens),
                                      static_cast<int64_t>(layers.size()), top_k};
  const bool wide = *std::max_element(ids.begin(), ids.end()) > 255;
  return EsftArrays{.ids = MakeNpyArray(wide ? NpyType::kU16 : NpyType::kU8, shape, ids),
                    .weights = MakeNpyArray(NpyType::kU16, shape, weights)};
}

}  // namespace ballast
