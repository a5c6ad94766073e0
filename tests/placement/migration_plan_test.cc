#include "placement/migration_plan.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <set>
#include <tuple>

#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::RandomPlacement;
using testing::RandomRow;
using testing::RandomTopology;

std::vector<Placement::LayerRow> RandomRows(Random* random, const Placement& current) {
  std::vector<Placement::LayerRow> rows;
  for (int32_t layer = current.num_layers() - 1; layer >= 0; --layer) {
    if (random->Below(3) == 0) continue;
    rows.push_back(
        {layer, RandomRow(random, current.topology().num_slots(), current.num_experts())});
  }
  return rows;
}

// Copies that enter a rank that lacked them when `from` becomes `to`.
int64_t CopiesMoved(const Topology& topology, std::span<const int32_t> from,
                    std::span<const int32_t> to) {
  int64_t moved = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    const auto on_rank = [&](std::span<const int32_t> row) {
      const auto slots = row.subspan(topology.slot_offsets[r], topology.slots_on(r));
      return std::set<int32_t>(slots.begin(), slots.end());
    };
    const std::set<int32_t> before = on_rank(from);
    for (int32_t e : on_rank(to)) moved += e != kNoExpert && before.count(e) == 0;
  }
  return moved;
}

// The source that the contract names, when each rank has sent `sends` copies so far and the ranks
// of `relays` have received the expert by earlier moves.
int32_t ExpectedSource(const Placement& current, const Move& move,
                       const std::vector<int32_t>& sends, const std::set<int32_t>& relays) {
  const Topology& topology = current.topology();
  const int32_t node = topology.node_of_rank[topology.rank_of_slot(move.to_slot)];
  std::tuple<bool, int32_t, bool, int32_t> best{true, 1 << 30, true, -1};
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    const bool holds = current.Hosts(move.layer, move.expert, r);
    if (!holds && relays.count(r) == 0) continue;
    best = std::min(best, {topology.node_of_rank[r] != node, sends[r], !holds, r});
  }
  return std::get<3>(best);
}

// How many moves lie between a holder and the receiver of moves[i], that one included; -1 where no
// holder is reached. Looks at who sends to whom alone, not at the order of the moves.
int32_t HopsFromHolder(const Placement& current, const std::vector<Move>& moves, size_t i) {
  int32_t rank = moves[i].from_rank;
  for (int32_t hops = 1; hops <= static_cast<int32_t>(moves.size()); ++hops) {
    if (current.Hosts(moves[i].layer, moves[i].expert, rank)) return hops;
    const auto feeds = std::find_if(moves.begin(), moves.end(), [&](const Move& m) {
      return m.layer == moves[i].layer && m.expert == moves[i].expert &&
             current.topology().rank_of_slot(m.to_slot) == rank;
    });
    if (feeds == moves.end()) return -1;
    rank = feeds->from_rank;
  }
  return -1;
}

TEST_CASE("a plan brings each expert once to each rank that lacked it", "[placement][plan]") {
  const auto current = Placement::Create(1, 4, Topology::Uniform(2, 3), {0, 1, 0, 2, 3, -1}, 5);
  REQUIRE(current.ok());
  // Rank 0 permutes its experts and gains 3; rank 1 gains 0, twice.
  const auto plan = MakeMigrationPlan(*current, {{0, {1, 0, 3, 0, 0, 2}}}, 1);
  REQUIRE(plan.ok());
  REQUIRE(plan->base_epoch == 5);
  REQUIRE(plan->moves == std::vector<Move>{{0, 3, 1, 2}, {0, 0, 0, 3}});
  const auto target = plan->Apply(*current);
  REQUIRE(target.ok());
  REQUIRE(target->epoch() == 6);
  REQUIRE(target->fingerprint() == plan->target_fingerprint);
}

TEST_CASE("copies come from the node and from the rank that sends least", "[placement][plan]") {
  // Four ranks on two nodes. Expert 0 is on ranks 0, 1 and 2; experts 1 and 2 go elsewhere.
  const Topology topology = Topology::Uniform(4, 2, 2);
  const auto current = Placement::Create(1, 3, topology, {0, 1, 0, 2, 0, 1, 1, 2}, 0);
  REQUIRE(current.ok());
  const auto plan = MakeMigrationPlan(*current, {{0, {2, 1, 0, 1, 0, 2, 1, 0}}}, 1);
  REQUIRE(plan.ok());
  // 2 to rank 0 from rank 1; 1 to rank 1 from rank 0; 2 to rank 2 from 3; 0 to rank 3 from 2.
  REQUIRE(plan->moves == std::vector<Move>{{0, 2, 1, 0}, {0, 1, 0, 3}, {0, 2, 3, 5}, {0, 0, 2, 7}});
}

