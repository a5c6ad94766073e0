#ifndef BALLAST_PLACEMENT_PLACEMENT_H_
#define BALLAST_PLACEMENT_PLACEMENT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/layer_hosts.h"

namespace ballast {

// Which slots belong to which rank, and which ranks to which node. Slots are numbered rank by rank.
struct Topology {
  std::vector<int32_t>
      slot_offsets;  // [R+1]; rank r owns slots [slot_offsets[r], slot_offsets[r+1])
  std::vector<int32_t> node_of_rank;  // [R]; nodes are numbered from 0 without gaps

  int32_t num_ranks() const { return static_cast<int32_t>(node_of_rank.size()); }
  int32_t num_slots() const { return slot_offsets.back(); }
  int32_t num_nodes() const;
  int32_t slots_on(int32_t rank) const { return slot_offsets[rank + 1] - slot_offsets[rank]; }
  // REQUIRES 0 <= slot < num_slots().
  int32_t rank_of_slot(int32_t slot) const;

  // `num_ranks` ranks of `slots_per_rank` slots, in `num_nodes` equal nodes.
  // REQUIRES num_ranks % num_nodes == 0.
  static Topology Uniform(int32_t num_ranks, int32_t slots_per_rank, int32_t num_nodes = 1);

  bool operator==(const Topology&) const = default;
};

// Which logical expert each slot of each MoE layer holds, under one epoch. Immutable and cheap to
// copy (the tables are shared); the inverse tables are built once, at construction.
//
// Invariants, checked by Create: expert ids are in [0, E) or kNoExpert; every logical expert has at
// least one slot in every layer. Two copies on one rank can be represented.
// THREADS all const members may be called from any thread.
class Placement {
 public:
  // SHAPES expert_of_slot [num_layers * topology.num_slots()], layer by layer
  // ERRORS kInvalidArgument names the layer, slot or expert that is wrong
  static absl::StatusOr<Placement> Create(int32_t num_layers, int32_t num_experts,
                                          Topology topology, std::vector<int32_t> expert_of_slot,
                                          int64_t epoch);

  // Expert e on rank floor(e * R / E): the experts in order, in blocks as even as can be. Spare
  // slots are empty, or (fill_spare) filled as a ring: the i-th of rank r holds the i-th expert of
  // rank r - d_i, with d = 1, 3, ..., 2, 4, ... round the ranks, so that the copies join many pairs
  // of ranks. With `within_nodes` each node has a ring of its own, and no copy leaves it.
  // ERRORS kInvalidArgument when the slots do not suffice, with both numbers
  static absl::StatusOr<Placement> Contiguous(int32_t num_layers, int32_t num_experts,
                                              const Topology& topology, bool fill_spare,
                                              bool within_nodes = false);

  int32_t num_layers() const { return num_layers_; }
  int32_t num_experts() const { return num_experts_; }
  const Topology& topology() const { return tables_->topology; }
  int64_t epoch() const { return epoch_; }

  // [num_slots] logical expert per slot, or kNoExpert.
  std::span<const int32_t> expert_of_slot(int32_t layer) const;
  const LayerHosts& hosts(int32_t layer) const { return tables_->hosts[layer]; }
  // Number of slots of the layer that hold the expert (at least 1).
  int32_t num_replicas(int32_t layer, int32_t expert) const;
  // Whether the rank holds the expert in the layer.
  bool Hosts(int32_t layer, int32_t expert, int32_t rank) const;

  // The same placement with the rows of some layers replaced, under another epoch.
  struct LayerRow {
    int32_t layer;
    std::vector<int32_t> expert_of_slot;
  };
  absl::StatusOr<Placement> With(std::span<const LayerRow> rows, int64_t epoch) const;

  // Hash of everything but the epoch: equal placements have equal fingerprints on every rank.
  uint64_t fingerprint() const { return tables_->fingerprint; }
  // {"schema":1,"epoch":..,"num_experts":..,"slot_offsets":[..],"node_of_rank":[..],
  //  "fingerprint":"16 hex digits","layers":[[expert per slot],..]}
  std::string ToJson() const;
  // ERRORS kInvalidArgument names the key, its value and what is allowed
  static absl::StatusOr<Placement> FromJson(const std::string& json);

  bool operator==(const Placement& other) const;

 private:
  struct Tables {
    Topology topology;
    std::vector<int32_t> expert_of_slot;  // [L * S]
    std::vector<int32_t> host_offsets;    // [L * (E+1)]
    std::vector<int32_t> host_rank, host_copies, host_slot;
    std::vector<LayerHosts> hosts;  // views into the above
    uint64_t fingerprint = 0;

    // Fills the inverse tables from `topology` and `expert_of_slot`.
    void BuildHosts(int32_t num_layers, int32_t num_experts);
  };
  Placement() = default;

  int32_t num_layers_ = 0;
  int32_t num_experts_ = 0;
  int64_t epoch_ = 0;
  std::shared_ptr<const Tables> tables_;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_PLACEMENT_H_
