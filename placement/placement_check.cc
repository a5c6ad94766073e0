#include "placement/placement_check.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {
namespace {

absl::Status CheckTopology(const Topology& topology) {
  const std::vector<int32_t>& offsets = topology.slot_offsets;
  if (offsets.size() != topology.node_of_rank.size() + 1 || offsets.front() != 0) {
    return absl::InternalError("placement: the slots do not belong to its ranks");
  }
  for (size_t r = 0; r + 1 < offsets.size(); ++r) {
    if (offsets[r + 1] < offsets[r]) {
      return absl::InternalError(
          absl::StrCat("placement: rank ", r, " has ", offsets[r + 1] - offsets[r], " slots"));
    }
  }
  return absl::OkStatus();
}

// What the slots say of one layer.
struct Held {
  std::vector<int32_t> copies;       // [E * R]
  std::vector<int32_t> lowest_slot;  // [E * R]
};

absl::StatusOr<Held> Count(const Placement& placement, int32_t layer) {
  const Topology& topology = placement.topology();
  const int32_t ranks = topology.num_ranks(), experts = placement.num_experts();
  const auto row = placement.expert_of_slot(layer);
  if (static_cast<int32_t>(row.size()) != topology.num_slots()) {
    return absl::InternalError(absl::StrCat("placement: layer ", layer, " has ", row.size(),
                                            " slots, its ranks have ", topology.num_slots()));
  }
  Held held;
  held.copies.assign(static_cast<size_t>(experts) * ranks, 0);
  held.lowest_slot.assign(held.copies.size(), kNoSlot);
  for (int32_t r = 0; r < ranks; ++r) {
    for (int32_t slot = topology.slot_offsets[r]; slot < topology.slot_offsets[r + 1]; ++slot) {
      const int32_t e = row[slot];
      if (e == kNoExpert) continue;
      if (e < 0 || e >= experts) {
        return absl::InternalError(absl::StrCat("placement: layer ", layer, ", slot ", slot,
                                                " holds expert ", e, ", allowed: 0 to ",
                                                experts - 1));
      }
      const size_t at = static_cast<size_t>(e) * ranks + r;
      if (held.copies[at]++ == 0) held.lowest_slot[at] = slot;
    }
  }
  return held;
}

absl::Status CheckLayer(const Placement& placement, int32_t layer) {
  BALLAST_ASSIGN_OR_RETURN(const Held held, Count(placement, layer));
  const int32_t ranks = placement.topology().num_ranks();
  const LayerHosts& hosts = placement.hosts(layer);
  const auto wrong = [layer](int32_t e, const auto&... what) {
    return absl::InternalError(
        absl::StrCat("placement: layer ", layer, ", expert ", e, ": ", what...));
  };
  if (hosts.num_experts != placement.num_experts() || hosts.num_ranks != ranks ||
      hosts.host_offsets.size() != static_cast<size_t>(hosts.num_experts) + 1) {
    return wrong(0, "the table of hosts has another shape");
  }
  for (int32_t e = 0; e < placement.num_experts(); ++e) {
    int32_t host = hosts.host_offsets[e], slots = 0;
    for (int32_t r = 0; r < ranks; ++r) {
      const size_t at = static_cast<size_t>(e) * ranks + r;
      const bool here = held.copies[at] > 0;
      slots += held.copies[at];
      if (placement.Hosts(layer, e, r) != here) return wrong(e, "Hosts is wrong of rank ", r);
      if (!here) continue;
      if (host >= hosts.host_offsets[e + 1] || hosts.host_rank[host] != r ||
          hosts.host_copies[host] != held.copies[at] ||
          hosts.host_slot[host] != held.lowest_slot[at]) {
        return wrong(e, "the table of hosts is wrong of rank ", r);
      }
      ++host;
    }
    if (slots == 0) return wrong(e, "no slot holds it");
    if (host != hosts.host_offsets[e + 1]) return wrong(e, "the table has a host too many");
    if (placement.num_replicas(layer, e) != slots) return wrong(e, "replicas are miscounted");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckLayers(const Placement& placement, std::span<const Placement::LayerRow> layers) {
  BALLAST_RETURN_IF_ERROR(CheckTopology(placement.topology()));
  for (const Placement::LayerRow& row : layers) {
    BALLAST_RETURN_IF_ERROR(CheckLayer(placement, row.layer));
  }
  return absl::OkStatus();
}

absl::Status CheckPlacement(const Placement& placement) {
  BALLAST_RETURN_IF_ERROR(CheckTopology(placement.topology()));
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    BALLAST_RETURN_IF_ERROR(CheckLayer(placement, layer));
  }
  std::vector<int32_t> slots;
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const auto row = placement.expert_of_slot(layer);
    slots.insert(slots.end(), row.begin(), row.end());
  }
  BALLAST_ASSIGN_OR_RETURN(
      const Placement again,
      Placement::Create(placement.num_layers(), placement.num_experts(), placement.topology(),
                        std::move(slots), placement.epoch()));
  if (again.fingerprint() == placement.fingerprint()) return absl::OkStatus();
  return absl::InternalError("placement: the fingerprint is not that of its slots");
}

}  // namespace ballast
