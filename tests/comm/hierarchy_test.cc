#include "comm/hierarchy.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <deque>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>

#include "base/random.h"

namespace ballast {
namespace {

using Bytes = std::vector<std::byte>;

// All ranks of an exchange, with the bytes that each sends to each: the definition, and what the
// plans make of it.
struct World {
  std::vector<int32_t> nodes;
  std::vector<size_t> pair_bytes;  // [R, R]

  size_t ranks() const { return nodes.size(); }
  size_t bytes(size_t from, size_t to) const { return pair_bytes[from * ranks() + to]; }
};

std::byte Pattern(size_t from, size_t to, size_t i) {
  return static_cast<std::byte>(RandomBits(from * 1000 + to, i));
}

// What `to` has to hold in the end, sources in descending order to be unlike the send buffers.
std::vector<size_t> RecvOffsets(const World& world, size_t to) {
  std::vector<size_t> offsets(world.ranks());
  size_t at = 0;
  for (size_t from = world.ranks(); from-- > 0;) {
    offsets[from] = at;
    at += world.bytes(from, to);
  }
  return offsets;
}

Bytes Expected(const World& world, size_t to) {
  Bytes all;
  for (size_t from = world.ranks(); from-- > 0;) {
    for (size_t i = 0; i < world.bytes(from, to); ++i) all.push_back(Pattern(from, to, i));
  }
  return all;
}

Bytes SendBuffer(const World& world, const Hierarchy& hierarchy, size_t from) {
  const std::span<const size_t> row(world.pair_bytes.data() + from * world.ranks(), world.ranks());
  std::vector<size_t> offsets(world.ranks());
  hierarchy.SendOffsets(row, offsets);
  Bytes buffer(std::accumulate(row.begin(), row.end(), size_t{0}));
  for (size_t to = 0; to < world.ranks(); ++to) {
    for (size_t i = 0; i < row[to]; ++i) buffer[offsets[to] + i] = Pattern(from, to, i);
  }
  return buffer;
}

// Messages under way, in the order they were sent, per pair of ranks.
class Mail {
 public:
  void Send(size_t from, int32_t to, const Bytes& buffer, size_t offset, size_t bytes) {
    REQUIRE(offset + bytes <= buffer.size());
    REQUIRE(bytes > 0);
    const auto begin = buffer.begin() + static_cast<std::ptrdiff_t>(offset);
    boxes_[{from, static_cast<size_t>(to)}].emplace_back(
        begin, begin + static_cast<std::ptrdiff_t>(bytes));
  }
  void Recv(int32_t from, size_t to, Bytes& buffer, size_t offset, size_t bytes) {
    auto& box = boxes_[{static_cast<size_t>(from), to}];
    REQUIRE(!box.empty());
    REQUIRE(box.front().size() == bytes);
    REQUIRE(offset + bytes <= buffer.size());
    std::copy(box.front().begin(), box.front().end(),
              buffer.begin() + static_cast<std::ptrdiff_t>(offset));
    box.pop_front();
  }
  bool Empty() const {
    return std::all_of(boxes_.begin(), boxes_.end(),
                       [](const auto& b) { return b.second.empty(); });
  }

