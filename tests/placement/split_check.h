// What a split promises, checked from the placement and the counts alone, by other code than the
// splitter's: sums and loads, the certificate, and a maximum flow.
#ifndef BALLAST_TESTS_PLACEMENT_SPLIT_CHECK_H_
#define BALLAST_TESTS_PLACEMENT_SPLIT_CHECK_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "placement/placement.h"
#include "placement/split.h"
#include "tests/placement/random_instances.h"

namespace ballast::testing {

inline std::vector<int64_t> DemandOf(const LayerHosts& hosts, std::span<const int32_t> counts) {
  std::vector<int64_t> demand(hosts.num_experts, 0);
  for (size_t i = 0; i < counts.size(); ++i) demand[i % demand.size()] += counts[i];
  return demand;
}

// ceil(demand of the experts hosted only inside / ranks inside): no split has less.
inline int64_t BoundOf(const LayerHosts& hosts, std::span<const int64_t> demand,
                       std::span<const uint8_t> inside) {
  int64_t load = 0;
  for (int32_t e = 0; e < hosts.num_experts; ++e) {
    bool only_inside = true;
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      only_inside = only_inside && inside[hosts.host_rank[h]] != 0;
    }
    if (only_inside) load += demand[e];
  }
  const int64_t ranks = std::accumulate(inside.begin(), inside.end(), int64_t{0});
  return ranks == 0 ? 0 : (load + ranks - 1) / ranks;
}

// "" when the quotas serve every copy once and the loads are theirs, else what is wrong.
inline std::string BrokenQuotas(const LayerHosts& hosts, std::span<const int64_t> demand,
                                const Split& split) {
  const size_t num_hosts = hosts.host_rank.size();
  if (split.quota.size() != num_hosts) return "there is not a quota per host";
  std::vector<int32_t> load(hosts.num_ranks, 0);
  for (int32_t e = 0; e < hosts.num_experts; ++e) {
    int64_t served = 0;
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      if (split.quota[h] < 0) return absl::StrCat("host ", h, " has a negative quota");
      served += split.quota[h];
      load[hosts.host_rank[h]] += split.quota[h];
    }
    if (served != demand[e]) {
      return absl::StrCat("expert ", e, " has ", demand[e], " copies, served are ", served);
    }
  }
  if (load != split.rank_load) return "the rank loads are not those of the quotas";
  const int32_t largest = *std::max_element(load.begin(), load.end());
  return largest == split.largest_load ? "" : "largest_load is not the largest";
}

// "" when the parts of all ranks fit the counts and the quotas, else what is wrong.
inline std::string BrokenParts(const LayerHosts& hosts, std::span<const int32_t> counts,
                               const Split& split, std::span<const RankPart> parts) {
  std::vector<int32_t> sent_to_host(hosts.host_rank.size(), 0);
  for (int32_t s = 0; s < hosts.num_ranks; ++s) {
    std::vector<int32_t> sent_to_rank(hosts.num_ranks, 0);
    for (int32_t e = 0; e < hosts.num_experts; ++e) {
      int32_t sent = 0;
      for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
        const int32_t copies = parts[s].send[h];
        if (copies < 0) return absl::StrCat("source ", s, " sends less than nothing to host ", h);
        sent += copies;
        sent_to_host[h] += copies;
        sent_to_rank[hosts.host_rank[h]] += copies;
      }
      const int32_t count = counts[static_cast<size_t>(s) * hosts.num_experts + e];
      if (sent != count) {
        return absl::StrCat("source ", s, " has ", count, " copies of expert ", e, ", sent ", sent);
      }
    }
    for (int32_t r = 0; r < hosts.num_ranks; ++r) {
      if (parts[r].receive[s] != sent_to_rank[r]) {
        return absl::StrCat("rank ", r, " awaits ", parts[r].receive[s], " copies of source ", s,
                            ", which sends ", sent_to_rank[r]);
      }
    }
  }
  return sent_to_host == split.quota ? "" : "the parts do not add up to the quotas";
}

