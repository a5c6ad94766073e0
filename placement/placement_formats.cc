#include "placement/placement_formats.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

using Json = nlohmann::ordered_json;

// What a file says: per layer and rank the experts, in slot order.
using Ranks = std::vector<std::vector<int32_t>>;
// Per layer all slots, where the file does not tell ranks apart.
using Rows = std::vector<std::vector<int32_t>>;

constexpr int32_t kMostExperts = 1 << 16;
constexpr size_t kMostLayers = 1 << 16;
constexpr size_t kMostEntries = 1 << 28;  // of a placement; a short file can ask for more

constexpr std::pair<PlacementFormat, const char*> kFormats[] = {
    {PlacementFormat::kNative, "native"}, {PlacementFormat::kEplb, "eplb"},
    {PlacementFormat::kSglang, "sglang"}, {PlacementFormat::kTrtllm, "trtllm"},
    {PlacementFormat::kAscend, "ascend"}, {PlacementFormat::kCsv, "csv"}};

absl::Status Wrong(const std::string& message) {
  return absl::InvalidArgumentError(message);
}

std::vector<int32_t> RowOf(const Placement& placement, int32_t layer) {
  const std::span<const int32_t> row = placement.expert_of_slot(layer);
  return {row.begin(), row.end()};
}

// The experts of one rank, without its empty slots.
std::vector<int32_t> ExpertsOn(const Placement& placement, int32_t layer, int32_t rank) {
  const Topology& topology = placement.topology();
  std::vector<int32_t> experts;
  for (int32_t s = topology.slot_offsets[rank]; s < topology.slot_offsets[rank + 1]; ++s) {
    const int32_t e = placement.expert_of_slot(layer)[s];
    if (e != kNoExpert) experts.push_back(e);
  }
  return experts;
}

absl::Status CheckFull(const Placement& placement) {
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const std::vector<int32_t> row = RowOf(placement, layer);
    const auto empty = std::find(row.begin(), row.end(), kNoExpert);
    if (empty == row.end()) continue;
    return Wrong(absl::StrCat("layer ", layer, " slot ", empty - row.begin(),
                              " is empty, which this format cannot say"));
  }
  return absl::OkStatus();
}

std::string ExportEplb(const Placement& placement) {
  Json json = {{"phy2log", Json::array()}, {"log2phy", Json::array()}, {"logcnt", Json::array()}};
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const std::vector<int32_t> row = RowOf(placement, layer);
    std::vector<std::vector<int32_t>> slots(placement.num_experts());
    size_t most = 0;
    for (size_t s = 0; s < row.size(); ++s) {
      slots[row[s]].push_back(static_cast<int32_t>(s));
      most = std::max(most, slots[row[s]].size());
    }
    std::vector<size_t> counts;
    for (std::vector<int32_t>& of_expert : slots) {
      counts.push_back(of_expert.size());
      of_expert.resize(most, kNoSlot);
    }
    json["phy2log"].push_back(row);
    json["log2phy"].push_back(slots);
    json["logcnt"].push_back(counts);
  }
  return json.dump() + "\n";
}

std::string ExportSglang(const Placement& placement) {
  Json rows = Json::array();
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    rows.push_back(RowOf(placement, layer));
  }
  return Json{{"physical_to_logical_map", rows}}.dump() + "\n";
}

std::string ExportTrtllm(const Placement& placement, int32_t first_layer) {
  std::string yaml = absl::StrCat("num_slots: ", placement.topology().num_slots(),
                                  "\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n");
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    absl::StrAppend(&yaml, "  ", first_layer + layer, ": [",
                    absl::StrJoin(RowOf(placement, layer), ", "), "]\n");
  }
  return yaml;
}

std::string ExportAscend(const Placement& placement) {
  Json layers = Json::array();
  const int32_t num_ranks = placement.topology().num_ranks();
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    Json devices = Json::array();
    for (int32_t r = 0; r < num_ranks; ++r) {
      devices.push_back({{"device_id", r}, {"device_expert", ExpertsOn(placement, layer, r)}});
    }
    layers.push_back({{"layer_id", layer}, {"device_count", num_ranks}, {"device_list", devices}});
  }
  return Json{{"moe_layer_count", placement.num_layers()}, {"layer_list", layers}}.dump() + "\n";
}