 private:
  std::map<std::pair<size_t, size_t>, std::deque<Bytes>> boxes_;
};

// Runs both rounds as the plans say and compares with the definition.
void CheckWorld(const World& world) {
  std::vector<Hierarchy> ranks;
  std::vector<Hierarchy::Plan> plans;
  std::vector<Bytes> send, recv, staging;
  size_t most_staging = 0;
  for (size_t r = 0; r < world.ranks(); ++r) {
    ranks.emplace_back(world.nodes, static_cast<int>(r));
    plans.push_back(ranks[r].MakePlan(world.pair_bytes, RecvOffsets(world, r)));
    send.push_back(SendBuffer(world, ranks[r], r));
    recv.emplace_back(Expected(world, r).size());
    staging.emplace_back(plans[r].staging_bytes);
    most_staging = std::max(most_staging, plans[r].staging_bytes);
  }
  Mail mail;
  std::set<std::pair<size_t, int32_t>> crossings;  // who sends to which node
  for (size_t r = 0; r < world.ranks(); ++r) {
    REQUIRE(ranks[r].MostStagingBytes(world.pair_bytes) == most_staging);
    for (const auto& m : plans[r].node_sends) {
      REQUIRE(world.nodes[static_cast<size_t>(m.peer)] != world.nodes[r]);
      REQUIRE(crossings.insert({r, world.nodes[static_cast<size_t>(m.peer)]}).second);
      mail.Send(r, m.peer, send[r], m.offset, m.bytes);
    }
  }
  for (size_t r = 0; r < world.ranks(); ++r) {
    for (const auto& m : plans[r].node_recvs) mail.Recv(m.peer, r, staging[r], m.offset, m.bytes);
  }
  REQUIRE(mail.Empty());
  for (size_t r = 0; r < world.ranks(); ++r) {
    for (const auto& m : plans[r].hand_sends) {
      REQUIRE(world.nodes[static_cast<size_t>(m.peer)] == world.nodes[r]);
      REQUIRE(m.peer != static_cast<int32_t>(r));
      mail.Send(r, m.peer, m.staged ? staging[r] : send[r], m.offset, m.bytes);
    }
    for (const auto& c : plans[r].own_copies) {
      const Bytes& from = c.staged ? staging[r] : send[r];
      REQUIRE(c.from + c.bytes <= from.size());
      REQUIRE(c.to + c.bytes <= recv[r].size());
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(c.from), c.bytes,
                  recv[r].begin() + static_cast<std::ptrdiff_t>(c.to));
    }
  }
  for (size_t r = 0; r < world.ranks(); ++r) {
    for (const auto& m : plans[r].hand_recvs) mail.Recv(m.peer, r, recv[r], m.offset, m.bytes);
  }
  REQUIRE(mail.Empty());
  for (size_t r = 0; r < world.ranks(); ++r) {
    CAPTURE(r);
    REQUIRE(recv[r] == Expected(world, r));
  }
}

World RandomWorld(uint64_t seed) {
  Random random(seed);
  World world;
  const uint32_t ranks = 1 + random.Below(8), nodes = 1 + random.Below(ranks);
  for (uint32_t r = 0; r < ranks; ++r) {
    // Nodes of consecutive ranks, of ranks dealt in turn, and of any ranks at all.
    const uint32_t node = seed % 3 == 0   ? r * nodes / ranks
                          : seed % 3 == 1 ? r % nodes
                                          : random.Below(nodes);
    world.nodes.push_back(static_cast<int32_t>(node * 7));
  }
  const uint32_t zeros = random.Below(5);
  for (uint32_t i = 0; i < ranks * ranks; ++i) {
    world.pair_bytes.push_back(random.Below(4) < zeros ? 0 : random.Below(40));
  }
  return world;
}

TEST_CASE("rows that cross nodes by proxies arrive as if sent directly", "[comm][property]") {
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    CAPTURE(seed);
    CheckWorld(RandomWorld(seed));
  }
}

TEST_CASE("every shape of three nodes hands out every row", "[comm][property]") {
  // All ways to put five ranks on up to three nodes, with a count of its own for each pair.
  World world;
  world.nodes.resize(5);
  for (size_t i = 0; i < 25; ++i) world.pair_bytes.push_back(i * 5 % 7 == 3 ? 0 : i + 1);
  for (int shape = 0; shape < 243; ++shape) {
    for (int r = 0, rest = shape; r < 5; ++r, rest /= 3) {
      world.nodes[static_cast<size_t>(r)] = rest % 3;
    }
    CAPTURE(shape);
    CheckWorld(world);
  }
}

TEST_CASE("a proxy has the local index of the sender modulo the ranks there", "[comm][unit]") {
  // Nodes 0: ranks 0 1 2, 1: ranks 3 4, 2: rank 5.
  const std::vector<int32_t> nodes = {0, 0, 0, 1, 1, 2};
  const Hierarchy hierarchy(nodes, 0);
  REQUIRE(hierarchy.num_nodes() == 3);
  REQUIRE(hierarchy.Proxy(0, 1) == 3);
  REQUIRE(hierarchy.Proxy(1, 1) == 4);
  REQUIRE(hierarchy.Proxy(2, 1) == 3);
  REQUIRE(hierarchy.Proxy(4, 0) == 1);
  REQUIRE(hierarchy.Proxy(4, 2) == 5);
  REQUIRE(hierarchy.Proxy(5, 0) == 0);
}

