#include "placement/split_cost.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {
namespace {

enum Visit : uint8_t { kNotYet, kUnderWay, kDone };

constexpr int kMostPasses = 32;  // over the ranks, towards one target: bounds the time of a split

}  // namespace

CostSplitter::CostSplitter(const LayerHosts& hosts, const CostConstants& constants)
    : model_(constants, hosts),
      exact_(hosts),
      num_experts_(hosts.num_experts),
      num_ranks_(hosts.num_ranks),
      host_offsets_(hosts.host_offsets.begin(), hosts.host_offsets.end()),
      host_rank_(hosts.host_rank.begin(), hosts.host_rank.end()),
      expert_of_host_(host_rank_.size()),
      edge_offsets_(num_ranks_ + 1),
      time_(num_ranks_),
      visited_(num_ranks_),
      order_(num_experts_) {
  for (int32_t e = 0; e < num_experts_; ++e) {
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) {
      expert_of_host_[h] = e;
      if (host_offsets_[e + 1] - host_offsets_[e] > 1) ++edge_offsets_[host_rank_[h] + 1];
    }
  }
  for (int32_t r = 0; r < num_ranks_; ++r) edge_offsets_[r + 1] += edge_offsets_[r];
  edges_.resize(edge_offsets_[num_ranks_]);
  std::vector<int32_t> next(edge_offsets_.begin(), edge_offsets_.end() - 1);
  for (int32_t h = 0; h < static_cast<int32_t>(host_rank_.size()); ++h) {
    const int32_t e = expert_of_host_[h];
    if (host_offsets_[e + 1] - host_offsets_[e] > 1) edges_[next[host_rank_[h]]++] = h;
  }
}

void CostSplitter::Start(std::span<const int32_t> quota) {
  quota_.assign(quota.begin(), quota.end());
  model_.RankTicks(quota_, host_rank_, time_);
}

void CostSplitter::Move(int32_t from, int32_t to, int64_t rows) {
  for (const auto& [host, change] : {std::pair(from, -rows), std::pair(to, rows)}) {
    const CostModel::OnRank& cost = model_.on(host_rank_[host]);
    time_[host_rank_[host]] -= cost.Of(quota_[host]);
    quota_[host] += static_cast<int32_t>(change);
    time_[host_rank_[host]] += cost.Of(quota_[host]);
  }
}

// How many rows the host would have to give for its rank to reach the target; all, if that is not
// enough.
int64_t CostSplitter::Surplus(int32_t host, int64_t target) const {
  const int32_t rank = host_rank_[host];
  const CostModel::OnRank& cost = model_.on(rank);
  const int64_t left = target - (time_[rank] - cost.Of(quota_[host]));
  const int64_t keep = whole_ ? 0 : std::max(cost.MostWithin(left), int64_t{0});
  return std::max(quota_[host] - keep, int64_t{0});
}

// How many more rows the host could take without its rank passing the target; may be negative.
int64_t CostSplitter::Room(int32_t host, int64_t target) const {
  const int32_t rank = host_rank_[host];
  const CostModel::OnRank& cost = model_.on(rank);
  return cost.MostWithin(target - (time_[rank] - cost.Of(quota_[host]))) - quota_[host];
}

// A rank that is being relieved takes nothing else: rows that its hosts gave may have to come back.
bool CostSplitter::MayTake(int32_t to, int32_t from) const {
  return to != from && visited_[host_rank_[to]] != kUnderWay;
}

// Gives up to `rows` of the host's rows to the other hosts of its expert that are active, or to
// those that are not, as far as their ranks stay within the target.
void CostSplitter::GiveTo(bool active, int32_t host, int64_t target, int64_t* rows) {
  const int32_t e = expert_of_host_[host];
  for (int32_t to = host_offsets_[e]; to < host_offsets_[e + 1] && *rows > 0; ++to) {
    if (!MayTake(to, host) || (quota_[to] > 0) != active) continue;
    const int64_t amount = std::min(Room(to, target), *rows);
    if (amount <= 0 || (whole_ && amount < *rows)) continue;
    Move(host, to, amount);
    *rows -= amount;
  }
}

// Gives rows to hosts whose ranks have room: what the rank has too much, or what there is room for
// as far as giving that saves time.
void CostSplitter::GiveDirectly(int32_t host, int64_t target) {
  const int32_t e = expert_of_host_[host];
  int64_t rows = Surplus(host, target);
  int64_t room = 0;
  for (int32_t to = host_offsets_[e]; to < host_offsets_[e + 1]; ++to) {
    if (MayTake(to, host)) room += std::max(Room(to, target), int64_t{0});
  }
  if (room < rows && whole_) return;
  if (room < rows) rows = std::min(room, quota_[host] - model_.on(host_rank_[host]).ridge());
  if (rows <= 0) return;
  GiveTo(/*active=*/true, host, target, &rows);
  GiveTo(/*active=*/false, host, target, &rows);
}

// Gives rows to a rank that has no room and must hand on others. What it cannot make room for comes
// back.
void CostSplitter::GiveThrough(int32_t host, int64_t target) {
  const int32_t rank = host_rank_[host];
  const int32_t e = expert_of_host_[host];
  for (int32_t to = host_offsets_[e]; to < host_offsets_[e + 1]; ++to) {
    const int32_t next = host_rank_[to];
    if (visited_[next] != kNotYet || time_[next] > target || time_[rank] <= target) continue;
    const int64_t rows = Surplus(host, target);
    const int64_t before = time_[rank];
    if (rows == 0) continue;
    Move(host, to, rows);
    Relieve(next, target);
    if (time_[next] > target) {
      const int64_t back = whole_ ? rows : std::min(Surplus(to, target), rows);
      Move(to, host, back);
      // What is left saved nothing, and may have gone on meanwhile.
      if (time_[rank] >= before) Move(to, host, std::min<int64_t>(rows - back, quota_[to]));
    }
  }
}