TEST_CASE("an expert that goes to many ranks is relayed and enters each node once",
          "[placement][plan]") {
  // Six ranks on two nodes; expert 0 is on rank 0 alone and goes to all others.
  const auto current = Placement::Create(1, 6, Topology::Uniform(6, 2, 2),
                                         {0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1}, 0);
  REQUIRE(current.ok());
  const auto plan = MakeMigrationPlan(*current, {{0, {0, -1, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0}}}, 1);
  REQUIRE(plan.ok());
  // 0 sends to 1, which relays to 2. Of these three 2 has sent nothing: it feeds the other node,
  // where 3 feeds 4 and 4 feeds 5.
  REQUIRE(plan->moves ==
          std::vector<Move>{{0, 0, 0, 3}, {0, 0, 1, 5}, {0, 0, 2, 7}, {0, 0, 3, 9}, {0, 0, 4, 11}});
  REQUIRE(plan->Apply(*current).ok());
}

TEST_CASE("an expert alone is sent at most once by each rank of a node",
          "[placement][plan][property]") {
  Random random(5);
  for (int i = 0; i < 200; ++i) {
    const int32_t ranks = 2 + static_cast<int32_t>(random.Below(15));
    // Expert r is at home on rank r; expert 0 goes to some of the others.
    std::vector<int32_t> before, after;
    for (int32_t r = 0; r < ranks; ++r) {
      for (std::vector<int32_t>* row : {&before, &after}) row->insert(row->end(), {r, kNoExpert});
      if (r > 0 && random.Below(3) > 0) after.back() = 0;
    }
    const auto current = Placement::Create(1, ranks, Topology::Uniform(ranks, 2), before, 0);
    const auto plan = MakeMigrationPlan(*current, {{0, after}}, 1);
    REQUIRE(plan.ok());
    std::vector<int32_t> sends(ranks, 0);
    for (const Move& move : plan->moves) ++sends[move.from_rank];
    REQUIRE(*std::max_element(sends.begin(), sends.end()) <= 1);
  }
}

TEST_CASE("a source that has nothing to send is refused", "[placement][plan][errors]") {
  const auto current =
      Placement::Create(1, 4, Topology::Uniform(4, 2), {0, -1, 1, -1, 2, -1, 3, -1}, 0);
  const auto plan = MakeMigrationPlan(*current, {{0, {0, -1, 1, 0, 2, 0, 3, 0}}}, 1);
  REQUIRE(plan.ok());
  REQUIRE(plan->moves == std::vector<Move>{{0, 0, 0, 3}, {0, 0, 1, 5}, {0, 0, 2, 7}});
  const auto with_sources = [&](std::vector<int32_t> sources) {
    MigrationPlan other = *plan;
    for (size_t i = 0; i < sources.size(); ++i) other.moves[i].from_rank = sources[i];
    return other.Apply(*current).status();
  };
  REQUIRE(with_sources({0, 0, 0}).ok());
  REQUIRE(with_sources({0, 0, 1}).ok());
  // A rank that holds something else, one that receives it later, itself, a cycle, no rank.
  for (const std::vector<int32_t>& sources : std::vector<std::vector<int32_t>>{
           {2, 1, 2}, {3, 1, 2}, {1, 1, 2}, {2, 1, 0}, {4, 1, 2}, {-2, 1, 2}, {1 << 30, 1, 2}}) {
    const absl::Status status = with_sources(sources);
    REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
    const std::string text(status.message());
    CAPTURE(text);
    REQUIRE(text.find("neither holds it nor receives it by an earlier move") != std::string::npos);
  }
}

