#include "placement/controller.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "placement/regroup.h"
#include "placement/split_exact.h"

namespace ballast {
namespace {

// A window is kept as about this many chunks: old steps leave it in pieces that small.
constexpr int64_t kChunksPerWindow = 16;
constexpr int64_t kMostWindowTokens = int64_t{1} << 40;

absl::Status CheckOptions(const ControllerOptions& options, const Topology& topology) {
  const auto reject = [](const char* name, auto value, const std::string& allowed) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, "; it must be ", allowed));
  };
  if (options.num_groups < 1) return reject("num_groups", options.num_groups, "at least 1");
  if (options.window_tokens < 1 || options.window_tokens > kMostWindowTokens) {
    return reject("window_tokens", options.window_tokens, "in [1, 2^40]");
  }
  if (options.min_steps_between < 0) {
    return reject("min_steps_between", options.min_steps_between, "at least 0");
  }
  if (options.force_every_steps < 0) {
    return reject("force_every_steps", options.force_every_steps, "at least 0");
  }
  if (options.layers_per_plan < 0) {
    return reject("layers_per_plan", options.layers_per_plan, "at least 0");
  }
  if (options.batch_tokens < 1) return reject("batch_tokens", options.batch_tokens, "at least 1");
  if (!(options.rho >= 0.0)) return reject("rho", options.rho, "at least 0");
  if (!(options.min_gain >= 0.0)) return reject("min_gain", options.min_gain, "at least 0");
  if (options.backoff_steps < 0)
    return reject("backoff_steps", options.backoff_steps, "at least 0");
  int32_t most_slots = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    most_slots = std::max(most_slots, topology.slots_on(r));
  }
  if (options.max_incoming_per_rank != 0 && options.max_incoming_per_rank < most_slots) {
    return reject(
        "max_incoming_per_rank", options.max_incoming_per_rank,
        absl::StrCat("0 (no limit) or at least ", most_slots, ", the slots of the largest rank"));
  }
  if (options.copy_burst != 0.0 && !(options.copy_burst >= topology.num_slots())) {
    return reject(
        "copy_burst", options.copy_burst,
        absl::StrCat("0 (no budget) or at least ", topology.num_slots(), ", the slots of a layer"));
  }
  return absl::OkStatus();
}

}  // namespace

const char* NameOf(Decision decision) {
  switch (decision) {
    case Decision::kNone:
      return "none";
    case Decision::kPlanned:
      return "planned";
    case Decision::kWindowNotFull:
      return "window_not_full";
    case Decision::kTooSoon:
      return "too_soon";
    case Decision::kInFlight:
      return "in_flight";
    case Decision::kNothingToGain:
      return "nothing_to_gain";
    case Decision::kPolicyStays:
      return "policy_stays";
    case Decision::kOverBudget:
      return "over_budget";
    case Decision::kPlannerFailed:
      return "planner_failed";
  }
  return "unknown";
}

absl::StatusOr<std::unique_ptr<Controller>> Controller::Create(ControllerOptions options,
                                                               Placement initial) {
  BALLAST_ASSIGN_OR_RETURN(std::unique_ptr<Policy> policy, MakePolicy(options.policy));
  return CreateWith(std::move(policy), std::move(options), std::move(initial));
}

absl::StatusOr<std::unique_ptr<Controller>> Controller::CreateWith(std::unique_ptr<Policy> policy,
                                                                   ControllerOptions options,
                                                                   Placement initial) {
  BALLAST_RETURN_IF_ERROR(CheckOptions(options, initial.topology()));
  BALLAST_RETURN_IF_ERROR(policy->CheckSupport(initial));
  BALLAST_RETURN_IF_ERROR(CheckRules(options.policy, policy->rules_kept(), options.rules,
                                     initial.topology(), initial.num_experts()));
  return std::unique_ptr<Controller>(
      new Controller(std::move(options), std::move(initial), std::move(policy)));
}

