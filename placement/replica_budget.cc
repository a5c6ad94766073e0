#include "placement/replica_budget.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "placement/full_plan.h"

namespace ballast {
namespace {

// Layers times copies that are weighed against each other: a quarter of a GiB of memory.
constexpr int64_t kMostChoices = int64_t{1} << 26;
// Of all layers together, so that their largest loads can be added up.
constexpr int64_t kMostLoad = int64_t{1} << 60;

// F_l(c) for c = 0, 1, ... as far as it falls.
using Curve = std::vector<int64_t>;

int64_t At(const Curve& curve, int64_t copies) {
  return curve[static_cast<size_t>(std::min(copies, static_cast<int64_t>(curve.size()) - 1))];
}

// `num_slots` slots, dealt to the ranks from rank 0 on.
Topology Dealt(int32_t num_slots, int32_t num_ranks) {
  Topology topology = Topology::Uniform(num_ranks, 0);
  for (int32_t r = 0; r < num_ranks; ++r) {
    topology.slot_offsets[r + 1] =
        topology.slot_offsets[r] + num_slots / num_ranks + (r < num_slots % num_ranks ? 1 : 0);
  }
  return topology;
}

// The most copies that a layer has room for: no rank holds an expert twice.
int32_t MostCopies(int32_t num_experts, const ReplicaBudgetOptions& options) {
  return options.num_ranks * std::min(options.slots_per_rank, num_experts) - num_experts;
}

absl::Status CheckOptions(const LoadTable& load, const ReplicaBudgetOptions& options) {
  const auto reject = [](const char* name, int64_t value, const std::string& allowed) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ", allowed: ", allowed));
  };
  if (options.num_ranks < 1) return reject("num_ranks", options.num_ranks, "at least 1");
  const int64_t slots = int64_t{options.num_ranks} * options.slots_per_rank;
  if (slots < load.num_experts || slots > (1 << 20)) {
    return reject("slots of a layer", slots,
                  absl::StrCat("from the experts, ", load.num_experts, ", to ", 1 << 20));
  }
  const int64_t room = int64_t{load.num_layers} * MostCopies(load.num_experts, options);
  if (options.copies < 0 || options.copies > room) {
    return reject("replica budget", options.copies,
                  absl::StrCat("0 to ", room, ", the copies that ", load.num_layers,
                               " layers have room for"));
  }
  int64_t total = 0;
  for (int64_t copies : load.load) {
    if (copies < 0 || copies > kMostLoad - total) {
      return absl::InvalidArgumentError("the loads of all layers add up to more than 2^60");
    }
    total += copies;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Curve>> MakeCurves(const LoadTable& load,
                                              const ReplicaBudgetOptions& options) {
  std::vector<Curve> curves(load.num_layers);
  std::vector<int64_t> mean(load.num_layers);  // rounded up: no plan does better
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    const auto row = load.layer(layer);
    const int64_t total = std::accumulate(row.begin(), row.end(), int64_t{0});
    mean[layer] = (total + options.num_ranks - 1) / options.num_ranks;
  }
  FullPlan plan;
  const int64_t most = std::min<int64_t>(MostCopies(load.num_experts, options), options.copies);
  for (int32_t copies = 0; copies <= most; ++copies) {
    BALLAST_ASSIGN_OR_RETURN(
        FullPlanner planner,
        FullPlanner::Create(Dealt(load.num_experts + copies, options.num_ranks), load.num_experts));
    for (int32_t layer = 0; layer < load.num_layers; ++layer) {
      Curve& curve = curves[layer];
      if (!curve.empty() && curve.back() == mean[layer]) continue;
      planner.Plan(load.layer(layer), &plan);
      curve.push_back(curve.empty() ? plan.largest_load
                                    : std::min(curve.back(), plan.largest_load));
    }
  }
  for (Curve& curve : curves) {
    while (curve.size() > 1 && curve[curve.size() - 2] == curve.back()) curve.pop_back();
  }
  return curves;
}

// Copies per layer with the least sum of the curves, `budget` at most.
absl::StatusOr<std::vector<int32_t>> BestCopies(const std::vector<Curve>& curves, int64_t budget) {
  const int64_t num_layers = static_cast<int64_t>(curves.size());
  int64_t useful = 0;
  for (const Curve& curve : curves) useful += static_cast<int64_t>(curve.size()) - 1;
  budget = std::min(budget, useful);
  if (num_layers * (budget + 1) > kMostChoices) {
    return absl::InvalidArgumentError(absl::StrCat("replica budget is ", budget, " for ",
                                                   num_layers, " layers, allowed: a product of ",
                                                   kMostChoices));
  }
  const size_t width = static_cast<size_t>(budget) + 1;
  // rest[b] is the least sum of the layers looked at so far, from the last one up, with b copies;
  // choice[l][b] is what layer l takes of them.
  std::vector<int64_t> rest(width, 0), sum(width);
  std::vector<int32_t> choice(curves.size() * width);
  for (size_t layer = curves.size(); layer-- > 0;) {
    const Curve& curve = curves[layer];
    for (size_t b = 0; b < width; ++b) {
      size_t best = 0;
      for (size_t c = 1; c < curve.size() && c <= b; ++c) {
        if (curve[c] == curve[c - 1]) continue;  // one less is as good
        if (curve[c] + rest[b - c] <= curve[best] + rest[b - best]) best = c;
      }
      sum[b] = curve[best] + rest[b - best];
      choice[layer * width + b] = static_cast<int32_t>(best);
    }
    rest.swap(sum);
  }
  std::vector<int32_t> copies;
  size_t left = static_cast<size_t>(budget);
  for (size_t layer = 0; layer < curves.size(); ++layer) {
    copies.push_back(choice[layer * width + left]);
    left -= static_cast<size_t>(copies.back());
  }
  return copies;
}

