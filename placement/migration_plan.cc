#include "placement/migration_plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "base/status.h"

namespace ballast {
namespace {

static_assert(std::endian::native == std::endian::little, "plans travel as little-endian bytes");

constexpr uint32_t kMagic = 0x31504d42;  // "BMP1"

absl::Status Malformed(const char* what) {
  return absl::InvalidArgumentError(absl::StrCat("malformed migration plan: ", what));
}

template <typename T>
void Append(T value, std::vector<std::byte>* out) {
  const size_t at = out->size();
  out->resize(at + sizeof(T));
  std::memcpy(out->data() + at, &value, sizeof(T));
}

// Takes values off the front of `bytes`.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <typename T>
  bool Read(T* value) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (bytes_.size() < sizeof(T)) return false;
    std::memcpy(value, bytes_.data(), sizeof(T));
    bytes_ = bytes_.subspan(sizeof(T));
    return true;
  }
  // Reads a number of elements, which must fit in what is left.
  bool ReadCount(size_t least_bytes_each, uint32_t* count) {
    return Read(count) && *count <= bytes_.size() / least_bytes_each;
  }
  bool empty() const { return bytes_.empty(); }

 private:
  std::span<const std::byte> bytes_;
};

// The copies that `rows` bring to ranks that lack them: per (layer, expert, rank) one move, to the
// lowest such slot, from the checkpoint. REQUIRES rows in ascending layers and valid for `current`.
std::vector<Move> EnteringCopies(const Placement& current,
                                 std::span<const Placement::LayerRow> rows) {
  const Topology& topology = current.topology();
  std::vector<Move> moves;
  for (const Placement::LayerRow& row : rows) {
    for (int32_t r = 0; r < topology.num_ranks(); ++r) {
      const size_t first_of_rank = moves.size();
      for (int32_t s = topology.slot_offsets[r]; s < topology.slot_offsets[r + 1]; ++s) {
        const int32_t e = row.expert_of_slot[s];
        if (e == kNoExpert || current.Hosts(row.layer, e, r)) continue;
        const bool again = std::any_of(moves.begin() + static_cast<ptrdiff_t>(first_of_rank),
                                       moves.end(), [e](const Move& m) { return m.expert == e; });
        if (!again)
          moves.push_back(
              {.layer = row.layer, .expert = e, .from_rank = Move::kFromFile, .to_slot = s});
      }
    }
  }
  return moves;
}

// Calls visit(rank, relays) for every rank that can be the source of moves[i], holders first.
// REQUIRES moves sorted by layer, their slots valid
template <typename Visit>
void ForEachSource(const Placement& current, std::span<const Move> moves, size_t i,
                   const Visit& visit) {
  const Move& move = moves[i];
  const LayerHosts& hosts = current.hosts(move.layer);
  const int32_t end = hosts.host_offsets[move.expert + 1];
  for (int32_t h = hosts.host_offsets[move.expert]; h < end; ++h) {
    visit(hosts.host_rank[h], /*relays=*/false);
  }
  for (size_t j = i; j-- > 0 && moves[j].layer == move.layer;) {
    if (moves[j].expert != move.expert) continue;
    visit(current.topology().rank_of_slot(moves[j].to_slot), /*relays=*/true);
  }
}

void ChooseSources(const Placement& current, std::vector<Move>* moves) {
  const Topology& topology = current.topology();
  std::vector<int32_t> sends(topology.num_ranks(), 0);
  for (size_t i = 0; i < moves->size(); ++i) {
    const int32_t node = topology.node_of_rank[topology.rank_of_slot((*moves)[i].to_slot)];
    std::tuple<bool, int32_t, bool, int32_t> best{true, std::numeric_limits<int32_t>::max(), true,
                                                  -1};
    ForEachSource(current, *moves, i, [&](int32_t rank, bool relays) {
      best = std::min(best, {topology.node_of_rank[rank] != node, sends[rank], relays, rank});
    });
    (*moves)[i].from_rank = std::get<3>(best);
    ++sends[(*moves)[i].from_rank];
  }
}

