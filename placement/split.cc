#include "placement/split.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_join.h"
#include "base/check.h"
#include "base/random.h"
#include "base/status.h"
#include "placement/rank_prices.h"
#include "placement/split_cost.h"

namespace ballast {
namespace {

constexpr double kWeightOfOne = 4096.0;  // of a copy at a price of 1

// Whether hosts get quotas that are then cut over the sources; else each source divides its own.
bool IsByQuota(SplitMode mode) {
  return mode == SplitMode::kExact || mode == SplitMode::kCost || mode == SplitMode::kEven;
}

}  // namespace

absl::StatusOr<SplitMode> ParseSplitMode(const std::string& name) {
  for (SplitMode mode : kAllSplitModes) {
    if (name == NameOf(mode)) return mode;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "unknown split mode '", name, "'; the choices are ", absl::StrJoin(SplitModeNames(), ", ")));
}

const char* NameOf(SplitMode mode) {
  switch (mode) {
    case SplitMode::kExact:
      return "exact";
    case SplitMode::kCost:
      return "cost";
    case SplitMode::kPrice:
      return "price";
    case SplitMode::kEven:
      return "even";
    case SplitMode::kRoundRobin:
      return "roundrobin";
    case SplitMode::kHash:
      return "hash";
  }
  return "unknown";
}

std::vector<std::string> SplitModeNames() {
  std::vector<std::string> names;
  for (SplitMode mode : kAllSplitModes) names.push_back(NameOf(mode));
  return names;
}

void SumOverSources(std::span<const int32_t> counts, std::span<int32_t> demand) {
  std::fill(demand.begin(), demand.end(), 0);
  int32_t* __restrict__ sum = demand.data();  // nothing overlaps: the additions are vectorised
  for (size_t row = 0; row < counts.size(); row += demand.size()) {
    const int32_t* __restrict__ of_source = counts.data() + row;
    for (size_t e = 0; e < demand.size(); ++e) sum[e] += of_source[e];
  }
}

// The placement, compiled once, and scratch for one batch.
struct Splitter::State {
  State(const LayerHosts& hosts, const CostConstants& cost_constants);

  CostSplitter& Cost();

  void FollowPrices();
  void SplitEven(Split* split);
  void SplitBySource(SplitMode mode, std::span<const int32_t> counts, Split* split);
  void CutBySource(SplitMode mode, std::span<const int32_t> counts, int32_t rank, RankPart* part);
  void CutQuotas(std::span<const int32_t> counts, const Split& split, int32_t rank, RankPart* part);
  void AddUpExpert(std::span<const int32_t> counts, const Split& split, int32_t expert,
                   RowTraffic* traffic);
  void AddUpBySource(SplitMode mode, std::span<const int32_t> counts, RowTraffic* traffic);

  int32_t num_experts, num_ranks, num_hosts;
  std::vector<int32_t> host_offsets, host_rank, host_copies, node_of_rank;
  std::vector<int32_t> node_offsets, node_ranks;  // per node: its ranks, ascending
  ExactSplitter exact;
  CostConstants constants;
  std::optional<CostSplitter> cost;  // made when it is first asked for: few do
  RankPrices prices;
  std::vector<int32_t> priced_load;  // [R] of the last batch by price, not yet learnt; or empty
  std::vector<int32_t> demand;       // [E] copies of the batch per expert

 private:
  void CutSharedExpert(std::span<const int32_t> counts, const Split& split, int32_t expert,
                       int32_t rank, RankPart* part);
  template <typename Add>
  void Apportion(std::span<const int32_t> weight, int32_t expert, int32_t count, int32_t turn,
                 const Add& add);
  template <typename Add>
  void ForEachShare(SplitMode mode, int32_t source, int32_t expert, int32_t count, const Add& add);

  std::vector<int32_t> price_weight_;                      // [num_hosts] copies / price
  std::vector<std::pair<int64_t, int32_t>> by_remainder_;  // hosts of one expert
  std::vector<int32_t> left_count_;   // [R] copies of one expert still to be sent, per source
  std::vector<int32_t> left_quota_;   // [largest number of hosts] copies still to be taken
  std::vector<int32_t> node_cursor_;  // [nodes] into node_ranks: those before have nothing left
};

