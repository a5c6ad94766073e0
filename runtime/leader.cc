#include "runtime/leader.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <variant>

#include "base/log.h"
#include "base/status.h"
#include "placement/regroup.h"

namespace ballast {
namespace {

constexpr std::chrono::seconds kAnswerDeadline(10);
constexpr std::chrono::milliseconds kGlance(20);  // of the watching thread
constexpr int32_t kMostReplaced = 3;              // workers; then there are no more plans
constexpr int64_t kNsPerMs = 1'000'000;

// For each rank the [layer, expert] pairs that it alone holds.
nlohmann::json OnlyOn(const Placement& placement) {
  std::vector<nlohmann::json> by_rank(static_cast<size_t>(placement.topology().num_ranks()),
                                      nlohmann::json::array());
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    const LayerHosts& hosts = placement.hosts(layer);
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      const int32_t first = hosts.host_offsets[e];
      if (hosts.host_offsets[e + 1] - first > 1) continue;
      by_rank[static_cast<size_t>(hosts.host_rank[first])].push_back({layer, e});
    }
  }
  return by_rank;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Leader>> Leader::Create(
    const Options& options, const Placement& initial, RankObserver rank_observer,
    RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan) {
  std::unique_ptr<Leader> leader(
      new Leader(options, initial, std::move(rank_observer), metrics, std::move(send_plan)));
  BALLAST_RETURN_IF_ERROR(leader->OpenStepLog());
  BALLAST_ASSIGN_OR_RETURN(
      leader->worker_,
      LeaderWorker::Start(leader->options_.loop,
                          {.placement = initial, .ranks = leader->ranks_, .window = options.window},
                          &leader->host_));
  leader->watch_ = std::thread(&Leader::Watch, leader.get());
  if (!options.state_file.empty()) {
    leader->keeper_ = std::make_unique<StateKeeper>(StateKeeper::Options{
        .path = options.state_file,
        .period_ms = options.state_period_ms,
        .state = [l = leader.get()] { return l->CurrentState(); },
        .on_written = [metrics](const absl::Status& s) { metrics->OnStateWritten(s.ok()); }});
  }
  return leader;
}

Leader::Leader(const Options& options, const Placement& initial, RankObserver rank_observer,
               RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan)
    : options_(options),
      rank_observer_(std::move(rank_observer)),
      metrics_(metrics),
      send_plan_(std::move(send_plan)),
      placement_(initial) {
  options_.loop.num_job_ranks = initial.topology().num_ranks();
  for (int32_t r = 0; r < initial.topology().num_ranks(); ++r) ranks_.push_back(r);
  metrics_->SetPlacementEpoch(initial.epoch());
  host_ = {.metrics = metrics,
           .recorder = options.recorder,
           .log_step = {},
           .send = [this](const MigrationPlan& plan) { return SendPlan(plan); },
           .on_settled =
               [this] {
                 const std::lock_guard lock(mutex_);
                 plan_under_way_ = 0;
               },
           .leave = [this](int32_t rank) { EndDeparture(rank, options_.leave); },
           .stay = [this](int32_t rank) { EndDeparture(rank, options_.stay); }};
}

absl::Status Leader::OpenStepLog() {
  if (options_.step_log.empty()) return absl::OkStatus();
  log_ = std::fopen(options_.step_log.c_str(), "w");
  if (log_ == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--step-log: cannot write ", options_.step_log, ": ", std::strerror(errno)));
  }
  host_.log_step = [this](const std::string& line) {
    std::fwrite(line.data(), 1, line.size(), log_);
    std::fflush(log_);
  };
  return absl::OkStatus();
}

Leader::~Leader() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (watch_.joinable()) watch_.join();
  // One that works on something for so long may do so for ever.
  if (worker_ != nullptr && !worker_->Finish(options_.stall_deadline_ms) &&
      !worker_->GiveUp().has_value()) {
    worker_->Finish(0);  // it is in the middle of a call to this leader, which it must not outlive
  }
  keeper_.reset();  // after the last window
  if (log_ != nullptr) std::fclose(log_);
}

absl::Status Leader::SendPlan(const MigrationPlan& plan) {
  {
    const std::lock_guard lock(mutex_);
    if (plan_under_way_ != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("plan ", plan_under_way_, " is still under way"));
    }
    last_plan_id_ = plan.plan_id;
    plan_under_way_ = plan.plan_id;
    plan_has_ended_ = false;
  }
  absl::Status sent = send_plan_(plan.Serialize());
  if (sent.ok()) return sent;
  const std::lock_guard lock(mutex_);
  plan_under_way_ = 0;
  return sent;
}

void Leader::OnStep(const StepRecord& record) {
  rank_observer_.OnStep(record);
  const std::lock_guard lock(mutex_);
  worker_->Push(record);
}