// "" when the exact split attains what its certificate proves, else what is wrong.
inline std::string BrokenProof(const LayerHosts& hosts, std::span<const int64_t> demand,
                               const Split& split) {
  if (split.certificate.size() != static_cast<size_t>(hosts.num_ranks)) return "no certificate";
  for (uint8_t in : split.certificate) {
    if (in > 1) return "the certificate is not a set";
  }
  const int64_t proven = BoundOf(hosts, demand, split.certificate);
  if (proven != split.bound || split.largest_load != proven) {
    return absl::StrCat("largest load ", split.largest_load, ", bound ", split.bound,
                        ", the certificate proves ", proven);
  }
  return "";
}

// Whether a split with no rank above `most` exists: maximum flow from a source over the experts
// and their hosts to a sink (Dinic).
class FlowOracle {
 public:
  explicit FlowOracle(const LayerHosts& hosts) : hosts_(hosts) {}

  bool Feasible(std::span<const int64_t> demand, int64_t most) {
    const int32_t num_nodes = hosts_.num_experts + hosts_.num_ranks + 2;
    const int32_t source = num_nodes - 2;
    sink_ = num_nodes - 1;
    arcs_.clear();
    arcs_of_.assign(num_nodes, {});
    int64_t wanted = 0;
    for (int32_t e = 0; e < hosts_.num_experts; ++e) {
      wanted += demand[e];
      AddArc(source, e, demand[e]);
      for (int32_t h = hosts_.host_offsets[e]; h < hosts_.host_offsets[e + 1]; ++h) {
        AddArc(e, hosts_.num_experts + hosts_.host_rank[h], demand[e]);
      }
    }
    for (int32_t r = 0; r < hosts_.num_ranks; ++r) AddArc(hosts_.num_experts + r, sink_, most);
    int64_t flow = 0;
    while (Level(source)) {
      next_.assign(num_nodes, 0);
      while (const int64_t more = Send(source, std::numeric_limits<int64_t>::max())) flow += more;
    }
    return flow == wanted;
  }

  // The least feasible `most`, by bisection.
  int64_t Optimum(std::span<const int64_t> demand) {
    int64_t low = 0;
    int64_t high = std::accumulate(demand.begin(), demand.end(), int64_t{0});
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      Feasible(demand, middle) ? high = middle : low = middle + 1;
    }
    return low;
  }

 private:
  struct Arc {
    int32_t to;
    int64_t left;
  };
  void AddArc(int32_t from, int32_t to, int64_t capacity) {  // arc i goes back by arc i ^ 1
    arcs_of_[from].push_back(static_cast<int32_t>(arcs_.size()));
    arcs_.push_back({to, capacity});
    arcs_of_[to].push_back(static_cast<int32_t>(arcs_.size()));
    arcs_.push_back({from, 0});
  }
  bool Level(int32_t source) {
    level_.assign(arcs_of_.size(), -1);
    level_[source] = 0;
    std::vector<int32_t> queue = {source};
    for (size_t head = 0; head < queue.size(); ++head) {
      for (int32_t i : arcs_of_[queue[head]]) {
        if (arcs_[i].left == 0 || level_[arcs_[i].to] >= 0) continue;
        level_[arcs_[i].to] = level_[queue[head]] + 1;
        queue.push_back(arcs_[i].to);
      }
    }
    return level_[sink_] >= 0;
  }
  int64_t Send(int32_t at, int64_t most) {
    if (at == sink_) return most;
    for (size_t& k = next_[at]; k < arcs_of_[at].size(); ++k) {
      Arc& arc = arcs_[arcs_of_[at][k]];
      if (arc.left == 0 || level_[arc.to] != level_[at] + 1) continue;
      if (const int64_t sent = Send(arc.to, std::min(most, arc.left))) {
        arc.left -= sent;
        arcs_[arcs_of_[at][k] ^ 1].left += sent;
        return sent;
      }
    }
    return 0;
  }

  LayerHosts hosts_;
  int32_t sink_ = 0;
  std::vector<Arc> arcs_;
  std::vector<std::vector<int32_t>> arcs_of_;
  std::vector<int32_t> level_;
  std::vector<size_t> next_;
};

// Ranks of 0 to `most_slots` slots, at least one slot in all, on one to four nodes.
inline Topology UnevenTopology(Random* random, int32_t num_ranks, int32_t most_slots) {
  Topology topology;
  const uint32_t num_nodes = 1 + random->Below(4);
  const bool equal = random->Below(2) == 0;
  topology.slot_offsets.push_back(0);
  for (int32_t r = 0; r < num_ranks; ++r) {
    const int32_t slots = equal || r == 0 ? most_slots : random->Below(most_slots + 1);
    topology.slot_offsets.push_back(topology.slot_offsets.back() + slots);
    topology.node_of_rank.push_back(r < static_cast<int32_t>(num_nodes) ? r
                                                                        : random->Below(num_nodes));
  }
  return topology;
}