bool HasSource(const Placement& current, std::span<const Move> moves, size_t i) {
  bool found = moves[i].from_rank == Move::kFromFile;
  ForEachSource(current, moves, i,
                [&](int32_t rank, bool) { found = found || rank == moves[i].from_rank; });
  return found;
}

// For each row i of a square cost matrix the column assigned to it, at the least total cost.
// SOURCE Kuhn 1955; the O(n^3) form with row and column potentials, columns and rows from 1.
std::vector<int32_t> AssignAtLeastCost(const std::vector<std::vector<int64_t>>& cost) {
  const size_t n = cost.size();
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> row_price(n + 1, 0);
  std::vector<int64_t> column_price(n + 1, 0);
  std::vector<size_t> row_of(n + 1, 0);  // row assigned to a column; 0: none
  for (size_t row = 1; row <= n; ++row) {
    std::vector<int64_t> slack(n + 1, kFar);
    std::vector<size_t> previous(n + 1, 0);
    std::vector<bool> used(n + 1, false);
    size_t column = 0;
    row_of[0] = row;
    do {  // grow the tree of tight edges from `row` until it meets a free column
      used[column] = true;
      int64_t least = kFar;
      size_t nearest = 0;
      for (size_t j = 1; j <= n; ++j) {
        if (used[j]) continue;
        const size_t i = row_of[column];
        const int64_t reduced = cost[i - 1][j - 1] - row_price[i] - column_price[j];
        if (reduced < slack[j]) {
          slack[j] = reduced;
          previous[j] = column;
        }
        if (slack[j] < least) {
          least = slack[j];
          nearest = j;
        }
      }
      for (size_t j = 0; j <= n; ++j) {
        if (used[j]) {
          row_price[row_of[j]] += least;
          column_price[j] -= least;
        } else if (slack[j] != kFar) {
          slack[j] -= least;
        }
      }
      column = nearest;
    } while (row_of[column] != 0);
    while (column != 0) {  // flip the path
      row_of[column] = row_of[previous[column]];
      column = previous[column];
    }
  }
  std::vector<int32_t> column_of(n);
  for (size_t j = 1; j <= n; ++j) column_of[row_of[j] - 1] = static_cast<int32_t>(j - 1);
  return column_of;
}

// How many different experts of `wanted` are in `held`, which is sorted.
int64_t Overlap(std::span<const int32_t> wanted, std::span<const int32_t> held) {
  std::vector<int32_t> different(wanted.begin(), wanted.end());
  std::sort(different.begin(), different.end());
  different.erase(std::unique(different.begin(), different.end()), different.end());
  return std::count_if(different.begin(), different.end(), [&](int32_t e) {
    return e != kNoExpert && std::binary_search(held.begin(), held.end(), e);
  });
}

// Orders `wanted` so that each item that `held` has too stays in its slot; the rest fill the other
// slots in order.
void KeepSlots(std::span<const int32_t> held, std::vector<int32_t> wanted, int32_t* out) {
  std::vector<bool> filled(held.size(), false);
  for (size_t i = 0; i < held.size(); ++i) {
    const auto it = std::find(wanted.begin(), wanted.end(), held[i]);
    if (it == wanted.end()) continue;
    out[i] = held[i];
    filled[i] = true;
    wanted.erase(it);
  }
  size_t next = 0;
  for (size_t i = 0; i < held.size(); ++i) {
    if (!filled[i]) out[i] = wanted[next++];
  }
}

}  // namespace