std::string ExportCsv(const Placement& placement) {
  std::string text = "layer,rank,experts\n";
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    for (int32_t r = 0; r < placement.topology().num_ranks(); ++r) {
      absl::StrAppend(&text, layer, ",", r, ",", absl::StrJoin(ExpertsOn(placement, layer, r), " "),
                      "\n");
    }
  }
  return text;
}

// A list of expert ids, appended to `out`.
absl::Status ReadIds(const Json& list, const std::string& where, std::vector<int32_t>* out) {
  if (!list.is_array()) return Wrong(absl::StrCat(where, " is not a list of experts"));
  for (const Json& value : list) {
    if (!value.is_number_integer() || value < kNoExpert || value >= kMostExperts) {
      return Wrong(absl::StrCat(where, " has ", value.dump().substr(0, 40),
                                ", allowed: expert ids, or -1 for an empty slot"));
    }
    out->push_back(value.get<int32_t>());
  }
  return absl::OkStatus();
}

absl::StatusOr<const Json*> FindList(const Json& object, const char* key) {
  const auto it = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || it == object.end() || !it->is_array() || it->empty() ||
      it->size() > kMostLayers) {
    return Wrong(absl::StrCat("no list \"", key, "\""));
  }
  return &*it;
}

absl::StatusOr<Json> ParseJson(const std::string& text) {
  if (JsonNestsTooDeep(text)) return Wrong(absl::StrCat("nests deeper than ", kMostJsonDepth));
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

absl::StatusOr<Rows> ReadJsonRows(const std::string& text, const char* key) {
  BALLAST_ASSIGN_OR_RETURN(const Json root, ParseJson(text));
  BALLAST_ASSIGN_OR_RETURN(const Json* list, FindList(root, key));
  Rows rows(list->size());
  for (size_t layer = 0; layer < rows.size(); ++layer) {
    BALLAST_RETURN_IF_ERROR(
        ReadIds((*list)[layer], absl::StrCat(key, " layer ", layer), &rows[layer]));
  }
  return rows;
}

absl::StatusOr<std::vector<Ranks>> ReadAscend(const std::string& text) {
  BALLAST_ASSIGN_OR_RETURN(const Json root, ParseJson(text));
  BALLAST_ASSIGN_OR_RETURN(const Json* list, FindList(root, "layer_list"));
  std::vector<Ranks> layers;
  for (const Json& layer : *list) {
    BALLAST_ASSIGN_OR_RETURN(const Json* devices, FindList(layer, "device_list"));
    Ranks ranks(devices->size());
    for (size_t r = 0; r < ranks.size(); ++r) {
      BALLAST_ASSIGN_OR_RETURN(const Json* experts, FindList((*devices)[r], "device_expert"));
      BALLAST_RETURN_IF_ERROR(
          ReadIds(*experts, absl::StrCat("layer ", layers.size(), " device ", r), &ranks[r]));
    }
    layers.push_back(std::move(ranks));
  }
  return layers;
}

// The lists under initial_global_assignments, written in one line or in many.
absl::StatusOr<Rows> ReadTrtllm(const std::string& text) {
  const std::string key = "initial_global_assignments:";
  size_t at = text.find(key);
  if (at == std::string::npos) return Wrong("no initial_global_assignments");
  Rows rows;
  for (at += key.size(); at < text.size();) {
    const char c = text[at];
    if (std::isalpha(static_cast<unsigned char>(c)) != 0) break;  // the next key
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) {
      const bool negative = c == '-' && at + 1 < text.size() &&
                            std::isdigit(static_cast<unsigned char>(text[at + 1])) != 0;
      if (negative || absl::string_view(" \n\r\t,[]-{}").find(c) == absl::string_view::npos) {
        return Wrong(absl::StrCat("byte ", at, " is '", std::string(1, c),
                                  "', allowed: lists of expert ids under their layer's number"));
      }
      ++at;
      continue;
    }
    size_t end = at;
    while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end])) != 0) ++end;
    int32_t number = 0;
    if (!absl::SimpleAtoi(text.substr(at, end - at), &number) || number >= kMostExperts) {
      return Wrong(absl::StrCat("byte ", at, " has the number ",
                                text.substr(at, end - at).substr(0, 40), ", allowed: less than ",
                                kMostExperts));
    }
    if (end < text.size() && text[end] == ':') {
      rows.emplace_back();
      ++end;
    } else if (rows.empty()) {
      return Wrong(absl::StrCat("byte ", at, " has an expert before the first layer's number"));
    } else {
      rows.back().push_back(number);
    }
    at = end;
  }
  if (rows.empty()) return Wrong("initial_global_assignments has no layer");
  return rows;
}