TEST_CASE("every copy of a plan can come from the checkpoint", "[placement][plan]") {
  const auto current = Placement::Create(1, 2, Topology::Uniform(2, 2), {0, -1, 1, -1}, 0);
  const auto plan = MakeMigrationPlan(*current, {{0, {0, 1, 1, 0}}}, 1, CopySource::kFile);
  REQUIRE(plan.ok());
  REQUIRE(plan->moves ==
          std::vector<Move>{{0, 1, Move::kFromFile, 1}, {0, 0, Move::kFromFile, 3}});
  const auto read = MigrationPlan::Deserialize(plan->Serialize());
  REQUIRE(read.ok());
  REQUIRE(*read == *plan);
  REQUIRE(read->Apply(*current).ok());
  MigrationPlan other = *plan;
  other.moves[0].from_rank = Move::kFromFile - 1;
  REQUIRE_FALSE(MigrationPlan::Deserialize(other.Serialize()).ok());
}

TEST_CASE("rows that are not valid make no plan", "[placement][plan][errors]") {
  const auto current = Placement::Create(1, 2, Topology::Uniform(2, 1), {0, 1}, 0);
  REQUIRE_FALSE(MakeMigrationPlan(*current, {{0, {0, 0}}}, 1).ok());
  REQUIRE_FALSE(MakeMigrationPlan(*current, {{1, {0, 1}}}, 1).ok());
  const auto none = MakeMigrationPlan(*current, {{0, {0, 1}}}, 1);
  REQUIRE(none.ok());
  REQUIRE(none->rows.empty());
  REQUIRE(none->moves.empty());
}

TEST_CASE("plans between random placements are complete and apply", "[placement][plan][property]") {
  Random random(1);
  for (int i = 0; i < 500; ++i) {
    const Placement current = RandomPlacement(&random, RandomTopology(&random, 6), 3);
    const Topology& topology = current.topology();
    const std::vector<Placement::LayerRow> rows = RandomRows(&random, current);
    const auto plan = MakeMigrationPlan(current, rows, 1 + i);
    REQUIRE(plan.ok());
    const auto target = plan->Apply(current);
    REQUIRE(target.ok());
    REQUIRE(*target == *current.With(rows, current.epoch() + 1));

    std::set<std::tuple<int32_t, int32_t, int32_t>> entered;
    int64_t expected = 0;
    int violations = 0;
    for (const auto& row : rows) {
      expected += CopiesMoved(topology, current.expert_of_slot(row.layer), row.expert_of_slot);
    }
    std::vector<int32_t> sends(topology.num_ranks(), 0);
    std::map<std::pair<int32_t, int32_t>, std::set<int32_t>> relays;
    std::map<std::tuple<int32_t, int32_t, int32_t>, int32_t> entered_node;
    for (size_t m = 0; m < plan->moves.size(); ++m) {
      const Move& move = plan->moves[m];
      std::set<int32_t>& relays_of_it = relays[{move.layer, move.expert}];
      violations += move.from_rank != ExpectedSource(current, move, sends, relays_of_it);
      ++sends[move.from_rank];
      const int32_t to = topology.rank_of_slot(move.to_slot);
      relays_of_it.insert(to);
      const int32_t node = topology.node_of_rank[to];
      if (topology.node_of_rank[move.from_rank] != node) {
        violations += ++entered_node[{move.layer, move.expert, node}] > 1;
      }
      violations += !entered.insert({move.layer, move.expert, to}).second;
      violations += HopsFromHolder(current, plan->moves, m) < 1;
      violations += current.Hosts(move.layer, move.expert, to);
      violations += target->expert_of_slot(move.layer)[move.to_slot] != move.expert;
    }
    violations +=
        !std::is_sorted(plan->moves.begin(), plan->moves.end(), [](const Move& a, const Move& b) {
          return std::tie(a.layer, a.to_slot) < std::tie(b.layer, b.to_slot);
        });
    REQUIRE(violations == 0);
    REQUIRE(static_cast<int64_t>(plan->moves.size()) == expected);
    const auto back = MigrationPlan::Deserialize(plan->Serialize());
    REQUIRE(back.ok());
    REQUIRE(*back == *plan);
  }
}