absl::StatusOr<MigrationPlan> MakeMigrationPlan(const Placement& current,
                                                std::vector<Placement::LayerRow> rows,
                                                int64_t plan_id, CopySource source) {
  BALLAST_ASSIGN_OR_RETURN(const Placement target, current.With(rows, current.epoch() + 1));
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return a.layer < b.layer; });
  std::erase_if(rows, [&](const Placement::LayerRow& row) {
    const std::span<const int32_t> now = current.expert_of_slot(row.layer);
    return std::equal(now.begin(), now.end(), row.expert_of_slot.begin());
  });
  MigrationPlan plan{.plan_id = plan_id,
                     .base_epoch = current.epoch(),
                     .rows = std::move(rows),
                     .moves = {},
                     .target_fingerprint = target.fingerprint()};
  plan.moves = EnteringCopies(current, plan.rows);
  if (source == CopySource::kRanks) ChooseSources(current, &plan.moves);
  return plan;
}

absl::StatusOr<Placement> MigrationPlan::Apply(const Placement& current) const {
  if (current.epoch() != base_epoch) {
    return absl::FailedPreconditionError(absl::StrCat("plan ", plan_id, " starts from epoch ",
                                                      base_epoch, "; epoch ", current.epoch(),
                                                      " is in force"));
  }
  BALLAST_ASSIGN_OR_RETURN(Placement target, current.With(rows, base_epoch + 1));
  const std::vector<Move> expected = EnteringCopies(current, rows);
  if (moves.size() != expected.size()) {
    return absl::InvalidArgumentError(absl::StrCat("plan ", plan_id, " has ", moves.size(),
                                                   " moves; its rows need ", expected.size()));
  }
  for (size_t i = 0; i < moves.size(); ++i) {
    Move unsourced = moves[i];
    unsourced.from_rank = Move::kFromFile;
    if (unsourced != expected[i]) {
      return absl::InvalidArgumentError(
          absl::StrCat("plan ", plan_id, ": move ", i, " (layer ", moves[i].layer, ", expert ",
                       moves[i].expert, ", rank ", moves[i].from_rank, " to slot ",
                       moves[i].to_slot, ") is not one that its rows need"));
    }
    if (!HasSource(current, moves, i)) {
      return absl::InvalidArgumentError(
          absl::StrCat("plan ", plan_id, ": move ", i, " takes layer ", moves[i].layer, ", expert ",
                       moves[i].expert, " from rank ", moves[i].from_rank,
                       ", which neither holds it nor receives it by an earlier move"));
    }
  }
  if (target.fingerprint() != target_fingerprint) {
    return absl::InvalidArgumentError(absl::StrCat("plan ", plan_id, " leads to fingerprint ",
                                                   absl::Hex(target.fingerprint()), " instead of ",
                                                   absl::Hex(target_fingerprint)));
  }
  return target;
}

std::vector<std::byte> MigrationPlan::Serialize() const {
  std::vector<std::byte> out;
  Append(kMagic, &out);
  Append(plan_id, &out);
  Append(base_epoch, &out);
  Append(target_fingerprint, &out);
  Append(static_cast<uint32_t>(rows.size()), &out);
  for (const Placement::LayerRow& row : rows) {
    Append(row.layer, &out);
    Append(static_cast<uint32_t>(row.expert_of_slot.size()), &out);
    for (int32_t expert : row.expert_of_slot) Append(expert, &out);
  }
  Append(static_cast<uint32_t>(moves.size()), &out);
  for (const Move& move : moves) Append(move, &out);
  return out;
}

