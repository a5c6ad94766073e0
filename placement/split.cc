#include "placement/split.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/random.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr std::pair<SplitMode, const char*> kModes[] = {{SplitMode::kExact, "exact"},
                                                        {SplitMode::kEven, "even"},
                                                        {SplitMode::kRoundRobin, "roundrobin"},
                                                        {SplitMode::kHash, "hash"}};

constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

absl::StatusOr<SplitMode> ParseSplitMode(const std::string& name) {
  std::string choices;
  for (const auto& [mode, mode_name] : kModes) {
    if (name == mode_name) return mode;
    absl::StrAppend(&choices, choices.empty() ? "" : ", ", mode_name);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown split mode '", name, "'; the choices are ", choices));
}

const char* NameOf(SplitMode mode) {
  for (const auto& [known, name] : kModes) {
    if (known == mode) return name;
  }
  return "unknown";
}

// The placement, compiled once, and scratch for one batch. "Shared" experts are those with more
// than one host: only they leave anything to decide.
struct Splitter::State {
  explicit State(const LayerHosts& hosts);

  void SumDemand(std::span<const int32_t> counts);
  void SplitExact(Split* split);
  void SplitEven(Split* split);
  void SplitBySource(SplitMode mode, std::span<const int32_t> counts, Split* split);
  void PartitionOverSources(std::span<const int32_t> counts, Split* split);

  int32_t num_experts, num_ranks, num_hosts;
  std::vector<int32_t> host_offsets, host_rank, host_copies, node_of_rank;
  std::vector<int32_t> expert_of_host;            // [num_hosts]
  std::vector<int32_t> shared;                    // shared experts, ascending
  std::vector<int32_t> edge_offsets, edges;       // per rank: hosts of shared experts on it
  std::vector<int32_t> node_offsets, node_ranks;  // per node: its ranks, ascending

 private:
  void Pour(int32_t expert, int32_t* quota);
  int64_t Augment(int64_t target, int32_t* quota);
  int64_t PushTo(int32_t rank, int64_t target, int32_t* quota);

  std::vector<int64_t> demand_;                        // [E] copies of the batch per expert
  std::vector<int64_t> load_;                          // [R] copies per rank
  std::vector<int32_t> pour_order_;                    // shared experts, largest demand first
  std::vector<std::pair<int64_t, int32_t>> by_level_;  // hosts of one expert by (load, host)
  std::vector<int32_t> queue_;                         // [R] reached ranks in breadth-first order
  std::vector<uint8_t> reached_;                       // [R]
  std::vector<uint8_t> expert_seen_;                   // [E]
  std::vector<int32_t> give_host_;   // [R] host of the parent rank that would give copies, or -1
  std::vector<int32_t> take_host_;   // [R] host of this rank that would take them
  std::vector<int32_t> left_count_;  // [R] copies of one expert still to be sent, per source
  std::vector<int32_t> left_quota_;  // [largest number of hosts] copies still to be taken
};

Splitter::State::State(const LayerHosts& hosts)
    : num_experts(hosts.num_experts),
      num_ranks(hosts.num_ranks),
      num_hosts(static_cast<int32_t>(hosts.host_rank.size())),
      host_offsets(hosts.host_offsets.begin(), hosts.host_offsets.end()),
      host_rank(hosts.host_rank.begin(), hosts.host_rank.end()),
      host_copies(hosts.host_copies.begin(), hosts.host_copies.end()),
      node_of_rank(hosts.node_of_rank.begin(), hosts.node_of_rank.end()),
      expert_of_host(num_hosts),
      edge_offsets(num_ranks + 1),
      demand_(num_experts),
      load_(num_ranks),
      by_level_(num_ranks),
      queue_(num_ranks),
      reached_(num_ranks),
      expert_seen_(num_experts),
      give_host_(num_ranks),
      take_host_(num_ranks),
      left_count_(num_ranks),
      left_quota_(num_ranks) {
  BALLAST_CHECK(host_offsets.size() == static_cast<size_t>(num_experts) + 1);
  for (int32_t e = 0; e < num_experts; ++e) {
    const int32_t n = host_offsets[e + 1] - host_offsets[e];
    BALLAST_CHECK(n >= 1 && n <= num_ranks);
    if (n > 1) shared.push_back(e);
    for (int32_t h = host_offsets[e]; h < host_offsets[e + 1]; ++h) {
      expert_of_host[h] = e;
      if (n > 1) ++edge_offsets[host_rank[h] + 1];
    }
  }
  for (int32_t r = 0; r < num_ranks; ++r) edge_offsets[r + 1] += edge_offsets[r];
  edges.resize(edge_offsets[num_ranks]);
  std::vector<int32_t> next(edge_offsets.begin(), edge_offsets.end() - 1);
  for (int32_t e : shared) {
    for (int32_t h = host_offsets[e]; h < host_offsets[e + 1]; ++h) edges[next[host_rank[h]]++] = h;
  }
  pour_order_ = shared;

  const int32_t num_nodes = *std::max_element(node_of_rank.begin(), node_of_rank.end()) + 1;
  node_offsets.push_back(0);
  for (int32_t node = 0; node < num_nodes; ++node) {
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (node_of_rank[r] == node) node_ranks.push_back(r);
    }
    node_offsets.push_back(static_cast<int32_t>(node_ranks.size()));
  }
}

