#include "placement/split_exact.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace ballast {
namespace {

constexpr int32_t CeilDiv(int64_t a, int64_t b) {
  return static_cast<int32_t>((a + b - 1) / b);
}

// Not std::max_element: this one is vectorised.
int32_t LargestOf(std::span<const int32_t> values) {
  int32_t largest = 0;
  for (int32_t v : values) largest = std::max(largest, v);
  return largest;
}

}  // namespace

ExactSplitter::ExactSplitter(const LayerHosts& hosts)
    : num_experts_(hosts.num_experts),
      num_ranks_(hosts.num_ranks),
      host_offsets_(hosts.host_offsets.begin(), hosts.host_offsets.end()),
      host_rank_(hosts.host_rank.begin(), hosts.host_rank.end()),
      expert_of_host_(host_rank_.size()),
      edge_offsets_(num_ranks_ + 1),
      by_level_(num_ranks_),
      queue_(num_ranks_),
      reached_(num_ranks_),
      expert_seen_(num_experts_),
      give_host_(num_ranks_),
      take_host_(num_ranks_) {
  BALLAST_CHECK(host_offsets_.size() == static_cast<size_t>(num_experts_) + 1);
  for (int32_t e = 0; e < num_experts_; ++e) {
    const int32_t n = host_offsets_[e + 1] - host_offsets_[e];
    BALLAST_CHECK(n >= 1 && n <= num_ranks_);
    (n == 1 ? single_ : shared_).push_back(e);
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) {
      expert_of_host_[h] = e;
      if (n > 1) ++edge_offsets_[host_rank_[h] + 1];
    }
  }
  for (int32_t r = 0; r < num_ranks_; ++r) edge_offsets_[r + 1] += edge_offsets_[r];
  edges_.resize(edge_offsets_[num_ranks_]);
  std::vector<int32_t> next(edge_offsets_.begin(), edge_offsets_.end() - 1);
  for (int32_t e : shared_) {
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) {
      edges_[next[host_rank_[h]]++] = h;
    }
  }
  pour_order_.resize(shared_.size());
}

// Divides the expert's demand over its hosts as water finds its level: the lowest ranks are raised
// first, to levels that differ by one copy at most. Adds the quotas to the rank loads.
void ExactSplitter::Pour(int32_t expert, int32_t demand, Split* split) {
  const int32_t first = host_offsets_[expert];
  const int32_t n = host_offsets_[expert + 1] - first;
  for (int32_t i = 0; i < n; ++i) {  // by insertion: there are few, and ties keep the lower host
    const int32_t load = split->rank_load[host_rank_[first + i]];
    int32_t at = i;
    for (; at > 0 && by_level_[at - 1].first > load; --at) by_level_[at] = by_level_[at - 1];
    by_level_[at] = {load, first + i};
  }
  int64_t left = demand;
  int32_t wet = 1;  // the lowest `wet` hosts stand at the level of by_level_[wet - 1]
  while (wet < n) {
    const int64_t rise = by_level_[wet].first - by_level_[wet - 1].first;
    if (rise * wet > left) break;
    left -= rise * wet++;
  }
  const int32_t level = by_level_[wet - 1].first + static_cast<int32_t>(left / wet);
  const int32_t remainder = static_cast<int32_t>(left % wet);
  for (int32_t i = 0; i < n; ++i) {
    const auto [load, host] = by_level_[i];
    const int32_t quota = i < wet ? level - load + (i < remainder ? 1 : 0) : 0;
    split->quota[host] = quota;
    split->rank_load[host_rank_[host]] += quota;
  }
}

void ExactSplitter::PourAll(std::span<const int32_t> demand, int32_t target, Split* split) {
  for (size_t i = 0; i < shared_.size(); ++i) {
    const uint64_t smallness = ~static_cast<uint32_t>(demand[shared_[i]]);
    pour_order_[i] = smallness << 32 | static_cast<uint32_t>(shared_[i]);
  }
  std::sort(pour_order_.begin(), pour_order_.end());
  for (uint64_t item : pour_order_) {
    const int32_t e = static_cast<int32_t>(item & 0xffffffffu);
    Pour(e, demand[e], split);
  }
  if (LargestOf(split->rank_load) <= target) return;
  for (uint64_t item : pour_order_) {  // again, now that each knows where the others went
    const int32_t e = static_cast<int32_t>(item & 0xffffffffu);
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) {
      split->rank_load[host_rank_[h]] -= split->quota[h];
    }
    Pour(e, demand[e], split);
  }
}