// Lowers the time of the rank towards the target. No other rank passes the target; those within it
// stay within it.
void CostSplitter::Relieve(int32_t rank, int64_t target) {
  visited_[rank] = kUnderWay;
  for (const bool directly : {true, false}) {
    for (int32_t i = edge_offsets_[rank]; i < edge_offsets_[rank + 1]; ++i) {
      if (time_[rank] <= target || quota_[edges_[i]] == 0) continue;
      directly ? GiveDirectly(edges_[i], target) : GiveThrough(edges_[i], target);
    }
  }
  visited_[rank] = kDone;
}

// Whether the search brings all ranks within the target.
bool CostSplitter::Reach(int64_t target) {
  bool progress = true;
  for (int pass = 0; progress && pass < kMostPasses; ++pass) {
    progress = false;
    bool reached = true;
    for (int32_t r = 0; r < num_ranks_; ++r) {
      if (time_[r] <= target) continue;
      const int64_t before = time_[r];
      std::fill(visited_.begin(), visited_.end(), kNotYet);
      Relieve(r, target);
      progress = progress || time_[r] < before;
      reached = reached && time_[r] <= target;
    }
    if (reached)
      return LargestTime() <= target;  // a rank that failed may find a way through one that did not
  }
  return false;
}

// What no quotas beat: the experts that have one host, and a mean over the ranks of what every
// expert costs at least (splitting an expert never costs less in all).
int64_t CostSplitter::LowerBound() const {
  CostModel::OnRank least = model_.on(0);
  for (int32_t r = 1; r < num_ranks_; ++r) {
    least.read = std::min(least.read, model_.on(r).read);
    least.row = std::min(least.row, model_.on(r).row);
    least.link = std::min(least.link, model_.on(r).link);
  }
  int64_t largest = 0, mean = 0;
  for (int32_t r = 0; r < num_ranks_; ++r) {
    int64_t fixed = time_[r] - model_.base();
    for (int32_t i = edge_offsets_[r]; i < edge_offsets_[r + 1]; ++i) {
      fixed -= model_.on(r).Of(quota_[edges_[i]]);
    }
    largest = std::max(largest, fixed);
  }
  for (int32_t e = 0; e < num_experts_; ++e) {
    int64_t rows = 0;
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) rows += quota_[h];
    mean += least.Of(rows) / num_ranks_;
  }
  return std::max(largest, mean) + model_.base();
}

// Bisects for the least largest time that the search reaches from quota_.
void CostSplitter::Improve() {
  best_quota_ = quota_;
  best_time_ = time_;
  int64_t low = LowerBound();
  int64_t high = LargestTime();
  while (low < high) {
    const int64_t target = low + (high - low) / 2;
    if (Reach(target)) {
      best_quota_ = quota_;
      best_time_ = time_;
      high = LargestTime();
    } else {
      low = target + 1;
    }
    quota_ = best_quota_;
    time_ = best_time_;
  }
}

// Puts all rows of each expert on one host: the largest first, where the rank ends earliest.
void CostSplitter::AssignWhole(std::span<const int32_t> demand) {
  quota_.assign(host_rank_.size(), 0);
  std::fill(time_.begin(), time_.end(), model_.base());
  for (int32_t e = 0; e < num_experts_; ++e) {
    const bool shared = host_offsets_[e + 1] - host_offsets_[e] > 1;
    order_[e] = uint64_t{shared} << 63 |
                uint64_t{~static_cast<uint32_t>(demand[e]) & 0x7fffffffu} << 32 |
                static_cast<uint32_t>(e);
  }
  std::sort(order_.begin(), order_.end());  // those without a choice before all others
  for (uint64_t item : order_) {
    const int32_t e = static_cast<int32_t>(item & 0xffffffffu);
    int32_t best = host_offsets_[e];
    int64_t best_end = INT64_MAX;
    for (int32_t h = host_offsets_[e]; h < host_offsets_[e + 1]; ++h) {
      const int64_t end = time_[host_rank_[h]] + model_.on(host_rank_[h]).Of(demand[e]);
      if (end < best_end) best = h, best_end = end;
    }
    quota_[best] = demand[e];
    time_[host_rank_[best]] = best_end;
  }
}

void CostSplitter::Finish(Split* split) {
  split->quota = quota_;
  split->rank_load.assign(num_ranks_, 0);
  split->certificate.assign(num_ranks_, 0);
  split->bound = 0;
  for (size_t h = 0; h < quota_.size(); ++h) split->rank_load[host_rank_[h]] += quota_[h];
  split->largest_load = *std::max_element(split->rank_load.begin(), split->rank_load.end());
}

void CostSplitter::RunActivated(std::span<const int32_t> demand, Split* split) {
  BALLAST_CHECK(demand.size() == static_cast<size_t>(num_experts_));
  AssignWhole(demand);
  whole_ = true;
  Improve();
  whole_ = false;
  Finish(split);
}

void CostSplitter::Run(std::span<const int32_t> demand, Split* split) {
  exact_.Run(demand, split);
  exact_quota_ = split->quota;
  RunActivated(demand, split);
  const int64_t activated = LargestTime();
  Start(exact_quota_);
  if (activated < LargestTime()) Start(split->quota);
  Improve();
  Finish(split);
}

}  // namespace ballast
