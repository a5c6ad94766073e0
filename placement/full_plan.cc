#include "placement/full_plan.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "placement/split_exact.h"

namespace ballast {
namespace {

constexpr int64_t kMostLoad = int64_t{1} << 60;
constexpr int64_t kBitsPerWord = 64;

int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int32_t RanksWithSlots(const Topology& topology) {
  int32_t count = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) count += topology.slots_on(r) > 0 ? 1 : 0;
  return count;
}

int64_t TotalOf(std::span<const int64_t> load) {
  int64_t total = 0;
  for (int64_t copies : load) {
    BALLAST_CHECK(copies >= 0 && copies <= kMostLoad);
    total += copies;
    BALLAST_CHECK(total <= kMostLoad);
  }
  return total;
}

// The whole experts that each rank takes: together `num_experts`, as even as the slots allow.
std::vector<int32_t> WidthsOf(const Topology& topology, int32_t num_experts) {
  std::vector<int32_t> widths(topology.num_ranks(), 0);
  for (int32_t left = num_experts, level = 1; left > 0; ++level) {
    for (int32_t r = 0; r < topology.num_ranks() && left > 0; ++r) {
      if (topology.slots_on(r) < level) continue;
      widths[r] = level;
      --left;
    }
  }
  return widths;
}

}  // namespace

int64_t LoadLowerBound(const Topology& topology, std::span<const int64_t> load) {
  const int64_t num_ranks = RanksWithSlots(topology);
  const int64_t total = TotalOf(load);
  BALLAST_CHECK(topology.num_slots() >= static_cast<int64_t>(load.size()));
  const auto fits = [&](int64_t bound) {
    int64_t slots = 0;
    for (int64_t copies : load) {
      const int64_t needed = std::max<int64_t>(1, CeilDiv(copies, bound));
      if (needed > num_ranks) return false;
      slots += needed;
    }
    return slots <= topology.num_slots();
  };
  int64_t low = std::max<int64_t>(1, CeilDiv(total, num_ranks));
  int64_t high = std::max(low, load.empty() ? 0 : *std::max_element(load.begin(), load.end()));
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = fits(middle) ? middle : middle + 1;
  }
  return total == 0 ? 0 : low;
}

absl::StatusOr<FullPlanner> FullPlanner::Create(Topology topology, int32_t num_experts) {
  if (num_experts < 1 || num_experts > topology.num_slots()) {
    return absl::InvalidArgumentError(
        absl::StrCat(num_experts, " experts for ", topology.num_slots(),
                     " slots; there must be at least one expert and as many slots as experts"));
  }
  return FullPlanner(std::move(topology), num_experts);
}

FullPlanner::FullPlanner(Topology topology, int32_t num_experts)
    : topology_(std::move(topology)),
      num_experts_(num_experts),
      num_used_ranks_(RanksWithSlots(topology_)),
      copies_(num_experts),
      on_rank_(topology_.num_ranks() * CeilDiv(num_experts, kBitsPerWord)),
      per_copy_(num_experts) {
  const int32_t width = static_cast<int32_t>(CeilDiv(num_experts, num_used_ranks_));
  int32_t tight_ranks = 0;  // the last rank takes what is left: it alone may do without spare slot
  bool fits = true;
  for (int32_t r = 0; r < topology_.num_ranks(); ++r) {
    const int32_t slots = topology_.slots_on(r);
    if (slots == 0) continue;
    fits = fits && slots >= width;
    tight_ranks += slots == width ? 1 : 0;
  }
  if (fits && tight_ranks <= 1) window_ = width;
}

void FullPlanner::SortItems(std::span<const int64_t> load) {
  items_.resize(load.size());
  for (int32_t e = 0; e < num_experts_; ++e) items_[e] = {load[e], e};
  std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
    return a.load != b.load ? a.load < b.load : a.expert < b.expert;
  });
}

