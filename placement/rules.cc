#include "placement/rules.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "placement/split_exact.h"

namespace ballast {
namespace {

// One layer whose hot experts are being covered.
class Cover {
 public:
  Cover(const Topology& topology, std::span<const int64_t> load, std::vector<int32_t>* row)
      : topology_(topology), load_(load), row_(*row), least_hosts_(load.size(), 1) {
    for (int32_t r = 0; r < topology.num_ranks(); ++r) {
      rank_of_slot_.insert(rank_of_slot_.end(), static_cast<size_t>(topology.slots_on(r)), r);
    }
  }

  int32_t Run() {
    std::vector<int32_t> hottest(load_.size());
    std::iota(hottest.begin(), hottest.end(), 0);
    std::stable_sort(hottest.begin(), hottest.end(),
                     [this](int32_t a, int32_t b) { return load_[a] > load_[b]; });
    hottest.resize(
        static_cast<size_t>(NumHotExperts(topology_, static_cast<int32_t>(load_.size()))));
    for (int32_t e : hottest) least_hosts_[e] = 2;
    int32_t changed = 0;
    for (int32_t e : hottest) {
      Count();
      if (num_hosts_[e] < 2) changed += AddHost(e);
    }
    return changed;
  }

 private:
  bool IsOn(int32_t expert, int32_t rank) const {
    const auto begin = row_.begin() + topology_.slot_offsets[rank];
    const auto end = row_.begin() + topology_.slot_offsets[rank + 1];
    return std::find(begin, end, expert) != end;
  }

  // Counts the hosts of every expert and what each slot carries; -1: nothing at all.
  void Count() {
    const absl::StatusOr<Placement> placement =
        Placement::Create(1, static_cast<int32_t>(load_.size()), topology_, row_, /*epoch=*/0);
    BALLAST_CHECK(placement.ok());
    std::vector<int32_t> demand;
    ScaleDemand(load_, &demand);
    Split split;
    const LayerHosts& hosts = placement->hosts(0);
    ExactSplitter(hosts).Run(demand, &split);
    carried_.assign(row_.size(), -1);
    num_hosts_.assign(load_.size(), 0);
    for (size_t e = 0; e < load_.size(); ++e) {
      num_hosts_[e] = hosts.host_offsets[e + 1] - hosts.host_offsets[e];
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        carried_[hosts.host_slot[h]] = split.quota[h];
      }
    }
  }

  bool IsSpare(size_t slot) const {
    return carried_[slot] < 0 || num_hosts_[row_[slot]] > least_hosts_[row_[slot]];
  }

  int32_t AddHost(int32_t expert) {
    size_t best = row_.size();
    for (size_t slot = 0; slot < row_.size(); ++slot) {
      if (!IsSpare(slot) || IsOn(expert, rank_of_slot_[slot])) continue;
      if (best == row_.size() || carried_[slot] < carried_[best]) best = slot;
    }
    if (best == row_.size()) return MoveAway(expert);
    row_[best] = expert;
    return 1;
  }

  // All spare slots are on the expert's own rank: moves the lightest expert that it can there.
  int32_t MoveAway(int32_t expert) {
    size_t to = row_.size(), from = row_.size();
    for (size_t slot = 0; slot < row_.size(); ++slot) {
      if (!IsSpare(slot)) continue;
      for (size_t other = 0; other < row_.size(); ++other) {
        if (IsOn(expert, rank_of_slot_[other]) || IsOn(row_[other], rank_of_slot_[slot])) continue;
        if (to == row_.size() || std::pair(carried_[slot], load_[row_[other]]) <
                                     std::pair(carried_[to], load_[row_[from]])) {
          to = slot;
          from = other;
        }
      }
    }
    // Counting slots shows that there is one: were every expert of the other ranks on this one too,
    // each of them would be a hot one with its two ranks, and there would be fewer spare slots than
    // hot experts.
    BALLAST_CHECK(to < row_.size());
    row_[to] = std::exchange(row_[from], expert);
    return 2;
  }

  const Topology& topology_;
  const std::span<const int64_t> load_;
  std::vector<int32_t>& row_;
  std::vector<int32_t> least_hosts_;   // [E]
  std::vector<int32_t> num_hosts_;     // [E]
  std::vector<int32_t> carried_;       // [num_slots]
  std::vector<int32_t> rank_of_slot_;  // [num_slots]
};

}  // namespace

int32_t NumHotExperts(const Topology& topology, int32_t num_experts) {
  int64_t useful = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    useful += std::min(topology.slots_on(r), num_experts);
  }
  return static_cast<int32_t>(std::clamp<int64_t>(useful - num_experts, 0, num_experts));
}

absl::Status CheckRules(const std::string& policy, const PlacementRules& kept,
                        const PlacementRules& wanted, const Topology& topology,
                        int32_t num_experts) {
  if (wanted.coverage < 0 || wanted.coverage > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("coverage is ", wanted.coverage, ", allowed: 0, 1"));
  }
  if (wanted.coverage > kept.coverage) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", policy,
                     " cannot keep coverage 1: it does not see to it that the hottest "
                     "experts are on two ranks; allowed: coverage 0, or policy regret"));
  }
  if (wanted.node_local && !kept.node_local) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy ", policy,
                     " cannot keep copies on the node of their expert (node-local); allowed: "
                     "policy regret"));
  }
  if (wanted.coverage == 0) return absl::OkStatus();
  if (NumHotExperts(topology, num_experts) == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "coverage 1 needs a spare slot; ", topology.num_slots(), " slots on ", topology.num_ranks(),
        " ranks can hold each of ", num_experts, " experts on one rank only"));
  }
  if (wanted.node_local && topology.num_nodes() > 1) {
    return absl::InvalidArgumentError(
        "coverage 1 and node-local cannot both be kept on several nodes: the hot experts may all "
        "be at home on one node; allowed: one of the two");
  }
  return absl::OkStatus();
}

int32_t CoverHotExperts(const Topology& topology, std::span<const int64_t> load,
                        std::vector<int32_t>* row) {
  return Cover(topology, load, row).Run();
}

}  // namespace ballast
