#include "placement/placement.h"

#include <catch2/catch.hpp>

#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::RandomPlacement;
using testing::RandomTopology;

Placement Small() {
  auto placement = Placement::Create(2, 3, Topology::Uniform(2, 3),
                                     {0, 1, 0, 2, kNoExpert, 0, 2, 1, kNoExpert, 0, 1, 2}, 7);
  REQUIRE(placement.ok());
  return *placement;
}

std::string MessageOf(const absl::Status& status) {
  return std::string(status.message());
}

std::vector<int32_t> ToVector(std::span<const int32_t> s) {
  return {s.begin(), s.end()};
}

TEST_CASE("a placement knows the hosts of every expert", "[placement]") {
  const Placement placement = Small();
  const LayerHosts& hosts = placement.hosts(0);
  REQUIRE(ToVector(hosts.host_offsets) == std::vector<int32_t>{0, 2, 3, 4});
  REQUIRE(ToVector(hosts.host_rank) == std::vector<int32_t>{0, 1, 0, 1});
  REQUIRE(ToVector(hosts.host_copies) == std::vector<int32_t>{2, 1, 1, 1});
  REQUIRE(ToVector(hosts.host_slot) == std::vector<int32_t>{0, 5, 1, 3});
  REQUIRE(placement.num_replicas(0, 0) == 3);
  REQUIRE(placement.num_replicas(1, 0) == 1);
  REQUIRE(placement.Hosts(0, 2, 1));
  REQUIRE_FALSE(placement.Hosts(0, 2, 0));
}

TEST_CASE("the inverse tables agree with the slots", "[placement][property]") {
  Random random(1);
  for (int i = 0; i < 200; ++i) {
    const Topology topology = RandomTopology(&random, 6);
    const Placement placement = RandomPlacement(&random, topology, 2);
    int mismatches = 0;
    for (int32_t layer = 0; layer < 2; ++layer) {
      const std::span<const int32_t> row = placement.expert_of_slot(layer);
      const LayerHosts& hosts = placement.hosts(layer);
      for (int32_t e = 0; e < placement.num_experts(); ++e) {
        int32_t h = hosts.host_offsets[e];
        for (int32_t r = 0; r < topology.num_ranks(); ++r) {
          int32_t copies = 0;
          int32_t lowest = kNoSlot;
          for (int32_t s = 0; s < topology.num_slots(); ++s) {
            if (row[s] != e || topology.rank_of_slot(s) != r) continue;
            if (copies++ == 0) lowest = s;
          }
          mismatches += placement.Hosts(layer, e, r) != (copies > 0);
          if (copies == 0) continue;
          mismatches += hosts.host_rank[h] != r || hosts.host_copies[h] != copies ||
                        hosts.host_slot[h] != lowest;
          ++h;
        }
        mismatches += h != hosts.host_offsets[e + 1];
      }
    }
    REQUIRE(mismatches == 0);
  }
}

TEST_CASE("a placement that breaks an invariant is refused by name", "[placement][errors]") {
  const Topology two = Topology::Uniform(2, 1);
  REQUIRE(MessageOf(Placement::Create(1, 2, two, {0, 0}, 0).status()) ==
          "layer 0 has no slot for expert 1");
  REQUIRE(MessageOf(Placement::Create(1, 2, two, {0, 5}, 0).status()) ==
          "layer 0 slot 1 holds expert 5, outside [0, 2)");
  REQUIRE(MessageOf(Placement::Create(1, 3, two, {0, 1}, 0).status()) ==
          "3 experts do not fit into 2 slots");
  REQUIRE_FALSE(Placement::Create(2, 2, two, {0, 1}, 0).ok());
  REQUIRE_FALSE(Placement::Create(0, 2, two, {}, 0).ok());
  REQUIRE_FALSE(Placement::Create(1, 0, two, {-1, -1}, 0).ok());
  REQUIRE_FALSE(Placement::Create(1, 1, Topology{{0}, {}}, {}, 0).ok());
  REQUIRE_FALSE(Placement::Create(1, 1, Topology{{0, 2, 1}, {0, 0}}, {0}, 0).ok());
  REQUIRE_FALSE(Placement::Create(1, 1, Topology{{1, 2}, {0}}, {0}, 0).ok());
  REQUIRE_FALSE(Placement::Create(1, 1, Topology{{0, 1}, {1}}, {0}, 0).ok());
}