// The last window of `width` items whose sum is at most `share`, or the first window if all are
// above; looks upwards or downwards from `start`, since sums rise with the position.
int32_t FullPlanner::LastWindowUpTo(int64_t share, int32_t width, int32_t start,
                                    int64_t* sum) const {
  const int32_t last = static_cast<int32_t>(items_.size()) - width;
  int32_t at = std::clamp(start, 0, last);
  int64_t load = 0;
  for (int32_t i = at; i < at + width; ++i) load += items_[i].load;
  while (at > 0 && load > share) {
    --at;
    load += items_[at].load - items_[at + width].load;
  }
  while (at < last && load + items_[at + width].load - items_[at].load <= share) {
    load += items_[at + width].load - items_[at].load;
    ++at;
  }
  *sum = load;
  return at;
}

// Removes the window; if `rest` is positive, also the item after it, whose rest goes back where it
// belongs: not above the window, as all before the window is lighter than all in it.
void FullPlanner::TakeWindow(int32_t first, int32_t width, int64_t rest) {
  const auto begin = items_.begin() + first;
  if (rest <= 0) {
    items_.erase(begin, begin + width);
    return;
  }
  const Item back = {rest, items_[first + width].expert};
  const auto to = std::lower_bound(items_.begin(), begin, back, [](const Item& a, const Item& b) {
    return a.load != b.load ? a.load < b.load : a.expert < b.expert;
  });
  std::move_backward(to, begin, begin + 1);
  *to = back;
  items_.erase(begin + 1, begin + 1 + width);
}

void FullPlanner::PlanByWindows(int64_t total, FullPlan* plan) {
  // Experts without load make the number a multiple of the ranks; they take no slot.
  const int64_t padding = int64_t{window_} * num_used_ranks_ - num_experts_;
  items_.insert(items_.begin(), padding, Item{0, kNoExpert});
  const int64_t mean = total / num_used_ranks_;
  int64_t ceilings = total % num_used_ranks_;  // so many ranks take one copy more
  int32_t at = 0;
  int32_t tight_rank = -1;
  const auto serve = [&](int32_t rank) {
    const int64_t share = mean + (ceilings-- > 0 ? 1 : 0);
    int64_t sum = 0;
    at = LastWindowUpTo(share, window_, at, &sum);
    int32_t slot = topology_.slot_offsets[rank];
    for (int32_t i = at; i < at + window_; ++i) {
      if (items_[i].expert == kNoExpert) continue;
      plan->expert_of_slot[slot] = items_[i].expert;
      plan->quota[slot++] = items_[i].load;
    }
    int64_t rest = 0;
    if (sum < share) {
      const Item& next = items_[at + window_];
      rest = next.load - (share - sum);
      plan->expert_of_slot[slot] = next.expert;
      plan->quota[slot] = share - sum;
    }
    TakeWindow(at, window_, rest);
  };
  for (int32_t r = 0; r < topology_.num_ranks(); ++r) {
    if (topology_.slots_on(r) == window_) tight_rank = r;
    if (topology_.slots_on(r) > window_) serve(r);
  }
  if (tight_rank >= 0) serve(tight_rank);
  BALLAST_CHECK(items_.empty());
  plan->largest_load = mean + (total % num_used_ranks_ > 0 ? 1 : 0);
  plan->lower_bound = plan->largest_load;
  plan->by_windows = true;
}

