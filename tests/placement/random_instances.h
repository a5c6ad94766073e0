// Random placements and counts for property tests.
#ifndef BALLAST_TESTS_PLACEMENT_RANDOM_INSTANCES_H_
#define BALLAST_TESTS_PLACEMENT_RANDOM_INSTANCES_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/random.h"
#include "placement/placement.h"

namespace ballast::testing {

// Up to `most_ranks` ranks of different sizes, some of them possibly without slots, on one to three
// nodes.
inline Topology RandomTopology(Random* random, int32_t most_ranks) {
  Topology topology;
  const int32_t num_ranks = 1 + static_cast<int32_t>(random->Below(most_ranks));
  const int32_t num_nodes = 1 + static_cast<int32_t>(random->Below(std::min(num_ranks, 3)));
  topology.slot_offsets.push_back(0);
  for (int32_t r = 0; r < num_ranks; ++r) {
    const int32_t slots = static_cast<int32_t>(random->Below(5)) + (r == 0 ? 1 : 0);
    topology.slot_offsets.push_back(topology.slot_offsets.back() + slots);
    topology.node_of_rank.push_back(r < num_nodes ? r
                                                  : static_cast<int32_t>(random->Below(num_nodes)));
  }
  return topology;
}

// A valid row: every expert somewhere, the other slots at random, some empty, some doubled.
inline std::vector<int32_t> RandomRow(Random* random, int32_t num_slots, int32_t num_experts) {
  BALLAST_CHECK(num_experts <= num_slots);
  std::vector<int32_t> row(num_slots);
  for (int32_t s = 0; s < num_slots; ++s) {
    row[s] = s < num_experts ? s : static_cast<int32_t>(random->Below(num_experts + 1)) - 1;
  }
  for (int32_t s = num_slots - 1; s > 0; --s) std::swap(row[s], row[random->Below(s + 1)]);
  return row;
}

inline Placement RandomPlacement(Random* random, const Topology& topology, int32_t num_layers) {
  const int32_t num_slots = topology.num_slots();
  const int32_t num_experts = 1 + static_cast<int32_t>(random->Below(num_slots));
  std::vector<int32_t> rows;
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    const std::vector<int32_t> row = RandomRow(random, num_slots, num_experts);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  auto placement =
      Placement::Create(num_layers, num_experts, topology, std::move(rows), random->Below(100));
  BALLAST_CHECK(placement.ok());
  return *std::move(placement);
}

// [R * E] counts, most of them small or zero, a few large.
inline std::vector<int32_t> RandomCounts(Random* random, int32_t num_ranks, int32_t num_experts) {
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks) * num_experts);
  const uint32_t kind = random->Below(4);
  for (int32_t& count : counts) {
    const uint32_t below = kind == 0 ? 2 : random->Below(8) == 0 ? 1000 : 10;
    count = kind == 3 && random->Below(10) > 0 ? 0 : static_cast<int32_t>(random->Below(below));
  }
  return counts;
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_PLACEMENT_RANDOM_INSTANCES_H_