absl::StatusOr<std::vector<Ranks>> ReadCsv(const std::string& text) {
  std::vector<Ranks> layers;
  int64_t number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || (number == 1 && line == "layer,rank,experts")) continue;
    const std::vector<std::string> fields = absl::StrSplit(line, ',');
    int32_t layer = -1, rank = -1;
    if (fields.size() != 3 || !absl::SimpleAtoi(fields[0], &layer) ||
        !absl::SimpleAtoi(fields[1], &rank)) {
      return Wrong(absl::StrCat("line ", number, " is '", line.substr(0, 40),
                                "', allowed: layer,rank,experts"));
    }
    const int32_t next_rank = layers.empty() ? 0 : static_cast<int32_t>(layers.back().size());
    const int32_t next_layer = static_cast<int32_t>(layers.size());
    if (layer == next_layer && rank == 0) {
      layers.emplace_back();
    } else if (layer != next_layer - 1 || rank != next_rank) {
      return Wrong(absl::StrCat("line ", number, " has layer ", layer, " rank ", rank,
                                ", allowed: layer ", std::max(next_layer - 1, 0), " rank ",
                                next_rank, " or layer ", next_layer, " rank 0"));
    }
    layers.back().emplace_back();
    for (absl::string_view id : absl::StrSplit(fields[2], ' ', absl::SkipEmpty())) {
      int32_t expert = -1;
      if (!absl::SimpleAtoi(id, &expert) || expert < 0 || expert >= kMostExperts) {
        return Wrong(absl::StrCat("line ", number, " has expert '", id.substr(0, 40),
                                  "', allowed: 0 to ", kMostExperts - 1));
      }
      layers.back().back().push_back(expert);
    }
  }
  if (layers.empty()) return Wrong("no line of layer,rank,experts");
  return layers;
}

absl::StatusOr<std::vector<Ranks>> CutInRanks(const Rows& rows, int32_t num_ranks) {
  if (num_ranks < 1) {
    return Wrong("the format does not say how many ranks there are; give it (--ranks)");
  }
  std::vector<Ranks> layers;
  for (const std::vector<int32_t>& row : rows) {
    if (row.empty() || row.size() != rows[0].size() || row.size() % num_ranks != 0) {
      return Wrong(absl::StrCat("layer ", layers.size(), " has ", row.size(),
                                " slots, allowed: a multiple of ", num_ranks,
                                " ranks, the same in all layers"));
    }
    const size_t per_rank = row.size() / num_ranks;
    Ranks ranks;
    for (auto at = row.begin(); at != row.end(); at += static_cast<ptrdiff_t>(per_rank)) {
      ranks.emplace_back(at, at + static_cast<ptrdiff_t>(per_rank));
    }
    layers.push_back(std::move(ranks));
  }
  return layers;
}