// Windows on ranks of which only some have a spare slot: the tight ones first, so that the others
// can even out what is left. Tight ranks take a window below their share, or the nearest one.
void FullPlanner::PackWindows(bool nearest, std::vector<int32_t>* row) {
  const std::vector<int32_t> widths = WidthsOf(topology_, num_experts_);
  std::vector<int32_t> order;
  for (bool tight : {true, false}) {
    for (int32_t r = 0; r < topology_.num_ranks(); ++r) {
      if (topology_.slots_on(r) == 0) continue;
      if ((topology_.slots_on(r) == widths[r]) == tight) order.push_back(r);
    }
  }
  int64_t left = 0;
  for (const Item& item : items_) left += item.load;
  int64_t ranks_left = num_used_ranks_;
  int32_t at = 0;
  for (int32_t rank : order) {
    const int64_t share = CeilDiv(left, ranks_left--);
    const int32_t num_items = static_cast<int32_t>(items_.size());
    const int32_t width = std::min(widths[rank], num_items);
    const bool has_spare = topology_.slots_on(rank) > width;
    int64_t sum = 0;
    at = LastWindowUpTo(share, width, at, &sum);
    if (nearest && !has_spare && at + width < num_items) {
      const int64_t above = sum + items_[at + width].load - items_[at].load;
      if (above - share < share - sum) sum = above, ++at;
    }
    int32_t slot = topology_.slot_offsets[rank];
    for (int32_t i = at; i < at + width; ++i) (*row)[slot++] = items_[i].expert;
    int64_t rest = 0;
    if (has_spare && sum < share && at + width < num_items &&
        items_[at + width].load > share - sum) {
      (*row)[slot] = items_[at + width].expert;
      rest = items_[at + width].load - (share - sum);
      sum = share;
    }
    TakeWindow(at, width, rest);
    left -= sum;
  }
  BALLAST_CHECK(items_.empty());
}

// Copies to the largest load per copy, then each, heaviest first, onto the lightest rank that lacks
// it; a copy for which there is none is left out.
void FullPlanner::PackGreedily(std::span<const int64_t> load, std::vector<int32_t>* row) const {
  std::vector<int32_t> copies(num_experts_, 1);
  const auto per_copy = [&](int32_t e) {
    return static_cast<double>(load[e]) / static_cast<double>(copies[e]);
  };
  std::priority_queue<std::pair<double, int32_t>> hottest;  // (load per copy, -expert)
  for (int32_t e = 0; e < num_experts_; ++e) hottest.push({per_copy(e), -e});
  for (int32_t spare = topology_.num_slots() - num_experts_; spare > 0 && !hottest.empty();) {
    const int32_t e = -hottest.top().second;
    hottest.pop();
    if (copies[e] >= num_used_ranks_) continue;
    ++copies[e];
    --spare;
    hottest.push({per_copy(e), -e});
  }
  std::vector<int32_t> order(num_experts_);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return per_copy(a) > per_copy(b); });
  std::vector<double> rank_load(topology_.num_ranks(), 0.0);
  std::vector<int32_t> filled(topology_.num_ranks(), 0);
  std::vector<int32_t> last_expert(topology_.num_ranks(), kNoExpert);
  for (int32_t e : order) {
    for (int32_t c = 0; c < copies[e]; ++c) {
      int32_t best = -1;
      for (int32_t r = 0; r < topology_.num_ranks(); ++r) {
        if (filled[r] == topology_.slots_on(r) || last_expert[r] == e) continue;
        if (best < 0 || rank_load[r] < rank_load[best]) best = r;
      }
      if (best < 0) break;
      (*row)[topology_.slot_offsets[best] + filled[best]++] = e;
      last_expert[best] = e;
      rank_load[best] += per_copy(e);
    }
  }
}

