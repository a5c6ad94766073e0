#include "runtime/leader.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr std::chrono::seconds kAnswerDeadline(10);
constexpr int32_t kMostAborts = 3;  // of plans for one departure; then it takes place as it is

template <typename T>
void AppendArray(std::string* text, const std::vector<T>& values) {
  absl::StrAppend(text, "[");
  for (size_t i = 0; i < values.size(); ++i) absl::StrAppend(text, i > 0 ? "," : "", values[i]);
  absl::StrAppend(text, "]");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Leader>> Leader::Create(
    const Options& options, const Placement& initial, RankObserver rank_observer,
    RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan) {
  std::unique_ptr<Leader> leader(
      new Leader(options, initial, std::move(rank_observer), metrics, std::move(send_plan)));
  leader->granted_ns_ = options.now_ns();
  BALLAST_RETURN_IF_ERROR(leader->MakeController(options.controller, initial, /*last_plan_id=*/0));
  if (!options.step_log.empty()) {
    leader->log_ = std::fopen(options.step_log.c_str(), "w");
    if (leader->log_ == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("--step-log: cannot write ", options.step_log, ": ", std::strerror(errno)));
    }
  }
  leader->PublishLastCopies(initial);
  leader->thread_ = std::thread(&Leader::Loop, leader.get());
  return leader;
}

Leader::Leader(const Options& options, const Placement& initial, RankObserver rank_observer,
               RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan)
    : options_(options),
      rank_observer_(std::move(rank_observer)),
      metrics_(metrics),
      send_plan_(std::move(send_plan)),
      num_job_ranks_(static_cast<size_t>(initial.topology().num_ranks())),
      counts_(static_cast<size_t>(kNumTokenKinds) * initial.num_layers() * initial.num_experts()),
      placement_(initial) {
  for (int32_t r = 0; r < initial.topology().num_ranks(); ++r) ranks_.push_back(r);
  ranks_in_force_ = ranks_;
}

absl::Status Leader::MakeController(ControllerOptions options, const Placement& placement,
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
  BALLAST_ASSIGN_OR_RETURN(controller_, Controller::Create(options, placement));
  return absl::OkStatus();
}

Leader::~Leader() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (log_ != nullptr) std::fclose(log_);
}

void Leader::Push(Event event) {
  {
    std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  wake_.notify_one();
}

void Leader::OnStep(const StepRecord& record) {
  rank_observer_.OnStep(record);
  Push(record);
}

void Leader::OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) {
  rank_observer_.OnPlanEnded(outcome, in_force);
  Push(PlanEnded{outcome, in_force});
}

void Leader::OnRegrouped(const Regrouping& regrouping, const Placement& in_force) {
  rank_observer_.OnRegrouped(regrouping, in_force);
  {
    // What was asked before is about ranks that are gone.
    std::lock_guard lock(mutex_);
    placement_ = in_force;
    ranks_ = regrouping.group.ranks;
  }
  metrics_->SetRanksServing(static_cast<int64_t>(regrouping.group.ranks.size()));
  Push(Regrouped{regrouping, in_force});
}

void Leader::Loop() {
  while (true) {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return stop_ || !events_.empty(); });
    if (events_.empty()) return;
    Event event = std::move(events_.front());
    events_.pop_front();
    // Planning can take longer than a step: the counts of waiting steps come first.
    may_plan_ = events_.empty();
    lock.unlock();
    std::visit([this](auto& e) { Handle(e); }, event);
    AdvanceVacating();
  }
}

void Leader::Handle(const StepRecord& record) {
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
  if (options_.recorder != nullptr) options_.recorder->AddStep(counts_);
  controller_->OnStep(record.step, counts);
  WriteStep(record);
  tokens_since_hot_ += record.all_tokens();
  if (tokens_since_hot_ >= options_.hot_experts_every_tokens) PublishHotExperts();
  Decision why = Decision::kNone;
  if (!may_plan_ || !vacating_.empty()) return;
  if (Plan(/*force=*/false, &why).has_value()) trigger_ = TriggerOf(/*force=*/false);
}

void Leader::Handle(const PlanEnded& ended) {
  const bool applied = ended.outcome.done == Command::kFlip;
  metrics_->OnRebalance(applied ? RebalanceResult::kApplied : RebalanceResult::kAborted, trigger_);
  LogInfo("leader",
          absl::StrCat("plan ", ended.outcome.plan_id, applied ? " in force" : " aborted",
                       ", epoch ", ended.in_force.epoch(), ", ", ended.outcome.copies,
                       " copies, flip held the step for ", ended.outcome.stall_ns / 1000, " us"));
  if (!controller_->in_flight()) return;
  if (applied) {
    controller_->OnCommitted(ended.outcome.plan_id, step_);
  } else {
    controller_->OnAborted(ended.outcome.plan_id, step_);
    if (!vacating_.empty()) ++vacating_.front().aborts;
  }
  PublishLastCopies(ended.in_force);
  {
    std::lock_guard lock(mutex_);
    if (ended.in_force.epoch() > placement_.epoch()) placement_ = ended.in_force;
  }
  // Also while nobody is served.
  Decision why = Decision::kNone;
  if (controller_->has_more() && vacating_.empty()) Plan(/*force=*/false, &why);
}

void Leader::PublishLastCopies(const Placement& placement) {
  const std::vector<int32_t> reloads = ReloadsIfLost(placement);
  std::vector<int64_t> by_job_rank(num_job_ranks_, 0);
  for (size_t r = 0; r < reloads.size(); ++r) by_job_rank[ranks_in_force_[r]] = reloads[r];
  metrics_->SetLastCopies(by_job_rank);
}