// Ranks get the slots that they need in the layer where they need most.
absl::StatusOr<Placement> Assemble(const std::vector<Ranks>& layers, const ImportOptions& options) {
  const size_t num_ranks = layers[0].size();
  std::vector<size_t> slots(num_ranks, 0);
  int32_t largest = 0;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    if (layers[layer].size() != num_ranks) {
      return Wrong(absl::StrCat("layer ", layer, " has ", layers[layer].size(),
                                " ranks; the first has ", num_ranks));
    }
    for (size_t r = 0; r < num_ranks; ++r) {
      slots[r] = std::max(slots[r], layers[layer][r].size());
      for (int32_t e : layers[layer][r]) largest = std::max(largest, e);
    }
  }
  if (options.num_nodes < 1 || num_ranks % options.num_nodes != 0) {
    return Wrong(
        absl::StrCat(num_ranks, " ranks on ", options.num_nodes, " nodes, allowed: equal nodes"));
  }
  const size_t num_slots = std::accumulate(slots.begin(), slots.end(), size_t{0});
  if (num_slots > kMostEntries / layers.size()) {
    return Wrong(absl::StrCat(num_slots, " slots in each of ", layers.size(),
                              " layers, allowed: ", kMostEntries, " in all of them"));
  }
  Topology topology;
  topology.slot_offsets.push_back(0);
  for (size_t r = 0; r < num_ranks; ++r) {
    topology.slot_offsets.push_back(topology.slot_offsets.back() + static_cast<int32_t>(slots[r]));
    topology.node_of_rank.push_back(static_cast<int32_t>(r / (num_ranks / options.num_nodes)));
  }
  std::vector<int32_t> all;
  for (const Ranks& ranks : layers) {
    for (size_t r = 0; r < num_ranks; ++r) {
      all.insert(all.end(), ranks[r].begin(), ranks[r].end());
      all.insert(all.end(), slots[r] - ranks[r].size(), kNoExpert);
    }
  }
  return Placement::Create(static_cast<int32_t>(layers.size()),
                           options.num_experts > 0 ? options.num_experts : largest + 1,
                           std::move(topology), std::move(all), /*epoch=*/0);
}

absl::StatusOr<Placement> Import(const std::string& text, PlacementFormat format,
                                 const ImportOptions& options) {
  std::vector<Ranks> layers;
  if (format == PlacementFormat::kNative) return Placement::FromJson(text);
  if (format == PlacementFormat::kAscend) {
    BALLAST_ASSIGN_OR_RETURN(layers, ReadAscend(text));
  } else if (format == PlacementFormat::kCsv) {
    BALLAST_ASSIGN_OR_RETURN(layers, ReadCsv(text));
  } else {
    const char* key = format == PlacementFormat::kEplb ? "phy2log" : "physical_to_logical_map";
    BALLAST_ASSIGN_OR_RETURN(const Rows rows, format == PlacementFormat::kTrtllm
                                                  ? ReadTrtllm(text)
                                                  : ReadJsonRows(text, key));
    BALLAST_ASSIGN_OR_RETURN(layers, CutInRanks(rows, options.num_ranks));
  }
  return Assemble(layers, options);
}

}  // namespace

absl::StatusOr<PlacementFormat> ParsePlacementFormat(const std::string& name) {
  for (const auto& [format, format_name] : kFormats) {
    if (name == format_name) return format;
  }
  return Wrong(absl::StrCat("unknown placement format '", name, "'; the choices are ",
                            absl::StrJoin(PlacementFormatNames(), ", ")));
}

std::vector<std::string> PlacementFormatNames() {
  std::vector<std::string> names;
  for (const auto& [format, name] : kFormats) names.push_back(name);
  return names;
}

absl::StatusOr<std::string> ExportPlacement(const Placement& placement, PlacementFormat format,
                                            int32_t first_layer) {
  switch (format) {
    case PlacementFormat::kNative:
      return placement.ToJson();
    case PlacementFormat::kCsv:
      return ExportCsv(placement);
    case PlacementFormat::kAscend:
      BALLAST_RETURN_IF_ERROR(CheckFull(placement));
      return ExportAscend(placement);
    case PlacementFormat::kEplb:
      BALLAST_RETURN_IF_ERROR(CheckFull(placement));
      return ExportEplb(placement);
    case PlacementFormat::kSglang:
      BALLAST_RETURN_IF_ERROR(CheckFull(placement));
      return ExportSglang(placement);
    case PlacementFormat::kTrtllm:
      BALLAST_RETURN_IF_ERROR(CheckFull(placement));
      return ExportTrtllm(placement, first_layer);
  }
  return Wrong("unknown placement format");
}

absl::StatusOr<Placement> ImportPlacement(const std::string& name, const std::string& text,
                                          PlacementFormat format, const ImportOptions& options) {
  absl::StatusOr<Placement> placement = Import(text, format, options);
  if (placement.ok()) return placement;
  return Wrong(absl::StrCat(name, ": ", placement.status().message()));
}

}  // namespace ballast