// Gives the empty slots further copies, one per rank in turn.
void FullPlanner::FillSpare(std::span<const int64_t> load, std::vector<int32_t>* row) {
  const int64_t words = CeilDiv(num_experts_, kBitsPerWord);
  std::fill(copies_.begin(), copies_.end(), 0);
  std::fill(on_rank_.begin(), on_rank_.end(), 0);
  const auto holds = [&](int32_t rank, int32_t e) {
    return (on_rank_[rank * words + e / kBitsPerWord] >> (e % kBitsPerWord) & 1) != 0;
  };
  const auto add = [&](int32_t rank, int32_t e) {
    on_rank_[rank * words + e / kBitsPerWord] |= uint64_t{1} << (e % kBitsPerWord);
    per_copy_[e] = static_cast<double>(load[e]) / ++copies_[e];
  };
  const int32_t num_ranks = topology_.num_ranks();
  for (int32_t r = 0; r < num_ranks; ++r) {
    for (int32_t s = topology_.slot_offsets[r]; s < topology_.slot_offsets[r + 1]; ++s) {
      if ((*row)[s] != kNoExpert) add(r, (*row)[s]);
    }
  }
  // Nearly alike: the hottest expert has at most twice the mean load.
  const int64_t hottest_load = *std::max_element(load.begin(), load.end());
  const bool ring = hottest_load / 2 <= TotalOf(load) / num_experts_;
  std::vector<int32_t> next(topology_.slot_offsets.begin(), topology_.slot_offsets.end() - 1);
  for (bool placed = true; placed;) {
    placed = false;
    for (int32_t r = 0; r < num_ranks; ++r) {
      while (next[r] < topology_.slot_offsets[r + 1] && (*row)[next[r]] != kNoExpert) ++next[r];
      if (next[r] == topology_.slot_offsets[r + 1]) continue;
      int32_t best = kNoExpert;
      for (int32_t distance = 1; ring && best == kNoExpert && distance < num_ranks; ++distance) {
        const int32_t from = (r + distance) % num_ranks;
        for (int32_t s = topology_.slot_offsets[from]; s < topology_.slot_offsets[from + 1]; ++s) {
          const int32_t e = (*row)[s];
          if (e == kNoExpert || holds(r, e)) continue;
          if (best == kNoExpert || per_copy_[e] > per_copy_[best]) best = e;
        }
      }
      for (int32_t e = 0; !ring && e < num_experts_; ++e) {
        if ((best == kNoExpert || per_copy_[e] > per_copy_[best]) && !holds(r, e)) best = e;
      }
      if (best == kNoExpert) continue;
      (*row)[next[r]] = best;
      add(r, best);
      placed = true;
    }
  }
}

// The exact split of the row; quotas of loads beyond the splitter's 32 bits are scaled.
void FullPlanner::SplitRow(std::span<const int64_t> load, FullPlan* plan) const {
  const absl::StatusOr<Placement> placement =
      Placement::Create(1, num_experts_, topology_, plan->expert_of_slot, /*epoch=*/0);
  BALLAST_CHECK(placement.ok());
  std::vector<int32_t> demand;
  const int shift = ScaleDemand(load, &demand);
  const LayerHosts& hosts = placement->hosts(0);
  Split split;
  ExactSplitter(hosts).Run(demand, &split);
  plan->quota.assign(plan->expert_of_slot.size(), 0);
  std::vector<int64_t> rank_load(topology_.num_ranks(), 0);
  for (int32_t e = 0; e < num_experts_; ++e) {
    for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
      int64_t quota = static_cast<int64_t>(split.quota[h]) << shift;
      if (h == hosts.host_offsets[e]) quota += load[e] - (load[e] >> shift << shift);
      plan->quota[hosts.host_slot[h]] = quota;
      rank_load[hosts.host_rank[h]] += quota;
    }
  }
  plan->largest_load = *std::max_element(rank_load.begin(), rank_load.end());
}

void FullPlanner::PlanWithFewSpare(std::span<const int64_t> load, FullPlan* plan) {
  FullPlan candidate;
  for (int form = 0; form < 3; ++form) {
    candidate.expert_of_slot.assign(topology_.num_slots(), kNoExpert);
    if (form < 2) {
      SortItems(load);
      PackWindows(/*nearest=*/form == 1, &candidate.expert_of_slot);
    } else {
      PackGreedily(load, &candidate.expert_of_slot);
    }
    FillSpare(load, &candidate.expert_of_slot);
    SplitRow(load, &candidate);
    if (form == 0 || candidate.largest_load < plan->largest_load) *plan = candidate;
  }
  plan->lower_bound = LoadLowerBound(topology_, load);
}

void FullPlanner::Plan(std::span<const int64_t> load, FullPlan* plan) {
  BALLAST_CHECK(static_cast<int32_t>(load.size()) == num_experts_);
  plan->by_windows = false;
  if (window_ == 0) {
    PlanWithFewSpare(load, plan);
    return;
  }
  const int64_t total = TotalOf(load);
  plan->expert_of_slot.assign(topology_.num_slots(), kNoExpert);
  plan->quota.assign(topology_.num_slots(), 0);
  SortItems(load);
  PlanByWindows(total, plan);
  FillSpare(load, &plan->expert_of_slot);
}

}  // namespace ballast
