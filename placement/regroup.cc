#include "placement/regroup.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

absl::Status CheckMembers(const Placement& current, std::span<const GroupMember> members) {
  const int32_t num_ranks = current.topology().num_ranks();
  std::vector<bool> named(static_cast<size_t>(num_ranks), false);
  bool any_stays = false;
  for (const GroupMember& member : members) {
    if (member.old_rank == -1) {
      if (member.slots < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("a new member has ", member.slots, " slots; allowed: at least 0"));
      }
      continue;
    }
    if (member.old_rank < 0 || member.old_rank >= num_ranks) {
      return absl::InvalidArgumentError(
          absl::StrCat("a member was rank ", member.old_rank, "; allowed: 0 to ", num_ranks - 1));
    }
    if (named[member.old_rank]) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", member.old_rank, " is named twice among the members"));
    }
    named[member.old_rank] = true;
    any_stays = true;
  }
  if (!any_stays) return absl::InvalidArgumentError("no rank of the placement in force stays");
  return absl::OkStatus();
}

// The members' ranks and nodes; nodes that are left are numbered again without gaps.
Topology TopologyOf(const Placement& current, std::span<const GroupMember> members,
                    int32_t more_slots) {
  const Topology& old = current.topology();
  Topology topology;
  topology.slot_offsets = {0};
  for (const GroupMember& member : members) {
    const bool stays = member.old_rank >= 0;
    const int32_t slots = (stays ? old.slots_on(member.old_rank) : member.slots) + more_slots;
    topology.slot_offsets.push_back(topology.slot_offsets.back() + slots);
    topology.node_of_rank.push_back(member.node == GroupMember::kSameNode && stays
                                        ? old.node_of_rank[member.old_rank]
                                        : std::max(member.node, 0));
  }
  std::vector<int32_t> nodes = topology.node_of_rank;
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  for (int32_t& node : topology.node_of_rank) {
    node = static_cast<int32_t>(std::lower_bound(nodes.begin(), nodes.end(), node) - nodes.begin());
  }
  return topology;
}

// The least number of slots per rank beyond their own that lets the members hold every expert.
int32_t MoreSlotsNeeded(const Placement& current, std::span<const GroupMember> members) {
  const int32_t slots = TopologyOf(current, members, 0).num_slots();
  const int32_t lacking = std::max(0, current.num_experts() - slots);
  const int32_t ranks = static_cast<int32_t>(members.size());
  return (lacking + ranks - 1) / ranks;
}

// Brings the lost experts of one layer back into its row.
class RowFiller {
 public:
  RowFiller(const Topology& topology, int32_t num_experts, std::vector<int32_t>* reloads_of_rank)
      : topology_(topology),
        reloads_of_rank_(*reloads_of_rank),
        copies_(static_cast<size_t>(num_experts)) {}

  void Fill(int32_t layer, std::span<int32_t> row, std::vector<Reload>* reloads) {
    std::fill(copies_.begin(), copies_.end(), 0);
    for (const int32_t e : row) {
      if (e != kNoExpert) ++copies_[e];
    }
    for (int32_t e = 0; e < static_cast<int32_t>(copies_.size()); ++e) {
      if (copies_[e] > 0) continue;
      const int32_t slot = BestSlot(row);
      BALLAST_CHECK(slot >= 0);  // the slots are as many as the experts
      if (row[slot] != kNoExpert) --copies_[row[slot]];
      row[slot] = e;
      copies_[e] = 1;
      const int32_t rank = topology_.rank_of_slot(slot);
      ++reloads_of_rank_[rank];
      reloads->push_back({layer, e, rank});
    }
  }

 private:
  // An empty slot or one that can be spared: on the rank with the fewest reloads, there an empty
  // one first, then that of the expert with the most slots.
  int32_t BestSlot(std::span<const int32_t> row) const {
    int32_t best = -1;
    for (int32_t rank = 0; rank < topology_.num_ranks(); ++rank) {
      if (best >= 0 && reloads_of_rank_[rank] >= reloads_of_rank_[topology_.rank_of_slot(best)]) {
        continue;
      }
      int32_t here = -1;
      for (int32_t s = topology_.slot_offsets[rank]; s < topology_.slot_offsets[rank + 1]; ++s) {
        if (Spare(row[s]) > (here < 0 ? 1 : Spare(row[here]))) here = s;
      }
      if (here >= 0) best = here;
    }
    return best;
  }
  // How well a slot can be spared: not at all where it is at most 1.
  int32_t Spare(int32_t expert) const { return expert == kNoExpert ? INT32_MAX : copies_[expert]; }

  const Topology& topology_;
  std::vector<int32_t>& reloads_of_rank_;  // over all layers
  std::vector<int32_t> copies_;            // [E] slots that hold the expert
};

}  // namespace

absl::StatusOr<Regrouped> Regroup(const Placement& current, std::span<const GroupMember> members,
                                  int64_t epoch) {
  BALLAST_RETURN_IF_ERROR(CheckMembers(current, members));
  const int32_t more_slots = MoreSlotsNeeded(current, members);
  const Topology topology = TopologyOf(current, members, more_slots);
  const size_t num_slots = static_cast<size_t>(topology.num_slots());
  std::vector<int32_t> expert_of_slot(num_slots * static_cast<size_t>(current.num_layers()),
                                      kNoExpert);
  std::vector<int32_t> reloads_of_rank(members.size(), 0);
  std::vector<Reload> reloads;
  RowFiller filler(topology, current.num_experts(), &reloads_of_rank);
  for (int32_t layer = 0; layer < current.num_layers(); ++layer) {
    const auto row = std::span(expert_of_slot).subspan(layer * num_slots, num_slots);
    const std::span<const int32_t> old_row = current.expert_of_slot(layer);
    for (size_t r = 0; r < members.size(); ++r) {
      const int32_t old_rank = members[r].old_rank;
      if (old_rank < 0) continue;
      const auto old_slots = old_row.subspan(current.topology().slot_offsets[old_rank],
                                             current.topology().slots_on(old_rank));
      std::copy(old_slots.begin(), old_slots.end(), row.begin() + topology.slot_offsets[r]);
    }
    filler.Fill(layer, row, &reloads);
  }
  BALLAST_ASSIGN_OR_RETURN(Placement placement,
                           Placement::Create(current.num_layers(), current.num_experts(), topology,
                                             std::move(expert_of_slot), epoch));
  return Regrouped{std::move(placement), std::move(reloads), more_slots};
}

std::vector<int32_t> ReloadsIfLost(const Placement& placement) {
  std::vector<int32_t> reloads(static_cast<size_t>(placement.topology().num_ranks()), 0);
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const LayerHosts& hosts = placement.hosts(layer);
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      const int32_t first = hosts.host_offsets[e];
      if (hosts.host_offsets[e + 1] - first == 1) ++reloads[hosts.host_rank[first]];
    }
  }
  return reloads;
}

}  // namespace ballast