Splitter::State::State(const LayerHosts& hosts, const CostConstants& cost_constants)
    : num_experts(hosts.num_experts),
      num_ranks(hosts.num_ranks),
      num_hosts(static_cast<int32_t>(hosts.host_rank.size())),
      host_offsets(hosts.host_offsets.begin(), hosts.host_offsets.end()),
      host_rank(hosts.host_rank.begin(), hosts.host_rank.end()),
      host_copies(hosts.host_copies.begin(), hosts.host_copies.end()),
      node_of_rank(hosts.node_of_rank.begin(), hosts.node_of_rank.end()),
      exact(hosts),
      constants(cost_constants),
      prices(num_ranks),
      demand(num_experts),
      price_weight_(num_hosts),
      by_remainder_(num_ranks),
      left_count_(num_ranks),
      left_quota_(num_ranks) {
  const int32_t num_nodes = *std::max_element(node_of_rank.begin(), node_of_rank.end()) + 1;
  node_offsets.push_back(0);
  for (int32_t node = 0; node < num_nodes; ++node) {
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (node_of_rank[r] == node) node_ranks.push_back(r);
    }
    node_offsets.push_back(static_cast<int32_t>(node_ranks.size()));
  }
  node_cursor_.resize(num_nodes);
}

CostSplitter& Splitter::State::Cost() {
  if (!cost.has_value()) {
    cost.emplace(LayerHosts{.num_experts = num_experts,
                            .num_ranks = num_ranks,
                            .host_offsets = host_offsets,
                            .host_rank = host_rank,
                            .host_copies = host_copies,
                            .host_slot = {},  // a split asks for ranks only
                            .node_of_rank = node_of_rank},
                 constants);
  }
  return *cost;
}

// Divides `count` copies over the expert's hosts by weight: calls add(host, copies). What is left
// after rounding down goes to the largest remainders, ties from host `turn` on.
template <typename Add>
void Splitter::State::Apportion(std::span<const int32_t> weight, int32_t expert, int32_t count,
                                int32_t turn, const Add& add) {
  const int32_t first = host_offsets[expert];
  const int32_t n = host_offsets[expert + 1] - first;
  int64_t all = 0;
  for (int32_t i = 0; i < n; ++i) all += weight[first + i];
  int32_t left = count;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t host = first + (turn + i) % n;
    const int64_t weighted = int64_t{count} * weight[host];
    const int32_t copies = static_cast<int32_t>(weighted / all);
    add(host, copies);
    left -= copies;
    by_remainder_[i] = {-(weighted % all), i};
  }
  if (left == 0) return;
  std::sort(by_remainder_.begin(), by_remainder_.begin() + n);
  for (int32_t i = 0; i < left; ++i) add(first + (turn + by_remainder_[i].second) % n, 1);
}

void Splitter::State::SplitEven(Split* split) {
  const auto take = [&](int32_t host, int32_t copies) { split->quota[host] += copies; };
  for (int32_t e = 0; e < num_experts; ++e) Apportion(host_copies, e, demand[e], 0, take);
}

// Learns from the batch before and sets what the hosts weigh in this one.
void Splitter::State::FollowPrices() {
  if (!priced_load.empty()) prices.Learn(priced_load);
  for (int32_t h = 0; h < num_hosts; ++h) {
    const double weight = kWeightOfOne * host_copies[h] / prices.prices()[host_rank[h]];
    price_weight_[h] = static_cast<int32_t>(weight + 0.5);
  }
}

// Calls add(host, copies) for the hosts that the copies of one source and expert go to, possibly
// several times for one host.
template <typename Add>
void Splitter::State::ForEachShare(SplitMode mode, int32_t source, int32_t expert, int32_t count,
                                   const Add& add) {
  const int32_t first = host_offsets[expert];
  const int32_t n = host_offsets[expert + 1] - first;
  if (n == 1) {
    add(first, count);
  } else if (mode == SplitMode::kPrice) {
    Apportion(price_weight_, expert, count, source % n, add);
  } else if (mode == SplitMode::kRoundRobin) {
    for (int32_t i = 0; i < n; ++i) add(first + i, count / n);
    for (int32_t j = 0; j < count % n; ++j) add(first + (j + source) % n, 1);
  } else {
    for (int32_t j = 0; j < count; ++j) {
      add(first + static_cast<int32_t>(RandomBits(source, j) % n), 1);
    }
  }
}