// Counts of one of six kinds: dense, sparse, skewed, one token, all on one expert, none.
inline std::vector<int32_t> DrawCounts(Random* random, int32_t num_ranks, int32_t num_experts) {
  std::vector<int32_t> counts(static_cast<size_t>(num_ranks) * num_experts, 0);
  const uint32_t kind = random->Below(16);
  if (kind == 0) return counts;
  if (kind == 1) {
    counts[random->Below(static_cast<uint32_t>(counts.size()))] = 1;
    return counts;
  }
  const int32_t only = static_cast<int32_t>(random->Below(num_experts));
  std::vector<uint32_t> below(num_experts);
  for (uint32_t& b : below) {
    const double u = random->Uniform();
    b = kind == 2   ? 5000
        : kind < 5  ? 2
        : kind < 10 ? 40
                    : 1 + static_cast<uint32_t>(4.0 / (u * u + 0.002));
  }
  for (size_t i = 0; i < counts.size(); ++i) {
    const int32_t e = static_cast<int32_t>(i % num_experts);
    if (kind == 2 && e != only) continue;
    if (kind == 3 && random->Below(8) > 0) continue;
    counts[i] = static_cast<int32_t>(random->Below(below[e]));
  }
  return counts;
}

// Checks exact splits of `rounds` random instances: quotas, parts of the ranks, the proof, and in
// every `flow_every`-th round the maximum flow. Returns the first broken promise, or "".
//   Ranks   8 to 144 (every 8th instance 1 to 7), of 1 to 9 slots, some without, some slots empty
//   Experts placed at random, so that some ranks hold two copies
inline std::string CheckExactSplits(uint64_t seed, int64_t rounds, int64_t flow_every) {
  Random random(seed);
  for (int64_t round = 0; round < rounds; ++round) {
    const int32_t num_ranks = round % 8 == 0  ? 1 + random.Below(7)
                              : round % 8 < 6 ? 8 + random.Below(25)
                                              : 8 + random.Below(137);
    const Topology topology = UnevenTopology(&random, num_ranks, 1 + random.Below(9));
    const int32_t num_slots = topology.num_slots();
    const int32_t spare = random.Below(std::min(num_slots, 2 * num_ranks));
    const int32_t num_experts =
        random.Below(4) == 0 ? 1 + random.Below(num_slots) : num_slots - spare;
    const auto placement =
        Placement::Create(1, num_experts, topology, RandomRow(&random, num_slots, num_experts), 0);
    if (!placement.ok()) return std::string(placement.status().message());
    const LayerHosts& hosts = placement->hosts(0);
    const std::vector<int32_t> counts = DrawCounts(&random, num_ranks, num_experts);
    const std::vector<int64_t> demand = DemandOf(hosts, counts);
    Splitter splitter(hosts);
    Split split;
    splitter.Run(SplitMode::kExact, counts, &split);
    std::string broken = BrokenQuotas(hosts, demand, split);
    if (broken.empty()) broken = BrokenProof(hosts, demand, split);
    if (broken.empty() && (num_ranks <= 16 || round % flow_every == 0)) {
      std::vector<RankPart> parts(num_ranks);
      for (int32_t r = 0; r < num_ranks; ++r) {
        splitter.Cut(SplitMode::kExact, counts, split, r, &parts[r]);
      }
      broken = BrokenParts(hosts, counts, split, parts);
    }
    if (broken.empty() && round % flow_every == 0) {
      const int64_t optimum = FlowOracle(hosts).Optimum(demand);
      if (optimum != split.largest_load) {
        broken = absl::StrCat("largest load ", split.largest_load, ", maximum flow ", optimum);
      }
    }
    if (!broken.empty()) {
      return absl::StrCat("seed ", seed, " round ", round, " (", num_experts, " experts, ",
                          num_slots, " slots, ", num_ranks, " ranks): ", broken);
    }
  }
  return "";
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_PLACEMENT_SPLIT_CHECK_H_
