#include "runtime/leader_loop.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"
#include "placement/regroup.h"

namespace ballast {
namespace {

constexpr int32_t kMostAborts = 3;  // in a row, of plans for one departure; then it is called off

template <typename T>
void AppendArray(std::string* text, const std::vector<T>& values) {
  absl::StrAppend(text, "[");
  for (size_t i = 0; i < values.size(); ++i) absl::StrAppend(text, i > 0 ? "," : "", values[i]);
  absl::StrAppend(text, "]");
}

}  // namespace

LeaderLoop::LeaderLoop(const LeaderLoopOptions& options, Start start,
                       std::shared_ptr<Tether> tether)
    : options_(options),
      tether_(std::move(tether)),
      start_(std::move(start)),
      counts_(static_cast<size_t>(kNumTokenKinds) * start_.placement.num_layers() *
              start_.placement.num_experts()),
      ranks_(start_.ranks),
      granted_ns_(options.now_ns()) {
  for (const int32_t rank : start_.departures) Vacate(rank);
}

absl::Status LeaderLoop::Begin() {
  BALLAST_RETURN_IF_ERROR(
      MakeController(options_.controller, start_.placement, start_.last_plan_id));
  Feed(start_.window);
  PublishLastCopies(start_.placement);
  return absl::OkStatus();
}

void LeaderLoop::BeginAnyhow() {
  BeginAnew(start_.placement, start_.window, start_.last_plan_id);
  PublishLastCopies(start_.placement);
}

absl::Status LeaderLoop::MakeController(ControllerOptions options, const Placement& placement,
                                        int64_t last_plan_id) {
  options.last_plan_id = last_plan_id;
  if (options_.copy_bytes_per_second > 0.0) {
    options.copy_burst =
        std::max<double>(placement.topology().num_slots(),
                         options_.copy_bytes_per_second / static_cast<double>(options_.copy_bytes));
  }
  // No rank may get more in one plan than it can stage, whatever its slots are.
  const Topology& topology = placement.topology();
  for (int32_t r = 0; r < topology.num_ranks() && options.max_incoming_per_rank > 0; ++r) {
    options.max_incoming_per_rank = std::max(options.max_incoming_per_rank, topology.slots_on(r));
  }
  BALLAST_ASSIGN_OR_RETURN(controller_, options_.make_controller(options, placement));
  return absl::OkStatus();
}

LeaderLoop::Window LeaderLoop::window() const {
  Window window{.num_tokens = controller_->window_tokens(), .load = {}};
  for (int32_t layer = 0; layer < controller_->placement().num_layers(); ++layer) {
    const auto load = controller_->window_load(layer);
    window.load.insert(window.load.end(), load.begin(), load.end());
  }
  return window;
}

// The controller begins with the load that another one knew, as one step: where that is more than a
// step can count, all of it is divided alike.
void LeaderLoop::Feed(const Window& window) {
  if (window.num_tokens == 0 || window.load.size() * kNumTokenKinds != counts_.size()) return;
  const int64_t most = *std::ranges::max_element(window.load);
  const int64_t divisor = 1 + most / std::numeric_limits<int32_t>::max();
  std::vector<int32_t> load;
  for (const int64_t n : window.load) load.push_back(static_cast<int32_t>(n / divisor));
  const int64_t tokens = std::max<int64_t>(1, window.num_tokens / divisor);
  controller_->OnStep(step_, StepCounts::Of(TokenKind::kDecode, tokens, load));
}

void LeaderLoop::OnStep(const StepRecord& record, bool may_plan) {
  step_ = record.step;
  StepCounts counts{.num_tokens = record.num_tokens};
  auto to = counts_.begin();
  for (TokenKind kind : kTokenKinds) {
    const auto begin = to;
    for (const LayerCounts& layer : record.layers) {
      to = std::copy(layer.counts[kind].begin(), layer.counts[kind].end(), to);
    }
    counts.counts[kind] = {begin, to};
  }
  BALLAST_CHECK(to == counts_.end());
  tether_->Do([this](LeaderHost& host) {
    if (host.recorder != nullptr) host.recorder->AddStep(counts_);
  });
  controller_->OnStep(record.step, counts);
  WriteStep(record);
  tokens_since_hot_ += record.all_tokens();
  if (tokens_since_hot_ >= options_.hot_experts_every_tokens) PublishHotExperts();
  Decision why = Decision::kNone;
  if (!may_plan || !vacating_.empty()) return;
  if (Plan(/*force=*/false, &why).has_value()) trigger_ = TriggerOf(/*force=*/false);
}

void LeaderLoop::OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) {
  const bool applied = outcome.done == Command::kFlip;
  tether_->Do([&](LeaderHost& host) {
    host.metrics->OnRebalance(applied ? RebalanceResult::kApplied : RebalanceResult::kAborted,
                              trigger_);
  });
  LogInfo("leader",
          absl::StrCat("plan ", outcome.plan_id, applied ? " in force" : " aborted", ", epoch ",
                       in_force.epoch(), ", ", outcome.copies, " copies, flip held the step for ",
                       outcome.stall_ns / 1000, " us"));
  if (!controller_->in_flight()) {
    // A plan of a loop before this one.
    if (in_force.epoch() > controller_->placement().epoch()) {
      BeginAnew(in_force, window(), controller_->last_plan_id());
    }
  } else if (applied) {
    controller_->OnCommitted(outcome.plan_id, step_);
  } else {
    controller_->OnAborted(outcome.plan_id, step_);
  }
  if (!vacating_.empty() && vacating_.front().plan_id == outcome.plan_id) {
    Vacating& departs = vacating_.front();
    departs.aborts = applied ? 0 : departs.aborts + 1;
  }
  vacating_waits_ = false;
  PublishLastCopies(in_force);
  tether_->Do([](LeaderHost& host) { host.on_settled(); });
  // Also while nobody is served.
  Decision why = Decision::kNone;
  if (controller_->has_more() && vacating_.empty()) Plan(/*force=*/false, &why);
}