Controller::Controller(ControllerOptions options, Placement initial, std::unique_ptr<Policy> policy)
    : options_(std::move(options)),
      separate_kinds_(options_.separate_kinds && !options_.in_step),
      placement_(std::move(initial)),
      policy_(std::move(policy)),
      window_sums_(static_cast<size_t>(placement_.num_layers()) * placement_.num_experts(), 0),
      joint_(separate_kinds_ ? 0 : window_sums_.size(), 0),
      credit_(options_.copy_burst),
      last_plan_id_(options_.last_plan_id) {
  for (Batch& batch : batches_) batch.counts.resize(window_sums_.size(), 0);
  const PolicyContext context{.initial = placement_,
                              .num_groups = options_.num_groups,
                              .rho = options_.rho,
                              .in_step = options_.in_step,
                              .rules = options_.rules};
  for (int32_t layer = 0; layer < placement_.num_layers(); ++layer) {
    planners_.push_back(policy_->MakeLayerPlanner(context, layer));
  }
}

std::span<const int64_t> Controller::window_load(int32_t layer) const {
  const size_t num_experts = placement_.num_experts();
  return std::span(window_sums_).subspan(layer * num_experts, num_experts);
}

int64_t Controller::window_tokens() const {
  int64_t sum = 0;
  for (const Window& window : windows_) sum += window.num_tokens;
  return sum;
}

void Controller::OnStep(int64_t, const StepCounts& counts) {
  StepCounts step = counts;
  int64_t step_tokens = 0;
  for (TokenKind kind : kTokenKinds) {
    BALLAST_CHECK(counts.num_tokens[kind] >= 0 &&
                  (counts.counts[kind].empty()
                       ? counts.num_tokens[kind] == 0
                       : counts.counts[kind].size() == window_sums_.size()));
    step_tokens += counts.num_tokens[kind];
  }
  if (step_tokens == 0) return;
  if (!separate_kinds_) {
    std::fill(joint_.begin(), joint_.end(), 0);
    for (TokenKind kind : kTokenKinds) {
      for (size_t i = 0; i < counts.counts[kind].size(); ++i) joint_[i] += counts.counts[kind][i];
    }
    step = StepCounts::Of(TokenKind::kPrefill, step_tokens, joint_);
  }
  for (TokenKind kind : kTokenKinds) {
    const int64_t num_tokens = step.num_tokens[kind];
    if (num_tokens == 0) continue;
    AddToBatch(kind, num_tokens, step.counts[kind], step_tokens);
    AddToWindow(kind, num_tokens, step.counts[kind]);
  }
  ++window_steps_;
}

void Controller::AddToWindow(TokenKind kind, int64_t num_tokens, std::span<const int32_t> counts) {
  const bool whole_interval = policy_->interval_steps() > 0;
  const int64_t most_tokens = whole_interval ? kMostWindowTokens : options_.window_tokens;
  const int64_t chunk_tokens = most_tokens / kChunksPerWindow;
  Window& window = windows_[kind];
  if (window.chunks.empty() || window.chunks.back().num_tokens >= chunk_tokens) {
    spare_.num_tokens = 0;
    spare_.counts.assign(window_sums_.size(), 0);
    window.chunks.push_back(std::exchange(spare_, {}));
  }
  Chunk& last = window.chunks.back();
  last.num_tokens += num_tokens;
  window.num_tokens += num_tokens;
  for (size_t i = 0; i < window_sums_.size(); ++i) {
    last.counts[i] += counts[i];
    window_sums_[i] += counts[i];
  }
  while (window.num_tokens - window.chunks.front().num_tokens >= most_tokens) {
    spare_ = std::move(window.chunks.front());
    window.chunks.pop_front();
    window.num_tokens -= spare_.num_tokens;
    for (size_t i = 0; i < window_sums_.size(); ++i) window_sums_[i] -= spare_.counts[i];
  }
}

// Hands whole batches to the planners: single steps of a few tokens would be noise to them.
void Controller::AddToBatch(TokenKind kind, int64_t num_tokens, std::span<const int32_t> counts,
                            int64_t step_tokens) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Batch& batch = batches_[kind];
  for (size_t i = 0; i < batch.counts.size(); ++i) {
    batch.counts[i] = static_cast<int32_t>(std::min(kMost, int64_t{batch.counts[i]} + counts[i]));
  }
  batch.num_tokens += num_tokens;
  if (batch.num_tokens >= options_.batch_tokens) HandOverBatch(kind, step_tokens);
}