void Splitter::State::SumDemand(std::span<const int32_t> counts) {
  std::fill(demand_.begin(), demand_.end(), 0);
  for (int32_t s = 0; s < num_ranks; ++s) {
    const int32_t* of_source = counts.data() + static_cast<size_t>(s) * num_experts;
    for (int32_t e = 0; e < num_experts; ++e) demand_[e] += of_source[e];
  }
}

// Divides the expert's demand over its hosts as water finds its level: the lowest ranks are raised
// first, to levels that differ by one copy at most. Adds the quotas to load_.
void Splitter::State::Pour(int32_t expert, int32_t* quota) {
  const int32_t first = host_offsets[expert];
  const int32_t n = host_offsets[expert + 1] - first;
  for (int32_t i = 0; i < n; ++i) by_level_[i] = {load_[host_rank[first + i]], first + i};
  std::sort(by_level_.begin(), by_level_.begin() + n);

  int64_t left = demand_[expert];
  int32_t wet = 1;  // the lowest `wet` hosts stand at the level of by_level_[wet - 1]
  while (wet < n) {
    const int64_t rise = by_level_[wet].first - by_level_[wet - 1].first;
    if (rise * wet > left) break;
    left -= rise * wet++;
  }
  const int64_t level = by_level_[wet - 1].first + left / wet;
  const int64_t remainder = left % wet;
  for (int32_t i = 0; i < n; ++i) {
    const auto [load, host] = by_level_[i];
    const int64_t share = i < wet ? level - load + (i < remainder ? 1 : 0) : 0;
    quota[host] = static_cast<int32_t>(share);
    load_[host_rank[host]] += share;
  }
}

// Moves copies along the search tree from the root above `rank` to `rank`, as many as the path
// carries, without lowering the root below `target` or raising `rank` above it. Returns how many.
int64_t Splitter::State::PushTo(int32_t rank, int64_t target, int32_t* quota) {
  int64_t amount = target - load_[rank];
  int32_t root = rank;
  while (give_host_[root] >= 0) {
    amount = std::min<int64_t>(amount, quota[give_host_[root]]);
    root = host_rank[give_host_[root]];
  }
  amount = std::min(amount, load_[root] - target);
  if (amount <= 0) return 0;
  for (int32_t at = rank; give_host_[at] >= 0; at = host_rank[give_host_[at]]) {
    quota[give_host_[at]] -= static_cast<int32_t>(amount);
    quota[take_host_[at]] += static_cast<int32_t>(amount);
  }
  load_[root] -= amount;
  load_[rank] += amount;
  return amount;
}

