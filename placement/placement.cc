#include "placement/placement.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/hash.h"
#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

using Json = nlohmann::json;

constexpr int64_t kSchemaVersion = 1;
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

absl::Status CheckTopology(const Topology& topology) {
  const size_t num_ranks = topology.node_of_rank.size();
  if (num_ranks == 0) return absl::InvalidArgumentError("a topology needs at least one rank");
  if (topology.slot_offsets.size() != num_ranks + 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("slot_offsets has ", topology.slot_offsets.size(), " entries for ", num_ranks,
                     " ranks; it needs one more than there are ranks"));
  }
  if (topology.slot_offsets[0] != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("slot_offsets begins with ", topology.slot_offsets[0], " instead of 0"));
  }
  for (size_t r = 0; r < num_ranks; ++r) {
    if (topology.slot_offsets[r + 1] < topology.slot_offsets[r]) {
      return absl::InvalidArgumentError(absl::StrCat("slot_offsets falls at rank ", r, ": ",
                                                     topology.slot_offsets[r], " to ",
                                                     topology.slot_offsets[r + 1]));
    }
  }
  std::vector<bool> seen(num_ranks, false);
  int32_t num_nodes = 0;
  for (size_t r = 0; r < num_ranks; ++r) {
    const int32_t node = topology.node_of_rank[r];
    if (node < 0 || node >= static_cast<int32_t>(num_ranks)) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", r, " is on node ", node, ", outside [0, ", num_ranks, ")"));
    }
    seen[node] = true;
    num_nodes = std::max(num_nodes, node + 1);
  }
  for (int32_t node = 0; node < num_nodes; ++node) {
    if (!seen[node]) {
      return absl::InvalidArgumentError(
          absl::StrCat("node ", node, " of ", num_nodes, " has no rank"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckRow(int32_t layer, int32_t num_experts, std::span<const int32_t> row) {
  std::vector<bool> placed(num_experts, false);
  for (size_t slot = 0; slot < row.size(); ++slot) {
    const int32_t expert = row[slot];
    if (expert == kNoExpert) continue;
    if (expert < 0 || expert >= num_experts) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer, " slot ", slot,
                                                     " holds expert ", expert, ", outside [0, ",
                                                     num_experts, ")"));
    }
    placed[expert] = true;
  }
  for (int32_t e = 0; e < num_experts; ++e) {
    if (!placed[e]) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", layer, " has no slot for expert ", e));
    }
  }
  return absl::OkStatus();
}

// What JSON text a message quotes: enough to find the place, never the whole file.
std::string Quote(const Json& value) {
  constexpr size_t kLongestQuote = 40;
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kLongestQuote) text = text.substr(0, kLongestQuote) + "...";
  return text;
}

absl::StatusOr<int64_t> IntegerOf(const Json& value, const std::string& key, int64_t lowest,
                                  int64_t highest) {
  bool in_range = false;
  int64_t number = 0;
  if (value.is_number_unsigned()) {
    const uint64_t bits = value.get<uint64_t>();
    in_range = bits <= static_cast<uint64_t>(highest);
    number = static_cast<int64_t>(bits);
  } else if (value.is_number_integer()) {
    number = value.get<int64_t>();
    in_range = number <= highest;
  }
  if (!in_range || number < lowest) {
    return absl::InvalidArgumentError(absl::StrCat(
        key, " is ", Quote(value), "; it must be an integer in [", lowest, ", ", highest, "]"));
  }
  return number;
}

absl::StatusOr<const Json*> Find(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end()) {
    return absl::InvalidArgumentError(absl::StrCat("the key ", key, " is missing"));
  }
  return &*it;
}

absl::StatusOr<int64_t> IntegerAt(const Json& object, const char* key, int64_t lowest,
                                  int64_t highest) {
  BALLAST_ASSIGN_OR_RETURN(const Json* value, Find(object, key));
  return IntegerOf(*value, key, lowest, highest);
}