TEST_CASE("contiguous placements are blocks and their spare slots a ring", "[placement]") {
  const Topology topology = Topology::Uniform(3, 4);
  const auto plain = Placement::Contiguous(1, 7, topology, /*fill_spare=*/false);
  REQUIRE(plain.ok());
  REQUIRE(ToVector(plain->expert_of_slot(0)) ==
          std::vector<int32_t>{0, 1, 2, -1, 3, 4, -1, -1, 5, 6, -1, -1});
  const auto ring = Placement::Contiguous(1, 7, topology, /*fill_spare=*/true);
  REQUIRE(ToVector(ring->expert_of_slot(0)) ==
          std::vector<int32_t>{0, 1, 2, 5, 3, 4, 0, 6, 5, 6, 3, 1});
  const auto one = Placement::Contiguous(2, 2, Topology::Uniform(1, 3), /*fill_spare=*/true);
  REQUIRE(ToVector(one->expert_of_slot(1)) == std::vector<int32_t>{0, 1, -1});
  REQUIRE(MessageOf(Placement::Contiguous(1, 7, Topology::Uniform(3, 2), false).status()) ==
          "rank 0 has 2 slots for its 3 experts (7 experts in 6 slots)");
}

TEST_CASE("replacing rows leaves the other layers alone", "[placement]") {
  const Placement before = Small();
  const std::vector<Placement::LayerRow> rows = {{1, {0, 1, 2, 0, 1, 2}}};
  const auto after = before.With(rows, 8);
  REQUIRE(after.ok());
  REQUIRE(after->epoch() == 8);
  REQUIRE(ToVector(after->expert_of_slot(0)) == ToVector(before.expert_of_slot(0)));
  REQUIRE(ToVector(after->expert_of_slot(1)) == rows[0].expert_of_slot);
  REQUIRE(after->fingerprint() != before.fingerprint());
  REQUIRE(before.With({}, 9)->fingerprint() == before.fingerprint());
  REQUIRE_FALSE(*before.With({}, 9) == before);

  using Rows = std::vector<Placement::LayerRow>;
  REQUIRE_FALSE(before.With(Rows{{2, rows[0].expert_of_slot}}, 8).ok());
  REQUIRE_FALSE(before.With(Rows{{-1, rows[0].expert_of_slot}}, 8).ok());
  REQUIRE_FALSE(before.With(Rows{{1, {0, 1, 2}}}, 8).ok());
  REQUIRE_FALSE(before.With(Rows{rows[0], rows[0]}, 8).ok());
}

TEST_CASE("a placement survives the way through JSON", "[placement][json]") {
  Random random(2);
  for (int i = 0; i < 100; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 6), 3);
    const auto back = Placement::FromJson(placement.ToJson());
    REQUIRE(back.ok());
    REQUIRE(*back == placement);
    REQUIRE(back->fingerprint() == placement.fingerprint());
  }
}

TEST_CASE("JSON that is wrong names the key", "[placement][json][errors]") {
  const std::string good = Small().ToJson();
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string json = good;
    const size_t at = json.find(from);
    REQUIRE(at != std::string::npos);
    return MessageOf(Placement::FromJson(json.replace(at, from.size(), to)).status());
  };
  REQUIRE(with("\"schema\":1", "\"schema\":2") == "schema is 2; it must be an integer in [1, 1]");
  REQUIRE(with("\"num_experts\":3", "\"experts\":3") == "the key num_experts is missing");
  REQUIRE(with("\"epoch\":7", "\"epoch\":\"7\"").find("epoch is \"7\"") == 0);
  REQUIRE(with("\"epoch\":7", "\"epoch\":18446744073709551615").find("epoch is 1844") == 0);
  REQUIRE(with("[0,3,6]", "[0,3,2147483647]").find("layers has a row of 6") == 0);
  REQUIRE(with("[0,3,6]", "[]").find("slot_offsets has 0") == 0);
  REQUIRE(with("[0,1,0,2", "[0,1.5,0,2").find("layers is 1.5") == 0);
  REQUIRE(with("[0,1,0,2", "[1,1,0,2").find("fingerprint is") == 0);
  REQUIRE(with("\"num_experts\":3", "\"num_experts\":2147483647").find("2147483647 experts") == 0);
  for (const char* text : {"", "[]", "null", "{", "{\"schema\":", "\xff\xfe", "1e999"}) {
    REQUIRE_FALSE(Placement::FromJson(text).ok());
  }
  REQUIRE_FALSE(Placement::FromJson(std::string(100000, '[')).ok());
}

TEST_CASE("damaged JSON is refused or means the same placement", "[placement][json][property]") {
  Random random(3);
  const Placement placement = Small();
  const std::string good = placement.ToJson();
  for (int i = 0; i < 5000; ++i) {
    std::string bad = good;
    for (uint32_t k = 0; k <= random.Below(3); ++k) {
      const size_t at = random.Below(static_cast<uint32_t>(bad.size()));
      const char c = static_cast<char>(random.Below(2) ? random.Below(256)
                                                       : "0123456789-[]{}\","[random.Below(17)]);
      switch (random.Below(3)) {
        case 0:
          bad[at] = c;
          break;
        case 1:
          bad.erase(at, 1 + random.Below(5));
          break;
        default:
          bad.insert(at, 1, c);
      }
    }
    const auto parsed = Placement::FromJson(bad);
    if (parsed.ok()) REQUIRE(parsed->fingerprint() == placement.fingerprint());
  }
}

}  // namespace
}  // namespace ballast