void Controller::HandOverBatch(TokenKind kind, int64_t step_tokens) {
  const size_t num_experts = placement_.num_experts();
  Batch& batch = batches_[kind];
  const auto weight = static_cast<float>(
      std::min(1.0, static_cast<double>(batch.num_tokens) /
                        static_cast<double>(std::max(options_.batch_tokens, step_tokens))));
  for (size_t layer = 0; layer < planners_.size(); ++layer) {
    const auto of_layer =
        std::span<const int32_t>(batch.counts).subspan(layer * num_experts, num_experts);
    const bool any = std::any_of(of_layer.begin(), of_layer.end(), [](int32_t n) { return n > 0; });
    if (any) planners_[layer]->OnBatch(of_layer, kind, weight);
  }
  std::fill(batch.counts.begin(), batch.counts.end(), 0);
  batch.num_tokens = 0;
  new_batch_ = true;
}

std::optional<MigrationPlan> Controller::Decide(int64_t step, bool force, Decision* why) {
  const int32_t interval = policy_->interval_steps();
  const bool over = interval > 0 && window_steps_ >= interval && step >= not_before_by_abort_;
  const bool periodic = options_.force_every_steps > 0 && step >= not_before_by_abort_ &&
                        step - last_start_ >= options_.force_every_steps;
  const bool forced = force || periodic || over;
  *why = Decision::kNone;
  if (in_flight()) {
    *why = Decision::kInFlight;
  } else if (!rest_.empty()) {
    // What the plan before left over waits for nothing.
  } else if (!forced && (interval > 0 || step < not_before_)) {
    *why = Decision::kTooSoon;
  } else if (!forced && policy_->meters_itself()
                 ? !new_batch_
                 : window_tokens() < (forced ? 1 : options_.window_tokens)) {
    *why = Decision::kWindowNotFull;
  }
  if (*why != Decision::kNone) return std::nullopt;

  for (TokenKind kind : kTokenKinds) {
    if (forced && batches_[kind].num_tokens > 0) HandOverBatch(kind, /*step_tokens=*/0);
  }
  bool policy_stays = false;
  planner_failure_ = absl::OkStatus();
  std::vector<Candidate> wanted = std::exchange(rest_, {});
  const bool follows = !wanted.empty();
  if (!follows) {
    new_batch_ = false;
    wanted = WantedRows(forced, &policy_stays);
  }
  if (!planner_failure_.ok()) {
    not_before_by_abort_ = step + options_.backoff_steps;
    not_before_ = std::max(not_before_by_abort_, step + options_.min_steps_between);
    *why = Decision::kPlannerFailed;
    return std::nullopt;
  }
  if (wanted.empty()) {
    if (over) ForgetWindows();
    *why = policy_stays ? Decision::kPolicyStays : Decision::kNothingToGain;
    return std::nullopt;
  }
  std::vector<Placement::LayerRow> rows = WithinLimits(std::move(wanted));
  if (rows.empty()) {  // the first row fits under max_incoming_per_rank, so it was the budget
    *why = Decision::kOverBudget;
    return std::nullopt;
  }
  if (over && !follows) ForgetWindows();
  *why = Decision::kPlanned;
  return Start(std::move(rows), step);
}

// Takes the way to `rows`.
MigrationPlan Controller::Start(std::vector<Placement::LayerRow> rows, int64_t step) {
  absl::StatusOr<MigrationPlan> plan =
      MakeMigrationPlan(placement_, std::move(rows), last_plan_id_ + 1, source_);
  BALLAST_CHECK(plan.ok());  // a policy's rows are valid
  absl::StatusOr<Placement> target = plan->Apply(placement_);
  BALLAST_CHECK(target.ok());
  last_plan_id_ = plan->plan_id;
  last_start_ = step;
  target_ = *std::move(target);
  return *std::move(plan);
}