// What a worker is told and what the next one would begin with change together.
void Leader::OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) {
  rank_observer_.OnPlanEnded(outcome, in_force);
  const std::lock_guard lock(mutex_);
  placement_ = in_force;
  plan_has_ended_ = true;
  worker_->Push(LeaderWorker::PlanEnded{outcome, in_force});
}

void Leader::OnRegrouped(const Regrouping& regrouping, const Placement& in_force) {
  rank_observer_.OnRegrouped(regrouping, in_force);
  metrics_->SetRanksServing(static_cast<int64_t>(regrouping.group.ranks.size()));
  const std::lock_guard lock(mutex_);
  placement_ = in_force;
  ranks_ = regrouping.group.ranks;
  plan_has_ended_ = true;
  worker_->Push(LeaderWorker::RanksChanged{regrouping, in_force});
}

void Leader::Vacate(int32_t rank) {
  const std::lock_guard lock(mutex_);
  departures_.push_back(rank);
  worker_->Push(LeaderWorker::Vacating{.rank = rank});
}

void Leader::EndDeparture(int32_t rank, const std::function<void(int32_t)>& how) {
  {
    const std::lock_guard lock(mutex_);
    std::erase(departures_, rank);
  }
  if (how) how(rank);
}

void Leader::Watch() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, kGlance, [this] { return stop_; })) {
    if (options_.stall_deadline_ms == 0) continue;
    const int64_t busy_ms = worker_->busy_ns() / kNsPerMs;
    if (busy_ms > options_.stall_deadline_ms) ReplaceLocked(busy_ms);
  }
}

// The controller works on one thing for too long.
void Leader::ReplaceLocked(int64_t busy_ms) {
  std::optional<std::deque<LeaderWorker::Event>> waiting = worker_->GiveUp();
  if (!waiting.has_value()) {
    // It cannot be given up in the middle of a call, but it is reported.
    if (note_.empty()) LogError("leader", "the controller hangs in a call: in a write or a send");
    note_ = absl::StrCat("the controller has been in one call for ", busy_ms, " ms");
    return;
  }
  ++replaced_;
  metrics_->OnControllerStalled();
  LeaderLoopOptions loop = options_.loop;
  const bool last = replaced_ >= kMostReplaced;
  if (last) {
    loop.controller.policy = "never";
    loop.controller.rules = {};
    loop.controller.force_every_steps = 0;
    loop.make_controller = Controller::Create;
  }
  note_ = absl::StrCat(
      "the controller made no progress for ", busy_ms, " ms (lost ", replaced_,
      last ? " times): there are no more plans" : " times): another one has taken its place");
  LogError("leader", note_);
  // The old one may have been lost over the end of the plan.
  if (plan_has_ended_) plan_under_way_ = 0;
  worker_ = LeaderWorker::StartAnyhow(loop,
                                      {.placement = placement_,
                                       .ranks = ranks_,
                                       .last_plan_id = last_plan_id_,
                                       .departures = departures_,
                                       .window = *worker_->window()},
                                      &host_);
  for (LeaderWorker::Event& event : *waiting) {
    // The new one begins with what the others led to.
    if (std::holds_alternative<StepRecord>(event) ||
        std::holds_alternative<LeaderWorker::Forced>(event)) {
      worker_->Push(std::move(event));
    }
  }
}

std::string Leader::ControllerNote() const {
  const std::lock_guard lock(mutex_);
  return note_;
}

// Null where there is none to keep: what ranks that are left do among themselves does not fit the
// whole job.
std::shared_ptr<const ServerState> Leader::CurrentState() {
  const std::lock_guard lock(mutex_);
  const std::shared_ptr<const LeaderLoop::Window> window = worker_->window();
  if (static_cast<int32_t>(ranks_.size()) < options_.loop.num_job_ranks) return nullptr;
  if (state_ != nullptr && state_->placement.epoch() == placement_.epoch() &&
      state_->window_tokens == window->num_tokens && state_->window_load == window->load) {
    return state_;
  }
  state_ = std::make_shared<const ServerState>(ServerState{.model = options_.model,
                                                           .rules = options_.loop.controller.rules,
                                                           .placement = placement_,
                                                           .window_tokens = window->num_tokens,
                                                           .window_load = window->load});
  return state_;
}

std::string Leader::PlacementJson() const {
  std::unique_lock lock(mutex_);
  const Placement placement = placement_;
  const std::vector<int32_t> ranks = ranks_;
  lock.unlock();
  nlohmann::json json = nlohmann::json::parse(placement.ToJson());
  json["ranks"] = ranks;
  json["reloads_if_lost"] = ReloadsIfLost(placement);
  json["only_on"] = OnlyOn(placement);
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
  LeaderWorker::Forced forced;
  auto answer = forced.answer.get_future();
  {
    const std::lock_guard lock(mutex_);
    worker_->Push(std::move(forced));
  }
  if (answer.wait_for(kAnswerDeadline) != std::future_status::ready) {
    return R"({"planned":false,"reason":"the controller did not answer in time"})";
  }
  return answer.get();
}

}  // namespace ballast