// Moves copies along the search tree from the root above `rank` to `rank`, as many as the path
// carries, without lowering the root below `target` or raising `rank` above it. Returns how many.
int32_t ExactSplitter::PushTo(int32_t rank, int32_t target, Split* split) {
  std::vector<int32_t>& load = split->rank_load;
  std::vector<int32_t>& quota = split->quota;
  int32_t amount = target - load[rank];
  int32_t root = rank;
  while (give_host_[root] >= 0) {
    amount = std::min(amount, quota[give_host_[root]]);
    root = host_rank_[give_host_[root]];
  }
  amount = std::min(amount, load[root] - target);
  if (amount <= 0) return 0;
  for (int32_t at = rank; give_host_[at] >= 0; at = host_rank_[give_host_[at]]) {
    quota[give_host_[at]] -= amount;
    quota[take_host_[at]] += amount;
  }
  load[root] -= amount;
  load[rank] += amount;
  return amount;
}

// One breadth-first search from all ranks above `target` at once, over the experts whose copies
// could be handed on; pushes to each rank below `target` when it is reached. Returns whether any
// copy was pushed. If none, the ranks reached (reached_) are closed: what they carry belongs to
// experts hosted only among them.
bool ExactSplitter::Augment(int32_t target, Split* split) {
  std::fill(reached_.begin(), reached_.end(), 0);
  std::fill(expert_seen_.begin(), expert_seen_.end(), 0);
  int32_t tail = 0;
  for (int32_t r = 0; r < num_ranks_; ++r) {
    if (split->rank_load[r] <= target) continue;
    reached_[r] = 1;
    give_host_[r] = -1;
    queue_[tail++] = r;
  }
  bool pushed = false;
  for (int32_t head = 0; head < tail; ++head) {
    const int32_t rank = queue_[head];
    for (int32_t i = edge_offsets_[rank]; i < edge_offsets_[rank + 1]; ++i) {
      const int32_t give = edges_[i];
      const int32_t expert = expert_of_host_[give];
      if (split->quota[give] == 0 || expert_seen_[expert]) continue;
      expert_seen_[expert] = 1;  // all its hosts are reached from here
      for (int32_t take = host_offsets_[expert]; take < host_offsets_[expert + 1]; ++take) {
        const int32_t to = host_rank_[take];
        if (reached_[to]) continue;
        reached_[to] = 1;
        give_host_[to] = give;
        take_host_[to] = take;
        queue_[tail++] = to;
        if (split->rank_load[to] < target && PushTo(to, target, split) > 0) pushed = true;
      }
    }
  }
  return pushed;
}

// Raises a lower bound `target` on the largest load until quotas attain it; the certificate is
// always a set that proves the bound.
void ExactSplitter::Run(std::span<const int32_t> demand, Split* split) {
  BALLAST_CHECK(demand.size() == static_cast<size_t>(num_experts_));
  split->quota.resize(host_rank_.size());
  split->rank_load.assign(num_ranks_, 0);
  split->certificate.assign(num_ranks_, 1);
  std::vector<int32_t>& load = split->rank_load;
  for (int32_t e : single_) {
    const int32_t host = host_offsets_[e];
    split->quota[host] = demand[e];
    load[host_rank_[host]] += demand[e];
  }
  int64_t total = 0;
  for (int32_t d : demand) total += d;
  BALLAST_CHECK(total <= std::numeric_limits<int32_t>::max());
  int32_t target = CeilDiv(total, num_ranks_);
  const auto fullest = std::max_element(load.begin(), load.end());
  if (*fullest > target) {
    target = *fullest;
    split->certificate.assign(num_ranks_, 0);
    split->certificate[fullest - load.begin()] = 1;
  }
  PourAll(demand, target, split);
  while (LargestOf(load) > target) {
    if (Augment(target, split)) continue;
    int64_t load_inside = 0;
    int64_t ranks_inside = 0;
    for (int32_t r = 0; r < num_ranks_; ++r) {
      if (!reached_[r]) continue;
      load_inside += load[r];
      ++ranks_inside;
    }
    target = CeilDiv(load_inside, ranks_inside);
    std::copy(reached_.begin(), reached_.end(), split->certificate.begin());
  }
  split->bound = target;
  split->largest_load = target;
}

int ScaleDemand(std::span<const int64_t> load, std::vector<int32_t>* demand) {
  int64_t total = 0;
  for (int64_t copies : load) total += copies;
  int shift = 0;
  while ((total >> shift) >= (int64_t{1} << 30)) ++shift;
  demand->resize(load.size());
  for (size_t e = 0; e < load.size(); ++e) (*demand)[e] = static_cast<int32_t>(load[e] >> shift);
  return shift;
}

}  // namespace ballast