void Splitter::State::SplitBySource(SplitMode mode, std::span<const int32_t> counts, Split* split) {
  const auto take = [&](int32_t host, int32_t copies) { split->quota[host] += copies; };
  for (int32_t s = 0; s < num_ranks; ++s) {
    const int32_t* of_source = counts.data() + static_cast<size_t>(s) * num_experts;
    for (int32_t e = 0; e < num_experts; ++e) ForEachShare(mode, s, e, of_source[e], take);
  }
}

void Splitter::State::CutBySource(SplitMode mode, std::span<const int32_t> counts, int32_t rank,
                                  RankPart* part) {
  const auto send = [&](int32_t host, int32_t copies) { part->send[host] += copies; };
  for (int32_t s = 0; s < num_ranks; ++s) {
    const int32_t* of_source = counts.data() + static_cast<size_t>(s) * num_experts;
    const auto receive = [&](int32_t host, int32_t copies) {
      if (host_rank[host] == rank) part->receive[s] += copies;
    };
    for (int32_t e = 0; e < num_experts; ++e) {
      ForEachShare(mode, s, e, of_source[e], receive);
      if (s == rank) ForEachShare(mode, s, e, of_source[e], send);
    }
  }
}

// Own rank first, then the node, then ascending ranks; only what `rank` sends or gets is noted.
void Splitter::State::CutSharedExpert(std::span<const int32_t> counts, const Split& split,
                                      int32_t expert, int32_t rank, RankPart* part) {
  const int32_t first = host_offsets[expert];
  const int32_t n = host_offsets[expert + 1] - first;
  for (int32_t s = 0; s < num_ranks; ++s) {
    left_count_[s] = counts[static_cast<size_t>(s) * num_experts + expert];
  }
  const auto send = [&](int32_t source, int32_t i) {
    const int32_t amount = std::min(left_count_[source], left_quota_[i]);
    left_count_[source] -= amount;
    left_quota_[i] -= amount;
    if (source == rank) part->send[first + i] += amount;
    if (host_rank[first + i] == rank) part->receive[source] += amount;
  };
  for (int32_t i = 0; i < n; ++i) {
    const int32_t to = host_rank[first + i];
    left_quota_[i] = split.quota[first + i];
    node_cursor_[node_of_rank[to]] = node_offsets[node_of_rank[to]];
    send(to, i);
  }
  for (int32_t i = 0; i < n; ++i) {
    const int32_t node = node_of_rank[host_rank[first + i]];
    for (int32_t& k = node_cursor_[node]; k < node_offsets[node + 1]; ++k) {
      send(node_ranks[k], i);
      if (left_count_[node_ranks[k]] > 0) break;  // the host is full
    }
  }
  for (int32_t s = 0, i = 0; s < num_ranks; ++s) {
    while (left_count_[s] > 0) {  // the quotas add up to the counts: a host is left
      send(s, i);
      if (left_quota_[i] == 0) ++i;
    }
  }
}

void Splitter::State::CutQuotas(std::span<const int32_t> counts, const Split& split, int32_t rank,
                                RankPart* part) {
  const int32_t* own = counts.data() + static_cast<size_t>(rank) * num_experts;
  for (int32_t e = 0; e < num_experts; ++e) {
    const auto begin = host_rank.begin() + host_offsets[e];
    const auto end = host_rank.begin() + host_offsets[e + 1];
    const bool hosted = std::find(begin, end, rank) != end;
    if (!hosted && own[e] == 0) continue;
    if (end - begin > 1) {
      CutSharedExpert(counts, split, e, rank, part);
      continue;
    }
    part->send[host_offsets[e]] = own[e];
    for (int32_t s = 0; hosted && s < num_ranks; ++s) {
      part->receive[s] += counts[static_cast<size_t>(s) * num_experts + e];
    }
  }
}