void LeaderLoop::OnRegrouped(const Regrouping& how, const Placement& in_force) {
  LogInfo("leader", absl::StrCat("generation ", how.group.generation, ": ", how.group.ranks.size(),
                                 " ranks, epoch ", in_force.epoch(), ", ", how.reloads,
                                 " experts read from the checkpoint, steps paused for ",
                                 how.pause_ns / 1'000'000, " ms"));
  ranks_ = how.group.ranks;
  vacating_waits_ = false;
  if (controller_->in_flight()) {
    const bool applied = how.committed_plan_id == controller_->last_plan_id();
    tether_->Do([applied](LeaderHost& host) {
      host.metrics->OnRebalance(applied ? RebalanceResult::kApplied : RebalanceResult::kAborted,
                                RebalanceTrigger::kFailure);
    });
  }
  PublishLastCopies(in_force);
  tether_->Do([](LeaderHost& host) {
    if (host.recorder == nullptr || host.recorder->ids_recording() == 0) return;
    LogWarning("leader", "the recording of ids ends: the ranks have changed");
    host.recorder->Stop().IgnoreError();
  });
  BeginAnew(in_force, window(), controller_->last_plan_id());
  tether_->Do([](LeaderHost& host) { host.on_settled(); });
}

// A new controller, where the old one's placement is not what it expects any more.
void LeaderLoop::BeginAnew(const Placement& placement, const Window& known, int64_t last_plan_id) {
  const absl::Status made = MakeController(options_.controller, placement, last_plan_id);
  if (!made.ok()) {
    LogWarning("leader", absl::StrCat("no more plans: ", std::string(made.message())));
    ControllerOptions none = options_.controller;
    none.policy = "never";
    none.rules = {};
    BALLAST_CHECK(MakeController(none, placement, last_plan_id).ok());
  }
  Feed(known);
}

void LeaderLoop::PublishLastCopies(const Placement& placement) {
  const std::vector<int32_t> reloads = ReloadsIfLost(placement);
  std::vector<int64_t> by_job_rank(static_cast<size_t>(options_.num_job_ranks), 0);
  for (size_t r = 0; r < reloads.size(); ++r) by_job_rank[ranks_[r]] = reloads[r];
  tether_->Do([&](LeaderHost& host) { host.metrics->SetLastCopies(by_job_rank); });
}

RebalanceTrigger LeaderLoop::TriggerOf(bool force) const {
  if (force) return RebalanceTrigger::kManual;
  return options_.controller.force_every_steps > 0 ? RebalanceTrigger::kInterval
                                                   : RebalanceTrigger::kThreshold;
}

std::string LeaderLoop::Rebalance() {
  Decision why = Decision::kInFlight;
  std::optional<MigrationPlan> plan;
  if (vacating_.empty()) plan = Plan(/*force=*/true, &why);
  nlohmann::json answer = {{"planned", plan.has_value()}};
  if (plan.has_value()) {
    trigger_ = TriggerOf(/*force=*/true);
    answer["plan_id"] = plan->plan_id;
    answer["copies"] = plan->moves.size();
  } else {
    answer["reason"] = NameOf(why);
  }
  return answer.dump();
}

// Turns the time since the last decision into copies.
void LeaderLoop::GrantCopies() {
  if (options_.copy_bytes_per_second <= 0.0) return;
  const int64_t now = options_.now_ns();
  controller_->GrantCopies(static_cast<double>(now - granted_ns_) * 1e-9 *
                           options_.copy_bytes_per_second /
                           static_cast<double>(options_.copy_bytes));
  granted_ns_ = now;
}

