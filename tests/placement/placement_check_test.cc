#include "placement/placement_check.h"

#include <catch2/catch.hpp>

#include "base/random.h"

namespace ballast {
namespace {

// Layer 0: 0 1 0 | 2 3 . ; layer 1: 0 1 . | 2 3 1, on two ranks of three slots.
Placement Small() {
  auto placement = Placement::Create(2, 4, Topology::Uniform(2, 3),
                                     {0, 1, 0, 2, 3, kNoExpert, 0, 1, kNoExpert, 2, 3, 1}, 5);
  REQUIRE(placement.ok());
  return *placement;
}

// What a stray write would do to a table that everybody takes for constant.
template <typename T>
void Damage(std::span<const T> table, size_t at, T value) {
  const_cast<T&>(table[at]) = value;
}

std::string Fault(const Placement& placement) {
  return std::string(CheckPlacement(placement).message());
}

TEST_CASE("placements that were built are sound", "[placement_check]") {
  CHECK(Fault(Small()) == "");
  for (int32_t ranks : {1, 3, 8}) {
    const auto ring = Placement::Contiguous(3, 24, Topology::Uniform(ranks, 24 / ranks + 3), true);
    REQUIRE(ring.ok());
    CHECK(Fault(*ring) == "");
  }
  // Uneven ranks, duplicates on a rank, empty slots.
  Random random(3);
  for (int trial = 0; trial < 200; ++trial) {
    Topology topology{.slot_offsets = {0}, .node_of_rank = {}};
    const int32_t ranks = 1 + static_cast<int32_t>(random.Below(5));
    for (int32_t r = 0; r < ranks; ++r) {
      topology.slot_offsets.push_back(topology.slot_offsets.back() +
                                      static_cast<int32_t>(random.Below(5)));
      topology.node_of_rank.push_back(0);
    }
    topology.slot_offsets.back() += 6;
    std::vector<int32_t> row(static_cast<size_t>(topology.num_slots()));
    for (size_t s = 0; s < row.size(); ++s) {
      row[s] = static_cast<int32_t>(random.Below(7)) - 1;
    }
    for (int32_t e = 0; e < 6; ++e) row[row.size() - 6 + static_cast<size_t>(e)] = e;
    const auto placement = Placement::Create(1, 6, topology, row, 0);
    REQUIRE(placement.ok());
    CHECK(Fault(*placement) == "");
  }
}

TEST_CASE("damage of any table of a placement is found and named", "[placement_check]") {
  Placement placement = Small();
  SECTION("an expert that is out of range") {
    Damage(placement.expert_of_slot(1), 4, 7);
    CHECK(Fault(placement) == "placement: layer 1, slot 4 holds expert 7, allowed: 0 to 3");
  }
  SECTION("an expert without a slot") {
    Damage(placement.expert_of_slot(1), 4, kNoExpert);
    CHECK(Fault(placement).find("layer 1, expert 3") != std::string::npos);
  }
  SECTION("slots that changed behind the tables") {
    Damage(placement.expert_of_slot(0), 5, 0);
    CHECK(Fault(placement).find("layer 0, expert 0") != std::string::npos);
  }
  SECTION("a host on another rank") {
    Damage(placement.hosts(0).host_rank, 0, 1);
    CHECK(Fault(placement).find("layer 0, expert 0") != std::string::npos);
  }
  SECTION("a host's copies") {
    Damage(placement.hosts(0).host_copies, 0, 1);
    CHECK(Fault(placement) ==
          "placement: layer 0, expert 0: the table of hosts is wrong of rank 0");
  }
  SECTION("a host's slot") {
    Damage(placement.hosts(1).host_slot, 1, 0);
    CHECK(Fault(placement).find("layer 1, expert 1") != std::string::npos);
  }
  SECTION("offsets") {
    Damage(placement.hosts(1).host_offsets, 2, 2);
    CHECK(Fault(placement).find("layer 1, expert 1") != std::string::npos);
  }
  SECTION("slots of a rank that permute: only the fingerprint knows") {
    Damage(placement.expert_of_slot(1), 0, 1);
    Damage(placement.expert_of_slot(1), 1, 0);
    Damage(placement.hosts(1).host_slot, 0, 1);
    Damage(placement.hosts(1).host_slot, 1, 0);
    CHECK(Fault(placement) == "placement: the fingerprint is not that of its slots");
  }
}

}  // namespace
}  // namespace ballast