// Spends what is left of the budget on the layers with the fewest copies, ties to the lower layer.
void SpendRest(int64_t budget, int32_t most, std::vector<int32_t>* copies) {
  int64_t left = budget - std::accumulate(copies->begin(), copies->end(), int64_t{0});
  for (int32_t level = *std::min_element(copies->begin(), copies->end()); left > 0; ++level) {
    BALLAST_CHECK(level < most);  // the budget was checked against the room
    for (int32_t& of_layer : *copies) {
      if (left == 0) break;
      if (of_layer > level) continue;
      ++of_layer;
      --left;
    }
  }
}

// Fills the empty slots of a rank with the experts it lacks that have most load per copy.
void FillEmpty(const Topology& topology, std::span<const int64_t> load, std::vector<int32_t>* row) {
  std::vector<int64_t> replicas(load.size(), 0);
  for (int32_t e : *row) {
    if (e != kNoExpert) ++replicas[e];
  }
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    const auto begin = row->begin() + topology.slot_offsets[r];
    const auto end = row->begin() + topology.slot_offsets[r + 1];
    for (auto slot = std::find(begin, end, kNoExpert); slot != end;
         slot = std::find(slot, end, kNoExpert)) {
      int32_t best = kNoExpert;
      for (int32_t e = 0; e < static_cast<int32_t>(load.size()); ++e) {
        if (std::find(begin, end, e) != end) continue;
        const auto per_copy = [&](int32_t x) {
          return static_cast<double>(load[x]) / static_cast<double>(replicas[x]);
        };
        if (best == kNoExpert || per_copy(e) > per_copy(best)) best = e;
      }
      BALLAST_CHECK(best != kNoExpert);  // no rank has more slots than there are experts
      *slot = best;
      ++replicas[best];
    }
  }
}

// A row of E + copies slots, dealt from rank 0 on, whose largest load is `largest_load`: the plan
// with the most slots that attains it, and copies in the slots it does not know.
absl::StatusOr<std::vector<int32_t>> PlanRow(std::span<const int64_t> load, int32_t num_ranks,
                                             int32_t copies, int64_t largest_load) {
  const int32_t num_experts = static_cast<int32_t>(load.size());
  const Topology wanted = Dealt(num_experts + copies, num_ranks);
  FullPlan plan;
  for (int32_t planned = copies; planned >= 0; --planned) {
    const Topology topology = Dealt(num_experts + planned, num_ranks);
    BALLAST_ASSIGN_OR_RETURN(FullPlanner planner, FullPlanner::Create(topology, num_experts));
    planner.Plan(load, &plan);
    if (plan.largest_load > largest_load) continue;
    std::vector<int32_t> row(wanted.num_slots(), kNoExpert);
    for (int32_t r = 0; r < num_ranks; ++r) {
      std::copy_n(plan.expert_of_slot.begin() + topology.slot_offsets[r], topology.slots_on(r),
                  row.begin() + wanted.slot_offsets[r]);
    }
    FillEmpty(wanted, load, &row);
    return row;
  }
  return absl::InternalError("no plan attains the load of the curve");
}

std::vector<int32_t> UniformCopies(int64_t copies, int32_t num_layers) {
  std::vector<int32_t> per_layer;
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    per_layer.push_back(
        static_cast<int32_t>(copies / num_layers + (layer < copies % num_layers ? 1 : 0)));
  }
  return per_layer;
}

}  // namespace

absl::StatusOr<ReplicaBudget> SpendReplicaBudget(const LoadTable& load,
                                                 const ReplicaBudgetOptions& options) {
  BALLAST_RETURN_IF_ERROR(CheckOptions(load, options));
  BALLAST_ASSIGN_OR_RETURN(const std::vector<Curve> curves, MakeCurves(load, options));
  ReplicaBudget budget;
  BALLAST_ASSIGN_OR_RETURN(budget.copies, BestCopies(curves, options.copies));
  SpendRest(options.copies, MostCopies(load.num_experts, options), &budget.copies);
  const std::vector<int32_t> uniform = UniformCopies(options.copies, load.num_layers);
  const Topology slots = Topology::Uniform(options.num_ranks, options.slots_per_rank);
  budget.expert_of_slot.assign(static_cast<size_t>(load.num_layers) * slots.num_slots(), kNoExpert);
  int32_t first_rank = 0;  // where the deal of all layers goes on
  for (int32_t layer = 0; layer < load.num_layers; ++layer) {
    budget.largest_load.push_back(At(curves[layer], budget.copies[layer]));
    budget.uniform_largest_load.push_back(At(curves[layer], uniform[layer]));
    BALLAST_ASSIGN_OR_RETURN(const std::vector<int32_t> row,
                             PlanRow(load.layer(layer), options.num_ranks, budget.copies[layer],
                                     budget.largest_load[layer]));
    const Topology dealt = Dealt(static_cast<int32_t>(row.size()), options.num_ranks);
    auto of_layer = budget.expert_of_slot.begin() + int64_t{layer} * slots.num_slots();
    for (int32_t r = 0; r < options.num_ranks; ++r) {
      const int32_t rank = (first_rank + r) % options.num_ranks;
      std::copy_n(row.begin() + dealt.slot_offsets[r], dealt.slots_on(r),
                  of_layer + slots.slot_offsets[rank]);
    }
    first_rank = (first_rank + static_cast<int32_t>(row.size())) % options.num_ranks;
  }
  return budget;
}

}  // namespace ballast