// One breadth-first search from all ranks above `target` at once, over the experts whose copies
// could be handed on; pushes to each rank below `target` when it is reached. Returns the copies
// pushed. If none, the ranks reached (reached_) are closed: what they carry belongs to
// experts hosted only among them.
int64_t Splitter::State::Augment(int64_t target, int32_t* quota) {
  std::fill(reached_.begin(), reached_.end(), 0);
  std::fill(expert_seen_.begin(), expert_seen_.end(), 0);
  int32_t tail = 0;
  for (int32_t r = 0; r < num_ranks; ++r) {
    if (load_[r] <= target) continue;
    reached_[r] = 1;
    give_host_[r] = -1;
    queue_[tail++] = r;
  }
  int64_t pushed = 0;
  for (int32_t head = 0; head < tail; ++head) {
    const int32_t rank = queue_[head];
    for (int32_t i = edge_offsets[rank]; i < edge_offsets[rank + 1]; ++i) {
      const int32_t give = edges[i];
      const int32_t expert = expert_of_host[give];
      if (quota[give] == 0 || expert_seen_[expert]) continue;
      expert_seen_[expert] = 1;  // all its hosts are reached from here
      for (int32_t take = host_offsets[expert]; take < host_offsets[expert + 1]; ++take) {
        const int32_t to = host_rank[take];
        if (reached_[to]) continue;
        reached_[to] = 1;
        give_host_[to] = give;
        take_host_[to] = take;
        queue_[tail++] = to;
        if (load_[to] < target) pushed += PushTo(to, target, quota);
      }
    }
  }
  return pushed;
}

// Raises a lower bound `target` on the largest load until quotas attain it; `certificate` is always
// a set that proves the bound.
void Splitter::State::SplitExact(Split* split) {
  int32_t* quota = split->quota.data();
  std::fill(load_.begin(), load_.end(), 0);
  int64_t total = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    total += demand_[e];
    const int32_t h = host_offsets[e];
    if (host_offsets[e + 1] - h > 1) continue;
    quota[h] = static_cast<int32_t>(demand_[e]);
    load_[host_rank[h]] += demand_[e];
  }
  int64_t target = CeilDiv(total, num_ranks);
  const auto fullest = std::max_element(load_.begin(), load_.end());
  if (*fullest > target) {
    target = *fullest;
    split->certificate[fullest - load_.begin()] = 1;
  } else {
    std::fill(split->certificate.begin(), split->certificate.end(), 1);
  }

  std::sort(pour_order_.begin(), pour_order_.end(), [this](int32_t a, int32_t b) {
    return demand_[a] != demand_[b] ? demand_[a] > demand_[b] : a < b;
  });
  for (int32_t e : pour_order_) Pour(e, quota);
  for (int32_t e : pour_order_) {  // again, now that each knows where the others went
    for (int32_t h = host_offsets[e]; h < host_offsets[e + 1]; ++h) load_[host_rank[h]] -= quota[h];
    Pour(e, quota);
  }

  while (*std::max_element(load_.begin(), load_.end()) > target) {
    if (Augment(target, quota) > 0) continue;
    int64_t load = 0;
    int64_t ranks = 0;
    for (int32_t r = 0; r < num_ranks; ++r) {
      if (!reached_[r]) continue;
      load += load_[r];
      ++ranks;
    }
    target = CeilDiv(load, ranks);
    std::copy(reached_.begin(), reached_.end(), split->certificate.begin());
  }
  split->bound = target;
}

void Splitter::State::SplitEven(Split* split) {
  for (int32_t e = 0; e < num_experts; ++e) {
    const int32_t first = host_offsets[e];
    const int32_t n = host_offsets[e + 1] - first;
    int64_t copies = 0;
    for (int32_t i = 0; i < n; ++i) copies += host_copies[first + i];
    int64_t left = demand_[e];
    for (int32_t i = 0; i < n; ++i) {
      const int64_t weighted = demand_[e] * host_copies[first + i];
      split->quota[first + i] = static_cast<int32_t>(weighted / copies);
      left -= weighted / copies;
      by_level_[i] = {-(weighted % copies), first + i};  // largest remainder first
    }
    if (left == 0) continue;
    std::sort(by_level_.begin(), by_level_.begin() + n);
    for (int64_t i = 0; i < left; ++i) ++split->quota[by_level_[i].second];
  }
}