absl::StatusOr<MigrationPlan> MigrationPlan::Deserialize(std::span<const std::byte> bytes) {
  static_assert(sizeof(Move) == 4 * sizeof(int32_t));
  constexpr size_t kLeastRowBytes = sizeof(int32_t) + sizeof(uint32_t);
  Reader reader(bytes);
  MigrationPlan plan;
  uint32_t magic = 0;
  if (!reader.Read(&magic) || magic != kMagic) return Malformed("wrong first bytes");
  uint32_t num_rows = 0;
  if (!reader.Read(&plan.plan_id) || !reader.Read(&plan.base_epoch) ||
      !reader.Read(&plan.target_fingerprint) || !reader.ReadCount(kLeastRowBytes, &num_rows)) {
    return Malformed("cut off in the head");
  }
  if (plan.plan_id < 1 || plan.base_epoch < 0 ||
      plan.base_epoch == std::numeric_limits<int64_t>::max()) {
    return Malformed("plan id or epoch out of range");
  }
  for (uint32_t i = 0; i < num_rows; ++i) {
    Placement::LayerRow row{};
    uint32_t num_slots = 0;
    if (!reader.Read(&row.layer) || !reader.ReadCount(sizeof(int32_t), &num_slots)) {
      return Malformed("cut off in a row");
    }
    row.expert_of_slot.resize(num_slots);
    for (int32_t& expert : row.expert_of_slot) {
      if (!reader.Read(&expert) || expert < kNoExpert) return Malformed("bad expert in a row");
    }
    if (row.layer < 0 || (!plan.rows.empty() && row.layer <= plan.rows.back().layer)) {
      return Malformed("layers of rows do not ascend");
    }
    plan.rows.push_back(std::move(row));
  }
  uint32_t num_moves = 0;
  if (!reader.ReadCount(sizeof(Move), &num_moves)) return Malformed("cut off before the moves");
  for (uint32_t i = 0; i < num_moves; ++i) {
    Move move{};
    if (!reader.Read(&move)) return Malformed("cut off in a move");
    if (move.layer < 0 || move.expert < 0 || move.from_rank < Move::kFromFile || move.to_slot < 0) {
      return Malformed("negative number in a move");
    }
    plan.moves.push_back(move);
  }
  if (!reader.empty()) return Malformed("bytes after the end");
  return plan;
}

bool MigrationPlan::operator==(const MigrationPlan& other) const {
  return plan_id == other.plan_id && base_epoch == other.base_epoch &&
         target_fingerprint == other.target_fingerprint && moves == other.moves &&
         std::equal(rows.begin(), rows.end(), other.rows.begin(), other.rows.end(),
                    [](const auto& a, const auto& b) {
                      return a.layer == b.layer && a.expert_of_slot == b.expert_of_slot;
                    });
}

std::vector<int32_t> AlignRow(const Topology& topology, std::span<const int32_t> current_row,
                              std::vector<int32_t> row) {
  const int32_t num_ranks = topology.num_ranks();
  const auto on_rank = [&](std::span<const int32_t> slots, int32_t r) {
    return slots.subspan(topology.slot_offsets[r], topology.slots_on(r));
  };
  std::vector<int32_t> aligned(row.size());
  std::vector<bool> done(num_ranks, false);
  for (int32_t leader = 0; leader < num_ranks; ++leader) {
    if (done[leader]) continue;
    std::vector<int32_t> ranks;  // whose contents may change places: one node, one size
    for (int32_t r = leader; r < num_ranks; ++r) {
      if (topology.node_of_rank[r] != topology.node_of_rank[leader] ||
          topology.slots_on(r) != topology.slots_on(leader)) {
        continue;
      }
      ranks.push_back(r);
      done[r] = true;
    }
    // One expert kept is worth more than all the ranks of the group keeping their names.
    const int64_t n = static_cast<int64_t>(ranks.size());
    std::vector<std::vector<int64_t>> cost(n, std::vector<int64_t>(n));
    for (int64_t j = 0; j < n; ++j) {
      const std::span<const int32_t> now = on_rank(current_row, ranks[j]);
      std::vector<int32_t> held(now.begin(), now.end());
      std::sort(held.begin(), held.end());
      for (int64_t i = 0; i < n; ++i) {
        cost[i][j] = -(n + 1) * Overlap(on_rank(row, ranks[i]), held) - (i == j ? 1 : 0);
      }
    }
    const std::vector<int32_t> new_name = AssignAtLeastCost(cost);
    for (int64_t i = 0; i < n; ++i) {
      const std::span<const int32_t> wanted = on_rank(row, ranks[i]);
      const int32_t to = ranks[new_name[i]];
      KeepSlots(on_rank(current_row, to), {wanted.begin(), wanted.end()},
                aligned.data() + topology.slot_offsets[to]);
    }
  }
  return aligned;
}

}  // namespace ballast