std::optional<MigrationPlan> Controller::Vacate(int64_t step, int32_t rank) {
  BALLAST_CHECK(!in_flight());
  rest_.clear();  // its rows would bring back what is to go
  const Topology& topology = placement_.topology();
  std::vector<GroupMember> others;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    if (r != rank) others.push_back({.old_rank = r});
  }
  const absl::StatusOr<Regrouped> without = Regroup(placement_, others, placement_.epoch() + 1);
  BALLAST_CHECK(without.ok());
  if (without->more_slots_per_rank > 0) return std::nullopt;
  std::vector<int32_t> incoming(others.size(), 0);
  std::vector<Placement::LayerRow> rows;
  for (size_t i = 0; i < without->reloads.size() && !IsFull(rows.size());) {
    const int32_t layer = without->reloads[i].layer;
    std::vector<int32_t> with_layer = incoming;
    for (; i < without->reloads.size() && without->reloads[i].layer == layer; ++i) {
      ++with_layer[without->reloads[i].rank];
    }
    const int32_t most = *std::max_element(with_layer.begin(), with_layer.end());
    if (options_.max_incoming_per_rank > 0 && most > options_.max_incoming_per_rank) break;
    incoming = with_layer;
    const auto now = placement_.expert_of_slot(layer);
    const auto then = without->placement.expert_of_slot(layer);
    Placement::LayerRow row{layer, {now.begin(), now.end()}};
    // The slots of the others are the same but for those of the rank between them.
    const int32_t begin = topology.slot_offsets[rank], end = topology.slot_offsets[rank + 1];
    std::copy(then.begin(), then.begin() + begin, row.expert_of_slot.begin());
    std::copy(then.begin() + begin, then.end(), row.expert_of_slot.begin() + end);
    rows.push_back(std::move(row));
  }
  if (rows.empty()) return std::nullopt;
  return Start(std::move(rows), step);
}

void Controller::ForgetWindows() {
  for (Window& window : windows_) window = {};
  window_steps_ = 0;
  std::fill(window_sums_.begin(), window_sums_.end(), 0);
}

// The rows that the policy wants and that gain enough (all that differ, when forced).
std::vector<Controller::Candidate> Controller::WantedRows(bool forced, bool* policy_stays) {
  const bool gated = !forced && !policy_->meters_itself();
  std::vector<Candidate> wanted;
  *policy_stays = true;
  for (int32_t layer = 0; layer < placement_.num_layers(); ++layer) {
    double now = 0.0;
    if (gated) {
      now = Imbalance(placement_.hosts(layer), window_load(layer));
      // No row can do better than 1, so most layers need no plan while the traffic is steady.
      if (now - 1.0 < options_.min_gain) {
        *policy_stays = false;
        continue;
      }
    }
    std::optional<std::vector<int32_t>> row =
        planners_[layer]->Plan({.window = window_load(layer), .forced = forced});
    if (!row.has_value()) continue;
    *policy_stays = false;
    planner_failure_ = CheckRow(layer, *row);
    if (!planner_failure_.ok()) return {};
    const std::span<const int32_t> held = placement_.expert_of_slot(layer);
    if (std::equal(held.begin(), held.end(), row->begin(), row->end())) continue;
    wanted.push_back({.row = {.layer = layer, .expert_of_slot = *std::move(row)}, .gain = now});
  }
  const bool limited = options_.max_incoming_per_rank > 0 || options_.copy_burst > 0.0 ||
                       options_.layers_per_plan > 0;
  if (wanted.empty() || (!gated && !limited)) return wanted;
  MeasureGains(&wanted);
  if (gated) {
    std::erase_if(wanted, [&](const Candidate& c) { return c.gain < options_.min_gain; });
  }
  return wanted;
}

// A policy is not trusted to plan what can be served.
absl::Status Controller::CheckRow(int32_t layer, std::span<const int32_t> row) const {
  const auto wrong = [&](const auto&... what) {
    return absl::InternalError(absl::StrCat("policy ", options_.policy, " planned for layer ",
                                            layer, what..., ": the plan is rejected"));
  };
  if (static_cast<int32_t>(row.size()) != placement_.topology().num_slots()) {
    return wrong(" a row of ", row.size(), " slots");
  }
  std::vector<bool> placed(static_cast<size_t>(placement_.num_experts()), false);
  for (const int32_t e : row) {
    if (e == kNoExpert) continue;
    if (e < 0 || e >= placement_.num_experts()) return wrong(" expert ", e);
    placed[static_cast<size_t>(e)] = true;
  }
  const auto missing = std::find(placed.begin(), placed.end(), false);
  if (missing != placed.end()) return wrong(" no copy of expert ", missing - placed.begin());
  return absl::OkStatus();
}