TEST_CASE("the plan of a proxy is what is expected by hand", "[comm][unit]") {
  // Nodes {0, 1} and {2, 3}; rank 0 is the proxy of 2, and 1 of 3. From s to d go 10 s + d + 1
  // bytes.
  const std::vector<int32_t> nodes = {0, 0, 1, 1};
  std::vector<size_t> pair_bytes;
  for (size_t s = 0; s < 4; ++s) {
    for (size_t d = 0; d < 4; ++d) pair_bytes.push_back(10 * s + d + 1);
  }
  Hierarchy hierarchy(nodes, 0);
  const std::vector<size_t> recv_offsets = {0, 100, 200, 300};
  const Hierarchy::Plan& plan = hierarchy.MakePlan(pair_bytes, recv_offsets);
  // To node 1: 3 + 4 bytes behind the 1 + 2 for node 0, all to rank 2.
  REQUIRE(plan.node_sends.size() == 1);
  REQUIRE(plan.node_sends[0].peer == 2);
  REQUIRE(plan.node_sends[0].offset == 3);
  REQUIRE(plan.node_sends[0].bytes == 7);
  // From rank 2: 21 bytes for rank 0, 22 for rank 1.
  REQUIRE(plan.node_recvs.size() == 1);
  REQUIRE(plan.node_recvs[0].peer == 2);
  REQUIRE(plan.node_recvs[0].bytes == 43);
  REQUIRE(plan.staging_bytes == 43);
  // Rank 1 gets 2 bytes of rank 0's own, then the 22 behind the first 21 in staging.
  REQUIRE(plan.hand_sends.size() == 2);
  REQUIRE(plan.hand_sends[0].peer == 1);
  REQUIRE(!plan.hand_sends[0].staged);
  REQUIRE(plan.hand_sends[0].offset == 1);
  REQUIRE(plan.hand_sends[0].bytes == 2);
  REQUIRE(plan.hand_sends[1].staged);
  REQUIRE(plan.hand_sends[1].offset == 21);
  REQUIRE(plan.hand_sends[1].bytes == 22);
  // Rank 1 has 11 bytes of its own for rank 0, and 31 from rank 3.
  REQUIRE(plan.hand_recvs.size() == 2);
  REQUIRE(plan.hand_recvs[0].peer == 1);
  REQUIRE(plan.hand_recvs[0].offset == 100);
  REQUIRE(plan.hand_recvs[0].bytes == 11);
  REQUIRE(plan.hand_recvs[1].peer == 1);
  REQUIRE(plan.hand_recvs[1].offset == 300);
  REQUIRE(plan.hand_recvs[1].bytes == 31);
  REQUIRE(plan.own_copies.size() == 2);
  REQUIRE(plan.own_copies[0].bytes == 1);
  REQUIRE(plan.own_copies[1].staged);
  REQUIRE(plan.own_copies[1].from == 0);
  REQUIRE(plan.own_copies[1].to == 200);
  REQUIRE(plan.own_copies[1].bytes == 21);
  // Rank 1 needs most: the 31 + 32 bytes that rank 3 has for node 0.
  REQUIRE(hierarchy.MostStagingBytes(pair_bytes) == 63);
}

TEST_CASE("the fullest plan fits into what an empty one has", "[comm][unit]") {
  const auto capacities = [](const Hierarchy::Plan& plan) {
    return std::vector<size_t>{plan.node_sends.capacity(), plan.node_recvs.capacity(),
                               plan.hand_sends.capacity(), plan.hand_recvs.capacity(),
                               plan.own_copies.capacity()};
  };
  for (const std::vector<int32_t>& nodes : {std::vector<int32_t>{0, 0, 0, 1, 1, 2},
                                            {0, 1, 2, 3, 4, 5},
                                            {0, 0, 0, 0, 0, 1},
                                            {0, 0, 0, 0, 0, 0}}) {
    for (int rank = 0; rank < 6; ++rank) {
      Hierarchy hierarchy(nodes, rank);
      const std::vector<size_t> all(36, 3), none(36, 0), recv_offsets(6, 0);
      const auto before = capacities(hierarchy.MakePlan(none, recv_offsets));
      REQUIRE(capacities(hierarchy.MakePlan(all, recv_offsets)) == before);
    }
  }
}

TEST_CASE("a second plan leaves nothing of the first", "[comm][unit]") {
  Hierarchy hierarchy(std::vector<int32_t>{0, 1, 0, 1}, 1);
  const std::vector<size_t> some(16, 5), none(16, 0), recv_offsets(4, 0);
  REQUIRE(hierarchy.MakePlan(some, recv_offsets).staging_bytes > 0);
  const Hierarchy::Plan& plan = hierarchy.MakePlan(none, recv_offsets);
  REQUIRE(plan.node_sends.empty());
  REQUIRE(plan.node_recvs.empty());
  REQUIRE(plan.hand_sends.empty());
  REQUIRE(plan.hand_recvs.empty());
  REQUIRE(plan.own_copies.empty());
  REQUIRE(plan.staging_bytes == 0);
  REQUIRE(hierarchy.MostStagingBytes(none) == 0);
}

}  // namespace
}  // namespace ballast