TEST_CASE("damaged plans are refused or do not apply", "[placement][plan][property]") {
  Random random(2);
  const Placement current = RandomPlacement(&random, Topology::Uniform(3, 3), 3);
  const auto plan = MakeMigrationPlan(current, RandomRows(&random, current), 9);
  REQUIRE(plan.ok());
  REQUIRE_FALSE(plan->moves.empty());
  const std::vector<std::byte> good = plan->Serialize();
  for (size_t length = 0; length < good.size(); ++length) {
    REQUIRE_FALSE(MigrationPlan::Deserialize(std::span(good).first(length)).ok());
  }
  int wrong_outcomes = 0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> bad = good;
    for (uint32_t k = 0; k <= random.Below(3); ++k) {
      const size_t at = random.Below(static_cast<uint32_t>(bad.size()));
      bad[at] = static_cast<std::byte>(random.Below(2) ? random.Below(256) : random.Below(3) - 1);
    }
    if (random.Below(8) == 0) bad.resize(random.Below(static_cast<uint32_t>(bad.size())) + 8);
    const auto parsed = MigrationPlan::Deserialize(bad);
    if (!parsed.ok()) continue;
    const auto target = parsed->Apply(current);
    // Only the plan id and which of several sources sends are free.
    wrong_outcomes += target.ok() && target->fingerprint() != plan->target_fingerprint;
  }
  REQUIRE(wrong_outcomes == 0);
}

TEST_CASE("a plan applies only to the placement it starts from", "[placement][plan][errors]") {
  Random random(3);
  const Placement current = RandomPlacement(&random, Topology::Uniform(3, 3), 2);
  const auto plan =
      MakeMigrationPlan(current, {{0, RandomRow(&random, 9, current.num_experts())}}, 1);
  REQUIRE(plan.ok());
  const auto later = current.With({}, current.epoch() + 1);
  REQUIRE(plan->Apply(*later).status().code() == absl::StatusCode::kFailedPrecondition);
  MigrationPlan other = *plan;
  ++other.target_fingerprint;
  REQUIRE(other.Apply(current).status().code() == absl::StatusCode::kInvalidArgument);
  other = *plan;
  other.moves.push_back({0, 0, 0, 0});
  REQUIRE_FALSE(other.Apply(current).ok());
}

TEST_CASE("aligning a row undoes a renaming of ranks and slots", "[placement][align]") {
  const Topology topology = Topology::Uniform(4, 2, 2);
  const std::vector<int32_t> current = {0, 1, 2, 3, 4, 5, 6, 7};
  REQUIRE(AlignRow(topology, current, {3, 2, 1, 0, 7, 6, 5, 4}) == current);
  // Ranks of different nodes are not exchanged.
  REQUIRE(AlignRow(topology, current, {4, 5, 2, 3, 0, 1, 6, 7}) ==
          std::vector<int32_t>{4, 5, 2, 3, 0, 1, 6, 7});
}

TEST_CASE("aligning keeps what a node holds and moves least", "[placement][align][property]") {
  Random random(4);
  for (int i = 0; i < 500; ++i) {
    const int32_t nodes = 1 + random.Below(2);
    const Topology topology = Topology::Uniform(nodes * (1 + random.Below(4)), 3, nodes);
    const int32_t num_slots = topology.num_slots();
    const int32_t num_experts = 1 + random.Below(num_slots);
    const std::vector<int32_t> current = RandomRow(&random, num_slots, num_experts);
    const std::vector<int32_t> row = RandomRow(&random, num_slots, num_experts);
    const std::vector<int32_t> aligned = AlignRow(topology, current, row);

    // By brute force over the names of the ranks of each node.
    const int32_t per_node = topology.num_ranks() / nodes;
    for (int32_t node = 0; node < nodes; ++node) {
      const int32_t first = node * per_node * 3;
      const auto part = [&](const std::vector<int32_t>& r) {
        return std::vector<int32_t>(r.begin() + first, r.begin() + first + per_node * 3);
      };
      const Topology one_node = Topology::Uniform(per_node, 3);
      std::vector<int32_t> name(per_node);
      for (int32_t r = 0; r < per_node; ++r) name[r] = r;
      int64_t least = 1 << 20;
      do {
        std::vector<int32_t> renamed;
        for (int32_t r : name) {
          renamed.insert(renamed.end(), row.begin() + first + r * 3,
                         row.begin() + first + r * 3 + 3);
        }
        least = std::min(least, CopiesMoved(one_node, part(current), renamed));
      } while (std::next_permutation(name.begin(), name.end()));
      REQUIRE(CopiesMoved(one_node, part(current), part(aligned)) == least);
      std::vector<int32_t> before = part(row);
      std::vector<int32_t> after = part(aligned);
      std::sort(before.begin(), before.end());
      std::sort(after.begin(), after.end());
      REQUIRE(before == after);
    }
    REQUIRE(AlignRow(topology, current, current) == current);
  }
}

}  // namespace
}  // namespace ballast