// Appends the integers of a JSON list to `out`.
absl::Status AppendIntegers(const Json& list, const std::string& key, int64_t lowest,
                            std::vector<int32_t>* out) {
  if (!list.is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, " is ", Quote(list), "; it must be a list"));
  }
  for (const Json& value : list) {
    BALLAST_ASSIGN_OR_RETURN(const int64_t number, IntegerOf(value, key, lowest, kMaxInt32));
    out->push_back(static_cast<int32_t>(number));
  }
  return absl::OkStatus();
}

// 1, 3, ..., 2, 4, ... up to half way round, where each joins new pairs of ranks, then the others.
// Odd ones first: with steps of 1 and 3 any rank is near any other.
std::vector<int32_t> RingDistances(int32_t num_ranks) {
  std::vector<int32_t> distances;
  for (bool far : {false, true}) {
    for (int32_t first : {1, 2}) {
      for (int32_t d = first; d < num_ranks; d += 2) {
        if ((2 * d > num_ranks) == far) distances.push_back(d);
      }
    }
  }
  return distances;
}

std::string Hex(uint64_t bits) {
  char text[17];
  std::snprintf(text, sizeof text, "%016" PRIx64, bits);
  return text;
}

}  // namespace

int32_t Topology::num_nodes() const {
  return node_of_rank.empty() ? 0 : *std::max_element(node_of_rank.begin(), node_of_rank.end()) + 1;
}

int32_t Topology::rank_of_slot(int32_t slot) const {
  const auto after = std::upper_bound(slot_offsets.begin(), slot_offsets.end(), slot);
  return static_cast<int32_t>(after - slot_offsets.begin()) - 1;
}

Topology Topology::Uniform(int32_t num_ranks, int32_t slots_per_rank, int32_t num_nodes) {
  BALLAST_CHECK(num_ranks > 0 && num_nodes > 0 && num_ranks % num_nodes == 0);
  Topology topology;
  topology.slot_offsets.push_back(0);
  for (int32_t r = 0; r < num_ranks; ++r) {
    topology.slot_offsets.push_back((r + 1) * slots_per_rank);
    topology.node_of_rank.push_back(r / (num_ranks / num_nodes));
  }
  return topology;
}

absl::StatusOr<Placement> Placement::Create(int32_t num_layers, int32_t num_experts,
                                            Topology topology, std::vector<int32_t> expert_of_slot,
                                            int64_t epoch) {
  BALLAST_RETURN_IF_ERROR(CheckTopology(topology));
  const int64_t num_slots = topology.num_slots();
  if (num_layers < 1 || num_experts < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a placement of ", num_layers, " layers and ",
                                                   num_experts, " experts; both must be positive"));
  }
  if (num_experts > num_slots) {
    return absl::InvalidArgumentError(
        absl::StrCat(num_experts, " experts do not fit into ", num_slots, " slots"));
  }
  if (static_cast<int64_t>(expert_of_slot.size()) != num_layers * num_slots) {
    return absl::InvalidArgumentError(absl::StrCat("expert_of_slot has ", expert_of_slot.size(),
                                                   " entries for ", num_layers, " layers of ",
                                                   num_slots, " slots"));
  }
  const std::span<const int32_t> all(expert_of_slot);
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    BALLAST_RETURN_IF_ERROR(
        CheckRow(layer, num_experts, all.subspan(layer * num_slots, num_slots)));
  }

  auto tables = std::make_shared<Tables>();
  tables->topology = std::move(topology);
  tables->expert_of_slot = std::move(expert_of_slot);
  tables->BuildHosts(num_layers, num_experts);
  std::vector<int32_t> identity = {num_layers, num_experts, tables->topology.num_ranks()};
  for (const std::vector<int32_t>* part :
       {&tables->topology.slot_offsets, &tables->topology.node_of_rank, &tables->expert_of_slot}) {
    identity.insert(identity.end(), part->begin(), part->end());
  }
  tables->fingerprint = Hash64(std::as_bytes(std::span(identity)));

  Placement placement;
  placement.num_layers_ = num_layers;
  placement.num_experts_ = num_experts;
  placement.epoch_ = epoch;
  placement.tables_ = std::move(tables);
  return placement;
}