// By how much each row would lower the imbalance of its layer.
void Controller::MeasureGains(std::vector<Candidate>* wanted) const {
  std::vector<Placement::LayerRow> rows;
  for (const Candidate& candidate : *wanted) rows.push_back(candidate.row);
  const absl::StatusOr<Placement> after = placement_.With(rows, placement_.epoch() + 1);
  BALLAST_CHECK(after.ok());  // a policy's rows are valid
  for (Candidate& candidate : *wanted) {
    const int32_t layer = candidate.row.layer;
    candidate.gain = Imbalance(placement_.hosts(layer), window_load(layer)) -
                     Imbalance(after->hosts(layer), window_load(layer));
  }
}

void Controller::GrantCopies(double copies) {
  BALLAST_CHECK(copies >= 0.0);
  credit_ = std::min(credit_ + copies, options_.copy_burst);
}

bool Controller::IsFull(size_t num_layers) const {
  return options_.layers_per_plan > 0 &&
         num_layers == static_cast<size_t>(options_.layers_per_plan);
}

// The candidates with the largest gain whose copies fit under max_incoming_per_rank together, as
// far as credit lasts, which they take. Those over layers_per_plan become the rest.
std::vector<Placement::LayerRow> Controller::WithinLimits(std::vector<Candidate> candidates) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.gain > b.gain; });
  const Topology& topology = placement_.topology();
  std::vector<int32_t> incoming(topology.num_ranks(), 0);
  std::vector<Placement::LayerRow> rows;
  for (Candidate& candidate : candidates) {
    if (IsFull(rows.size())) {
      rest_.push_back(std::move(candidate));
      continue;
    }
    if (options_.max_incoming_per_rank > 0 || options_.copy_burst > 0.0) {
      const absl::StatusOr<MigrationPlan> alone =
          MakeMigrationPlan(placement_, {candidate.row}, /*plan_id=*/1);
      BALLAST_CHECK(alone.ok());
      std::vector<int32_t> with_it = incoming;
      for (const Move& move : alone->moves) ++with_it[topology.rank_of_slot(move.to_slot)];
      if (options_.max_incoming_per_rank > 0 &&
          *std::max_element(with_it.begin(), with_it.end()) > options_.max_incoming_per_rank) {
        continue;
      }
      const double copies = static_cast<double>(alone->moves.size());
      if (options_.copy_burst > 0.0) {
        if (copies > credit_) break;
        credit_ -= copies;
      }
      incoming = std::move(with_it);
    }
    rows.push_back(std::move(candidate.row));
  }
  return rows;
}

// Largest rank load over mean rank load when `load` is split exactly; 1 when there is no load.
double Controller::Imbalance(const LayerHosts& hosts, std::span<const int64_t> load) const {
  std::vector<int32_t> demand;
  ScaleDemand(load, &demand);
  int64_t kept = 0;
  for (int32_t copies : demand) kept += copies;
  if (kept == 0) return 1.0;
  Split split;
  ExactSplitter(hosts).Run(demand, &split);
  return static_cast<double>(split.largest_load) * hosts.num_ranks / static_cast<double>(kept);
}

void Controller::OnCommitted(int64_t plan_id, int64_t step) {
  BALLAST_CHECK(in_flight() && plan_id == last_plan_id_);
  const Placement before = std::exchange(placement_, *std::exchange(target_, std::nullopt));
  for (int32_t layer = 0; layer < placement_.num_layers(); ++layer) {
    const auto row = placement_.expert_of_slot(layer), old = before.expert_of_slot(layer);
    if (!std::equal(row.begin(), row.end(), old.begin())) planners_[layer]->Adopt(row);
  }
  source_ = CopySource::kRanks;
  not_before_ = step + options_.min_steps_between;
}

void Controller::OnAborted(int64_t plan_id, int64_t step) {
  BALLAST_CHECK(in_flight() && plan_id == last_plan_id_);
  target_.reset();
  rest_.clear();
  if (options_.retry_from_file) {
    source_ = source_ == CopySource::kRanks ? CopySource::kFile : CopySource::kRanks;
  }
  not_before_by_abort_ = step + options_.backoff_steps;
  not_before_ = std::max(not_before_by_abort_, step + options_.min_steps_between);
}

}  // namespace ballast