// A new controller, for the ranks that serve now. It begins with the load that the last one knew.
void Leader::Handle(const Regrouped& regrouped) {
  LogInfo("leader", absl::StrCat("generation ", regrouped.how.group.generation, ": ",
                                 regrouped.how.group.ranks.size(), " ranks, epoch ",
                                 regrouped.in_force.epoch(), ", ", regrouped.how.reloads,
                                 " experts read from the checkpoint, steps paused for ",
                                 regrouped.how.pause_ns / 1'000'000, " ms"));
  ranks_in_force_ = regrouped.how.group.ranks;
  PublishLastCopies(regrouped.in_force);
  if (options_.recorder != nullptr && options_.recorder->ids_recording() != 0) {
    LogWarning("leader", "the recording of ids ends: the ranks have changed");
    options_.recorder->Stop().IgnoreError();
  }
  const std::unique_ptr<Controller> before = std::move(controller_);
  const absl::Status made =
      MakeController(options_.controller, regrouped.in_force, before->last_plan_id());
  if (!made.ok()) {
    LogWarning("leader", absl::StrCat("no more plans: ", std::string(made.message())));
    ControllerOptions none = options_.controller;
    none.policy = "never";
    none.rules = {};
    BALLAST_CHECK(MakeController(none, regrouped.in_force, before->last_plan_id()).ok());
  }
  std::vector<int32_t> load;
  for (int32_t layer = 0; layer < regrouped.in_force.num_layers(); ++layer) {
    for (const int64_t n : before->window_load(layer)) load.push_back(static_cast<int32_t>(n));
  }
  controller_->OnStep(step_, StepCounts::Of(TokenKind::kDecode, before->window_tokens(), load));
}

RebalanceTrigger Leader::TriggerOf(bool force) const {
  if (force) return RebalanceTrigger::kManual;
  return options_.controller.force_every_steps > 0 ? RebalanceTrigger::kInterval
                                                   : RebalanceTrigger::kThreshold;
}

void Leader::Handle(Forced& forced) {
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
  forced.answer.set_value(answer.dump());
}

// Turns the time since the last decision into copies.
void Leader::GrantCopies() {
  if (options_.copy_bytes_per_second <= 0.0) return;
  const int64_t now = options_.now_ns();
  controller_->GrantCopies(static_cast<double>(now - granted_ns_) * 1e-9 *
                           options_.copy_bytes_per_second /
                           static_cast<double>(options_.copy_bytes));
  granted_ns_ = now;
}

std::optional<MigrationPlan> Leader::Plan(bool force, Decision* why) {
  GrantCopies();
  auto plan = controller_->Decide(step_, force, why);
  if (*why == Decision::kOverBudget) {
    metrics_->OnRebalance(RebalanceResult::kOverBudget, TriggerOf(force));
  }
  if (!plan.has_value()) return std::nullopt;
  if (!Send(*plan)) return std::nullopt;
  return plan;
}

bool Leader::Send(const MigrationPlan& plan) {
  LogInfo("leader", absl::StrCat("plan ", plan.plan_id, ": ", plan.moves.size(), " copies in ",
                                 plan.rows.size(), " layers"));
  const absl::Status sent = send_plan_(plan.Serialize());
  if (sent.ok()) return true;
  LogWarning("leader", std::string(sent.message()));
  controller_->OnAborted(plan.plan_id, step_);
  return false;
}

// The next plan of a rank's departure, or its end. What cannot be moved is read from the checkpoint
// when the others regroup.
void Leader::AdvanceVacating() {
  while (!vacating_.empty() && !controller_->in_flight()) {
    Vacating& next = vacating_.front();
    const auto at = std::find(ranks_in_force_.begin(), ranks_in_force_.end(), next.rank);
    const bool serves = at != ranks_in_force_.end() && ranks_in_force_.size() > 1;
    if (serves && next.aborts < kMostAborts) {
      const auto plan =
          controller_->Vacate(step_, static_cast<int32_t>(at - ranks_in_force_.begin()));
      if (plan.has_value()) {
        trigger_ = RebalanceTrigger::kManual;
        if (Send(*plan)) return;
        ++next.aborts;
        continue;
      }
    }
    const int32_t rank = next.rank;
    vacating_.pop_front();
    if (options_.leave) options_.leave(rank);
  }
}

void Leader::Vacate(int32_t rank) {
  Push(Vacating{.rank = rank});
}

void Leader::WriteStep(const StepRecord& record) {
  if (log_ == nullptr) return;
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
  std::fwrite(line.data(), 1, line.size(), log_);
  std::fflush(log_);
}

void Leader::PublishHotExperts() {
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
  metrics_->SetHotExperts(std::move(hot));
}

std::string Leader::PlacementJson() const {
  std::unique_lock lock(mutex_);
  const Placement placement = placement_;
  const std::vector<int32_t> ranks = ranks_;
  lock.unlock();
  nlohmann::json json = nlohmann::json::parse(placement.ToJson());
  json["ranks"] = ranks;
  json["reloads_if_lost"] = ReloadsIfLost(placement);
  json["replicas"] = nlohmann::json::array();
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    nlohmann::json row = nlohmann::json::array();
    for (int32_t e = 0; e < placement.num_experts(); ++e)
      row.push_back(placement.num_replicas(layer, e));
    json["replicas"].push_back(std::move(row));
  }
  return json.dump();
}

std::string Leader::Rebalance() {
  Forced forced;
  auto answer = forced.answer.get_future();
  Push(std::move(forced));
  if (answer.wait_for(kAnswerDeadline) != std::future_status::ready) {
    return R"({"planned":false,"reason":"the controller did not answer in time"})";
  }
  return answer.get();
}

}  // namespace ballast