void Placement::Tables::BuildHosts(int32_t num_layers, int32_t num_experts) {
  const int32_t num_slots = topology.num_slots();
  const size_t offsets_per_layer = static_cast<size_t>(num_experts) + 1;
  const size_t most_hosts = static_cast<size_t>(num_layers) * num_slots;
  host_offsets.resize(num_layers * offsets_per_layer);
  host_rank.reserve(most_hosts);  // reserved in full: the views below must not be moved
  host_copies.reserve(most_hosts);
  host_slot.reserve(most_hosts);

  std::vector<int32_t> last_rank(num_experts);
  std::vector<int32_t> next(num_experts);
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    const int32_t* row = expert_of_slot.data() + static_cast<size_t>(layer) * num_slots;
    int32_t* offsets = host_offsets.data() + layer * offsets_per_layer;
    const size_t first = host_rank.size();

    // Calls visit(expert, rank, slot, is_new_host) for every full slot, ranks ascending.
    const auto for_each_copy = [&](auto visit) {
      std::fill(last_rank.begin(), last_rank.end(), -1);
      for (int32_t r = 0; r < topology.num_ranks(); ++r) {
        for (int32_t s = topology.slot_offsets[r]; s < topology.slot_offsets[r + 1]; ++s) {
          if (row[s] == kNoExpert) continue;
          visit(row[s], r, s, last_rank[row[s]] != r);
          last_rank[row[s]] = r;
        }
      }
    };
    for_each_copy([&](int32_t e, int32_t, int32_t, bool is_new) { offsets[e + 1] += is_new; });
    for (int32_t e = 0; e < num_experts; ++e) {
      next[e] = offsets[e];
      offsets[e + 1] += offsets[e];
    }
    const size_t count = offsets[num_experts];
    host_rank.resize(first + count);
    host_copies.resize(first + count);
    host_slot.resize(first + count);
    for_each_copy([&](int32_t e, int32_t r, int32_t s, bool is_new) {
      if (!is_new) {
        ++host_copies[first + next[e] - 1];
        return;
      }
      const size_t h = first + next[e]++;
      host_rank[h] = r;
      host_copies[h] = 1;
      host_slot[h] = s;
    });
    hosts.push_back(LayerHosts{.num_experts = num_experts,
                               .num_ranks = topology.num_ranks(),
                               .host_offsets = {offsets, offsets_per_layer},
                               .host_rank = {host_rank.data() + first, count},
                               .host_copies = {host_copies.data() + first, count},
                               .host_slot = {host_slot.data() + first, count},
                               .node_of_rank = topology.node_of_rank});
  }
}

