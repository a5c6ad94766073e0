#ifndef BALLAST_PLACEMENT_ROW_SEARCH_H_
#define BALLAST_PLACEMENT_ROW_SEARCH_H_

#include <array>
#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

#include "placement/placement.h"
#include "placement/traffic_memory.h"
#include "placement/water_fill.h"

namespace ballast {

// Improves the row of one layer by few changes, each the best of many that are looked at.
//
// A change copies an expert onto a rank, in place of a copy that is not needed or into an empty
// slot, or exchanges two experts of two ranks. Changes are ordered by a first-order estimate; the
// best of them are evaluated by water-filling all scenarios of the traffic memory.
//
//   objective = sum over scenarios of weight * (largest load + 8-power mean of the loads) / 2
//
// ORDER   ties by the lower slot, then the lower expert: same calls, same row
// THREADS one thread at a time; owns its scratch
class RowSearch {
 public:
  // `memory` outlives the search. No rank may get a copy of an expert that is at home on another
  // node if `node_local`; an expert's home is the node of its first copy in the first row.
  RowSearch(const Topology& topology, int32_t num_experts, const TrafficMemory* memory,
            bool node_local);

  // The row to work on. A second copy on one rank is worth nothing and counts as an empty slot.
  void SetRow(std::span<const int32_t> row);
  const std::vector<int32_t>& row() const { return row_; }
  // Ranks that must keep a copy of the expert; 1 until set.
  void SetLeastHosts(int32_t expert, int32_t hosts) { least_hosts_[expert] = hosts; }
  int32_t num_hosts(int32_t expert) const { return static_cast<int32_t>(ranks_of_[expert].size()); }

  // To be called when the memory has a new batch: experts are poured by their size.
  void SortShared();
  // The largest rank load of each lane of `demand`.
  // SHAPES demand [E]
  Lanes LargestLoads(const std::vector<Lanes>& demand);

  // Changes the row until no rank may receive more than `level` copies since StartCounting or no
  // change gains `least_gain` per copy. Returns the copies made.
  int32_t Improve(int32_t level, float least_gain);
  // The first of these changes. Returns its copies, or 0 if there is none.
  int32_t ImproveOnce(int32_t level, float least_gain);
  // The objective of the row.
  float ObjectiveOf();
  // Gives `expert` one more host, whatever that costs the objective: the least costly of the slots
  // that serve least now (as many as Improve evaluates). Where only its own ranks have room,
  // another expert moves there first. False if there is no way.
  bool AddHost(int32_t expert);
  void StartCounting();
  int32_t busiest() const;  // copies received by the rank that received most

 private:
  // Expert `expert` comes to slot `slot`. `from_slot` >= 0: its copy there is exchanged for what
  // `slot` held.
  struct Change {
    int32_t expert, slot, from_slot;
    float estimate;  // of the gain per copy
    int32_t copies() const { return from_slot < 0 ? 1 : 2; }
    bool Before(const Change& other) const {
      return std::tie(slot, expert, from_slot) <
             std::tie(other.slot, other.expert, other.from_slot);
    }
  };
  // From one rank to another: how much dearer the first is, how much more it carries, and one over
  // that. What goes over makes them alike, so the last unit of it gains nothing.
  struct Slope {
    Lanes dearer, difference, inverse;
    Lanes GainOf(const Lanes& moved) const;  // about
  };
  // A change being evaluated.
  struct Trial {
    RankList ranks, ranks_leaving;  // of the expert that comes and of the one that leaves
    std::vector<Lanes> load, flows;
    std::vector<SharedExpert> experts;
  };
  static constexpr size_t kTrials = 4;  // evaluated side by side

  void Fill();
  void PriceRanks();
  void CollectCandidates(int32_t level, float least_estimate);
  void CollectCopies(int32_t slot, float least_estimate);
  void CollectExchanges(int32_t slot, int32_t level, float least_estimate);
  Slope SlopeBetween(int32_t from, int32_t to, const Lanes& difference) const;
  const Change* BestCandidate(float least_gain);
  bool AddHostByMoving(int32_t expert);
  void SetUp(const Change& change, Trial* trial) const;
  float Objective(std::span<const Lanes> load) const;
  void Apply(const Change& change);
  void AddRank(int32_t expert, int32_t rank);
  void DropRank(int32_t expert, int32_t rank);
  bool IsOn(int32_t expert, int32_t rank) const { return place_[Cell(expert, rank)] >= 0; }
  size_t Cell(int32_t expert, int32_t rank) const {
    return static_cast<size_t>(expert) * num_ranks_ + rank;
  }
  void FindPlaces(int32_t expert);
  const Lanes& FlowAt(int32_t expert, int32_t rank) const;
  bool MayOverwrite(int32_t slot) const;
  bool MayComeTo(int32_t expert, int32_t rank) const;
  // Load is to go from ranks that are dearer than the mean to those that are not.
  bool IsDear(int32_t rank) const {
    return total_price_[rank] >= 1.0f / static_cast<float>(num_ranks_);
  }

  const int32_t num_experts_, num_ranks_;
  const TrafficMemory* memory_;
  const bool node_local_;
  std::vector<int32_t> slot_offsets_, rank_of_slot_, node_of_rank_;
  std::vector<int32_t> home_;         // [E] node, or -1 before the first row
  std::vector<int32_t> least_hosts_;  // [E]

  std::vector<int32_t> row_;
  std::vector<RankList> ranks_of_;     // [E]
  std::vector<int16_t> place_;         // [E * R] place of the rank in ranks_of_, or -1
  std::vector<int32_t> shared_;        // experts on several ranks, largest first
  std::vector<int32_t> shared_index_;  // [E] place in shared_, or -1
  std::vector<int32_t> flow_offsets_;  // per shared expert, into flows_
  std::vector<Lanes> flows_;
  std::vector<Lanes> load_, price_;  // [R]
  std::vector<float> total_price_;   // [R] over the scenarios; 1 over all ranks
  std::vector<int32_t> received_;    // [R] copies since StartCounting
  std::vector<Change> candidates_;
  std::vector<Slope> slopes_;  // [R]
  std::array<Trial, kTrials> trials_;
  Trial measured_;  // scratch of Fill and LargestLoads
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_ROW_SEARCH_H_