// In the order of CutSharedExpert: own rank, node, others.
void Splitter::State::AddUpExpert(std::span<const int32_t> counts, const Split& split,
                                  int32_t expert, RowTraffic* traffic) {
  const int32_t first = host_offsets[expert];
  const int32_t n = host_offsets[expert + 1] - first;
  for (int32_t s = 0; s < num_ranks; ++s) {
    left_count_[s] = counts[static_cast<size_t>(s) * num_experts + expert];
  }
  for (int32_t i = 0; i < n; ++i) {
    const int32_t to = host_rank[first + i];
    const int32_t kept = std::min(left_count_[to], split.quota[first + i]);
    left_count_[to] -= kept;
    left_quota_[i] = split.quota[first + i] - kept;
    node_cursor_[node_of_rank[to]] = node_offsets[node_of_rank[to]];
  }
  for (int32_t i = 0; i < n; ++i) {
    const int32_t to = host_rank[first + i];
    const int32_t node = node_of_rank[to];
    for (int32_t& k = node_cursor_[node]; k < node_offsets[node + 1]; ++k) {
      const int32_t source = node_ranks[k];
      const int32_t amount = std::min(left_count_[source], left_quota_[i]);
      left_count_[source] -= amount;
      left_quota_[i] -= amount;
      traffic->node_sent[source] += amount;
      traffic->node_received[to] += amount;
      if (left_count_[source] > 0) break;  // the host is full
    }
    traffic->network_received[to] += left_quota_[i];  // its node has no more
  }
  for (int32_t s = 0; s < num_ranks; ++s) traffic->network_sent[s] += left_count_[s];
}

void Splitter::State::AddUpBySource(SplitMode mode, std::span<const int32_t> counts,
                                    RowTraffic* traffic) {
  for (int32_t s = 0; s < num_ranks; ++s) {
    const auto send = [&](int32_t host, int32_t copies) {
      const int32_t to = host_rank[host];
      if (to == s) return;
      const bool near = node_of_rank[to] == node_of_rank[s];
      (near ? traffic->node_sent : traffic->network_sent)[s] += copies;
      (near ? traffic->node_received : traffic->network_received)[to] += copies;
    };
    const int32_t* of_source = counts.data() + static_cast<size_t>(s) * num_experts;
    for (int32_t e = 0; e < num_experts; ++e) ForEachShare(mode, s, e, of_source[e], send);
  }
}

Splitter::Splitter(const LayerHosts& hosts, const CostConstants& constants)
    : state_(std::make_unique<State>(hosts, constants)) {}
Splitter::~Splitter() = default;
Splitter::Splitter(Splitter&&) noexcept = default;
Splitter& Splitter::operator=(Splitter&&) noexcept = default;

void Splitter::Run(SplitMode mode, std::span<const int32_t> counts, Split* split) {
  State& state = *state_;
  const size_t num_ranks = state.num_ranks;
  BALLAST_CHECK(counts.size() == num_ranks * state.num_experts);
  SumOverSources(counts, state.demand);
  if (mode == SplitMode::kExact) {
    state.exact.Run(state.demand, split);
    return;
  }
  if (mode == SplitMode::kCost) {
    state.Cost().Run(state.demand, split);
    return;
  }
  split->quota.assign(state.num_hosts, 0);
  split->rank_load.assign(num_ranks, 0);
  split->certificate.assign(num_ranks, 0);
  split->bound = 0;
  if (mode == SplitMode::kEven) {
    state.SplitEven(split);
  } else {
    if (mode == SplitMode::kPrice) state.FollowPrices();
    state.SplitBySource(mode, counts, split);
  }
  for (int32_t h = 0; h < state.num_hosts; ++h) {
    split->rank_load[state.host_rank[h]] += split->quota[h];
  }
  split->largest_load = *std::max_element(split->rank_load.begin(), split->rank_load.end());
  if (mode == SplitMode::kPrice) state.priced_load = split->rank_load;
}

void Splitter::Cut(SplitMode mode, std::span<const int32_t> counts, const Split& split,
                   int32_t rank, RankPart* part) {
  State& state = *state_;
  BALLAST_CHECK(rank >= 0 && rank < state.num_ranks);
  BALLAST_CHECK(split.quota.size() == static_cast<size_t>(state.num_hosts));
  part->send.assign(state.num_hosts, 0);
  part->receive.assign(state.num_ranks, 0);
  if (IsByQuota(mode)) {
    state.CutQuotas(counts, split, rank, part);
  } else {
    state.CutBySource(mode, counts, rank, part);
  }
}

void Splitter::AddUp(SplitMode mode, std::span<const int32_t> counts, const Split& split,
                     RowTraffic* traffic) {
  State& state = *state_;
  for (std::vector<int64_t>* rows : {&traffic->node_sent, &traffic->node_received,
                                     &traffic->network_sent, &traffic->network_received}) {
    rows->assign(state.num_ranks, 0);
  }
  if (!IsByQuota(mode)) return state.AddUpBySource(mode, counts, traffic);
  for (int32_t e = 0; e < state.num_experts; ++e) state.AddUpExpert(counts, split, e, traffic);
}

}  // namespace ballast