absl::StatusOr<Placement> Placement::Contiguous(int32_t num_layers, int32_t num_experts,
                                                const Topology& topology, bool fill_spare,
                                                bool within_nodes) {
  BALLAST_RETURN_IF_ERROR(CheckTopology(topology));
  if (num_layers < 1 || num_experts < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a placement of ", num_layers, " layers and ",
                                                   num_experts, " experts; both must be positive"));
  }
  const int32_t num_ranks = topology.num_ranks();
  std::vector<std::vector<int32_t>> block(num_ranks);
  for (int32_t e = 0; e < num_experts; ++e) {
    block[static_cast<int64_t>(e) * num_ranks / num_experts].push_back(e);
  }
  std::vector<std::vector<int32_t>> rings(within_nodes ? topology.num_nodes() : 1);
  for (int32_t r = 0; r < num_ranks; ++r) {
    rings[within_nodes ? topology.node_of_rank[r] : 0].push_back(r);
  }
  std::vector<int32_t> row(topology.num_slots(), kNoExpert);
  for (int32_t r = 0; r < num_ranks; ++r) {
    const int32_t own = static_cast<int32_t>(block[r].size());
    if (own > topology.slots_on(r)) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", r, " has ", topology.slots_on(r), " slots for its ", own,
                       " experts (", num_experts, " experts in ", topology.num_slots(), " slots)"));
    }
    int32_t slot = topology.slot_offsets[r];
    for (int32_t e : block[r]) row[slot++] = e;
    if (!fill_spare) continue;
    const std::vector<int32_t>& ring = rings[within_nodes ? topology.node_of_rank[r] : 0];
    const int32_t length = static_cast<int32_t>(ring.size());
    const int32_t place =
        static_cast<int32_t>(std::find(ring.begin(), ring.end(), r) - ring.begin());
    const std::vector<int32_t> distances = RingDistances(length);
    const int32_t end = topology.slot_offsets[r + 1];
    for (int32_t round = 0; slot < end && round < num_experts; ++round) {
      for (size_t i = 0; slot < end && i < distances.size(); ++i) {
        const std::vector<int32_t>& theirs = block[ring[(place + length - distances[i]) % length]];
        const size_t size = theirs.size();
        if (static_cast<size_t>(round) < size) row[slot++] = theirs[(i + round) % size];
      }
    }
  }
  std::vector<int32_t> rows;
  rows.reserve(static_cast<size_t>(num_layers) * row.size());
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    rows.insert(rows.end(), row.begin(), row.end());
  }
  return Create(num_layers, num_experts, topology, std::move(rows), /*epoch=*/0);
}

std::span<const int32_t> Placement::expert_of_slot(int32_t layer) const {
  const size_t num_slots = tables_->topology.num_slots();
  return std::span(tables_->expert_of_slot).subspan(layer * num_slots, num_slots);
}

int32_t Placement::num_replicas(int32_t layer, int32_t expert) const {
  const LayerHosts& h = hosts(layer);
  int32_t copies = 0;
  for (int32_t i = h.host_offsets[expert]; i < h.host_offsets[expert + 1]; ++i) {
    copies += h.host_copies[i];
  }
  return copies;
}

bool Placement::Hosts(int32_t layer, int32_t expert, int32_t rank) const {
  const LayerHosts& h = hosts(layer);
  const auto begin = h.host_rank.begin();
  return std::binary_search(begin + h.host_offsets[expert], begin + h.host_offsets[expert + 1],
                            rank);
}

absl::StatusOr<Placement> Placement::With(std::span<const LayerRow> rows, int64_t epoch) const {
  const size_t num_slots = tables_->topology.num_slots();
  std::vector<int32_t> expert_of_slot = tables_->expert_of_slot;
  std::vector<bool> replaced(num_layers_, false);
  for (const LayerRow& row : rows) {
    if (row.layer < 0 || row.layer >= num_layers_) {
      return absl::InvalidArgumentError(
          absl::StrCat("a row for layer ", row.layer, ", outside [0, ", num_layers_, ")"));
    }
    if (replaced[row.layer]) {
      return absl::InvalidArgumentError(absl::StrCat("two rows for layer ", row.layer));
    }
    if (row.expert_of_slot.size() != num_slots) {
      return absl::InvalidArgumentError(absl::StrCat("the row of layer ", row.layer, " has ",
                                                     row.expert_of_slot.size(), " entries for ",
                                                     num_slots, " slots"));
    }
    replaced[row.layer] = true;
    std::copy(row.expert_of_slot.begin(), row.expert_of_slot.end(),
              expert_of_slot.begin() + static_cast<ptrdiff_t>(row.layer * num_slots));
  }
  return Create(num_layers_, num_experts_, tables_->topology, std::move(expert_of_slot), epoch);
}