std::optional<MigrationPlan> LeaderLoop::Plan(bool force, Decision* why) {
  GrantCopies();
  auto plan = controller_->Decide(step_, force, why);
  const bool rejected = *why == Decision::kPlannerFailed;
  if (rejected) LogWarning("leader", std::string(controller_->planner_failure().message()));
  if (rejected || *why == Decision::kOverBudget) {
    tether_->Do([&](LeaderHost& host) {
      host.metrics->OnRebalance(
          rejected ? RebalanceResult::kRejected : RebalanceResult::kOverBudget, TriggerOf(force));
    });
  }
  if (plan.has_value() && !Send(*plan)) {
    *why = Decision::kInFlight;
    plan.reset();
  }
  return plan;
}

bool LeaderLoop::Send(const MigrationPlan& plan) {
  LogInfo("leader", absl::StrCat("plan ", plan.plan_id, ": ", plan.moves.size(), " copies in ",
                                 plan.rows.size(), " layers"));
  absl::Status sent;
  tether_->Do([&](LeaderHost& host) { sent = host.send(plan); });
  if (sent.ok()) return true;
  LogWarning("leader", std::string(sent.message()));
  controller_->OnAborted(plan.plan_id, step_);
  return false;
}

// The next plan of a rank's departure, or its end. What the others have no room for is read from
// the checkpoint when they regroup.
void LeaderLoop::AdvanceVacating() {
  while (!vacating_.empty() && !controller_->in_flight()) {
    Vacating& next = vacating_.front();
    const auto at = std::find(ranks_.begin(), ranks_.end(), next.rank);
    const bool serves = at != ranks_.end() && ranks_.size() > 1;
    if (serves && next.aborts == kMostAborts) {
      CallOff(next.rank);
      continue;
    }
    if (serves) {
      if (vacating_waits_) return;
      const auto plan = controller_->Vacate(step_, static_cast<int32_t>(at - ranks_.begin()));
      if (plan.has_value()) {
        trigger_ = RebalanceTrigger::kManual;
        next.plan_id = plan->plan_id;
        vacating_waits_ = !Send(*plan);
        return;
      }
    }
    const int32_t rank = next.rank;
    vacating_.pop_front();
    tether_->Do([rank](LeaderHost& host) {
      if (host.leave) host.leave(rank);
    });
  }
}

// Every departure of the rank, should it have been asked for more than once.
void LeaderLoop::CallOff(int32_t rank) {
  LogWarning("leader",
             absl::StrCat("rank ", rank, " stays: the plans for its departure were aborted ",
                          kMostAborts, " times in a row, and it holds last copies of experts"));
  std::erase_if(vacating_, [rank](const Vacating& v) { return v.rank == rank; });
  tether_->Do([rank](LeaderHost& host) {
    if (host.stay) host.stay(rank);
  });
}

void LeaderLoop::WriteStep(const StepRecord& record) {
  tether_->Do([&record](LeaderHost& host) {
    if (!host.log_step) return;
    std::string line =
        absl::StrCat("{\"step\":", record.step, ",\"unix_us\":", record.end_unix_us,
                     ",\"wall_us\":", record.wall_us, ",\"tokens\":", record.all_tokens(),
                     ",\"epoch\":", record.epoch, ",\"copies\":", record.copies_committed,
                     ",\"stall_us\":", record.stall_us, ",\"cpu_us\":");
    AppendArray(&line, record.cpu_us);
    absl::StrAppend(&line, ",\"load\":[");
    for (size_t layer = 0; layer < record.layers.size(); ++layer) {
      if (layer > 0) absl::StrAppend(&line, ",");
      AppendArray(&line, record.layers[layer].rank_load);
    }
    absl::StrAppend(&line, "]}\n");
    host.log_step(line);
  });
}

void LeaderLoop::PublishHotExperts() {
  tokens_since_hot_ = 0;
  if (options_.hot_experts == 0) return;
  std::vector<HotExpert> hot;
  const Placement& placement = controller_->placement();
  std::vector<int32_t> order(static_cast<size_t>(placement.num_experts()));
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const auto load = controller_->window_load(layer);
    const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
    if (total == 0) continue;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return load[a] > load[b]; });
    const size_t count = std::min(order.size(), static_cast<size_t>(options_.hot_experts));
    for (size_t i = 0; i < count; ++i) {
      hot.push_back(
          {layer, order[i], static_cast<double>(load[order[i]]) / static_cast<double>(total)});
    }
  }
  tether_->Do([&](LeaderHost& host) { host.metrics->SetHotExperts(std::move(hot)); });
}

}  // namespace ballast
