#ifndef BALLAST_PLACEMENT_MIGRATION_PLAN_H_
#define BALLAST_PLACEMENT_MIGRATION_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"

namespace ballast {

// One expert that enters a rank that lacked it.
struct Move {
  // Source of an expert that the receiver reads from the checkpoint itself.
  static constexpr int32_t kFromFile = -1;

  int32_t layer;
  int32_t expert;
  int32_t from_rank;  // one that holds the expert, or has it by an earlier move; or kFromFile
  int32_t to_slot;    // a slot of the receiving rank

  bool operator==(const Move&) const = default;
};

// How to get from one placement to the next: the rows that change, and the copies to be made first.
// A row may also permute experts among the slots of a rank, or empty slots: that moves no bytes.
struct MigrationPlan {
  int64_t plan_id = 0;     // from 1, rising
  int64_t base_epoch = 0;  // the epoch it starts from; it ends in base_epoch + 1
  std::vector<Placement::LayerRow> rows;
  std::vector<Move> moves;  // sorted by (layer, to_slot)
  uint64_t target_fingerprint = 0;

  // The placement after the plan.
  // ERRORS kFailedPrecondition: `current` is not the placement the plan starts from
  //        kInvalidArgument: a row or a move does not fit, a source neither holds its expert nor
  //        has it by an earlier move, or the outcome has another fingerprint
  absl::StatusOr<Placement> Apply(const Placement& current) const;

  // Little-endian: "BMP1", plan id, base epoch, fingerprint, rows, moves.
  std::vector<std::byte> Serialize() const;
  // Checks the form only; Apply checks the content against a placement.
  // ERRORS kInvalidArgument on any malformed input; never reads outside `bytes`
  static absl::StatusOr<MigrationPlan> Deserialize(std::span<const std::byte> bytes);
  bool operator==(const MigrationPlan&) const;
};

// Where the copies of a plan come from: the memory of ranks, or the checkpoint.
enum class CopySource : uint8_t { kRanks, kFile };

// Builds the plan from `current` to the same placement with `rows` replaced. Rows that change
// nothing are left out. The source of move i, which brings expert e of layer l to rank r:
//
//   candidates  ranks that hold (l, e) in `current`, and those that receive it by a move before i:
//               they relay it, chunk by chunk while it still arrives
//   source      the candidate q with the least (node_of_rank[q] != node_of_rank[r], sends of q by
//               moves before i, q relays, q)
//
// So an expert enters a node once and goes on from there; where it goes to many ranks of a node, no
// rank sends it to all of them. As sources come before those they serve, no plan waits on itself.
// With CopySource::kFile every receiver reads for itself.
// ERRORS kInvalidArgument when the rows are not valid for `current`
absl::StatusOr<MigrationPlan> MakeMigrationPlan(const Placement& current,
                                                std::vector<Placement::LayerRow> rows,
                                                int64_t plan_id,
                                                CopySource source = CopySource::kRanks);

// Renames slots within each rank, and whole ranks (of equal size) within each node, so that the
// fewest experts enter a rank that lacked them; experts that stay on a rank keep their slots.
// ORDER  optimal assignment; among equals, ranks that keep their name are preferred
// SHAPES row, current_row [num_slots]
std::vector<int32_t> AlignRow(const Topology& topology, std::span<const int32_t> current_row,
                              std::vector<int32_t> row);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_MIGRATION_PLAN_H_