std::string Placement::ToJson() const {
  // One layer per line, so that two placements can be compared with a text tool.
  std::string json = absl::StrCat("{\"schema\":", kSchemaVersion, ",\"epoch\":", epoch_,
                                  ",\"num_experts\":", num_experts_,
                                  ",\"slot_offsets\":", Json(topology().slot_offsets).dump(),
                                  ",\"node_of_rank\":", Json(topology().node_of_rank).dump(),
                                  ",\"fingerprint\":\"", Hex(fingerprint()), "\",\"layers\":[");
  for (int32_t layer = 0; layer < num_layers_; ++layer) {
    const std::span<const int32_t> row = expert_of_slot(layer);
    absl::StrAppend(&json, layer == 0 ? "\n" : ",\n",
                    Json(std::vector<int32_t>(row.begin(), row.end())).dump());
  }
  return json + "\n]}\n";
}

absl::StatusOr<Placement> Placement::FromJson(const std::string& json) {
  if (JsonNestsTooDeep(json)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the placement nests deeper than ", kMostJsonDepth));
  }
  const Json root = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) {
    return absl::InvalidArgumentError("the placement is not a JSON object");
  }
  BALLAST_RETURN_IF_ERROR(IntegerAt(root, "schema", kSchemaVersion, kSchemaVersion).status());
  BALLAST_ASSIGN_OR_RETURN(const int64_t epoch,
                           IntegerAt(root, "epoch", 0, std::numeric_limits<int64_t>::max() - 1));
  BALLAST_ASSIGN_OR_RETURN(const int64_t num_experts, IntegerAt(root, "num_experts", 1, kMaxInt32));

  Topology topology;
  BALLAST_ASSIGN_OR_RETURN(const Json* slot_offsets, Find(root, "slot_offsets"));
  BALLAST_RETURN_IF_ERROR(AppendIntegers(*slot_offsets, "slot_offsets", 0, &topology.slot_offsets));
  BALLAST_ASSIGN_OR_RETURN(const Json* node_of_rank, Find(root, "node_of_rank"));
  BALLAST_RETURN_IF_ERROR(AppendIntegers(*node_of_rank, "node_of_rank", 0, &topology.node_of_rank));
  BALLAST_RETURN_IF_ERROR(CheckTopology(topology));

  BALLAST_ASSIGN_OR_RETURN(const Json* layers, Find(root, "layers"));
  if (!layers->is_array() || layers->empty() || layers->size() > static_cast<size_t>(kMaxInt32)) {
    return absl::InvalidArgumentError(
        absl::StrCat("layers is ", Quote(*layers), "; it must be a list of rows"));
  }
  std::vector<int32_t> expert_of_slot;
  for (const Json& row : *layers) {
    const size_t before = expert_of_slot.size();
    BALLAST_RETURN_IF_ERROR(AppendIntegers(row, "layers", kNoExpert, &expert_of_slot));
    if (expert_of_slot.size() - before != static_cast<size_t>(topology.num_slots())) {
      return absl::InvalidArgumentError(
          absl::StrCat("layers has a row of ", expert_of_slot.size() - before, " entries for ",
                       topology.num_slots(), " slots"));
    }
  }
  BALLAST_ASSIGN_OR_RETURN(
      Placement placement,
      Create(static_cast<int32_t>(layers->size()), static_cast<int32_t>(num_experts),
             std::move(topology), std::move(expert_of_slot), epoch));
  BALLAST_ASSIGN_OR_RETURN(const Json* fingerprint, Find(root, "fingerprint"));
  if (*fingerprint != Json(Hex(placement.fingerprint()))) {
    return absl::InvalidArgumentError(absl::StrCat("fingerprint is ", Quote(*fingerprint),
                                                   "; the tables have ",
                                                   Hex(placement.fingerprint())));
  }
  return placement;
}

bool Placement::operator==(const Placement& other) const {
  return num_layers_ == other.num_layers_ && num_experts_ == other.num_experts_ &&
         epoch_ == other.epoch_ && topology() == other.topology() &&
         tables_->expert_of_slot == other.tables_->expert_of_slot;
}

}  // namespace ballast