void Splitter::State::SplitBySource(SplitMode mode, std::span<const int32_t> counts, Split* split) {
  for (int32_t s = 0; s < num_ranks; ++s) {
    int32_t* share = split->share.data() + static_cast<size_t>(s) * num_hosts;
    for (int32_t e = 0; e < num_experts; ++e) {
      const int32_t count = counts[static_cast<size_t>(s) * num_experts + e];
      const int32_t first = host_offsets[e];
      const int32_t n = host_offsets[e + 1] - first;
      if (mode == SplitMode::kRoundRobin) {
        for (int32_t i = 0; i < n; ++i) share[first + i] = count / n;
        for (int32_t j = 0; j < count % n; ++j) ++share[first + (j + s) % n];
      } else {
        for (int32_t j = 0; j < count; ++j) ++share[first + RandomBits(s, j) % n];
      }
      for (int32_t i = 0; i < n; ++i) split->quota[first + i] += share[first + i];
    }
  }
}

void Splitter::State::PartitionOverSources(std::span<const int32_t> counts, Split* split) {
  const auto share = [&](int32_t source, int32_t host) -> int32_t& {
    return split->share[static_cast<size_t>(source) * num_hosts + host];
  };
  for (int32_t e = 0; e < num_experts; ++e) {
    if (demand_[e] == 0) continue;
    const int32_t first = host_offsets[e];
    const int32_t n = host_offsets[e + 1] - first;
    for (int32_t s = 0; s < num_ranks; ++s) {
      left_count_[s] = counts[static_cast<size_t>(s) * num_experts + e];
    }
    if (n == 1) {
      for (int32_t s = 0; s < num_ranks; ++s) share(s, first) = left_count_[s];
      continue;
    }
    const auto send = [&](int32_t source, int32_t i) {
      const int32_t amount = std::min(left_count_[source], left_quota_[i]);
      share(source, first + i) += amount;
      left_count_[source] -= amount;
      left_quota_[i] -= amount;
    };
    for (int32_t i = 0; i < n; ++i) {
      left_quota_[i] = split->quota[first + i];
      send(host_rank[first + i], i);
    }
    for (int32_t i = 0; i < n; ++i) {
      const int32_t node = node_of_rank[host_rank[first + i]];
      for (int32_t k = node_offsets[node]; left_quota_[i] > 0 && k < node_offsets[node + 1]; ++k) {
        send(node_ranks[k], i);
      }
    }
    for (int32_t s = 0, i = 0; s < num_ranks; ++s) {
      while (left_count_[s] > 0) {  // the quotas add up to the counts: a host is left
        send(s, i);
        if (left_quota_[i] == 0) ++i;
      }
    }
  }
}

Splitter::Splitter(const LayerHosts& hosts) : state_(std::make_unique<State>(hosts)) {}
Splitter::~Splitter() = default;
Splitter::Splitter(Splitter&&) noexcept = default;
Splitter& Splitter::operator=(Splitter&&) noexcept = default;

void Splitter::Run(SplitMode mode, std::span<const int32_t> counts, Split* split) {
  State& state = *state_;
  const size_t num_ranks = state.num_ranks;
  const size_t num_hosts = state.num_hosts;
  BALLAST_CHECK(counts.size() == num_ranks * state.num_experts);
  split->quota.assign(num_hosts, 0);
  split->share.assign(num_ranks * num_hosts, 0);
  split->rank_load.assign(num_ranks, 0);
  split->certificate.assign(num_ranks, 0);
  split->bound = 0;

  state.SumDemand(counts);
  switch (mode) {
    case SplitMode::kExact:
      state.SplitExact(split);
      state.PartitionOverSources(counts, split);
      break;
    case SplitMode::kEven:
      state.SplitEven(split);
      state.PartitionOverSources(counts, split);
      break;
    case SplitMode::kRoundRobin:
    case SplitMode::kHash:
      state.SplitBySource(mode, counts, split);
      break;
  }
  for (size_t h = 0; h < num_hosts; ++h) split->rank_load[state.host_rank[h]] += split->quota[h];
  split->largest_load = *std::max_element(split->rank_load.begin(), split->rank_load.end());
}

}  // namespace ballast
