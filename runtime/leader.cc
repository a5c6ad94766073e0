#include "runtime/leader.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <future>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <variant>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"
#include "placement/regroup.h"

namespace ballast {
namespace {

constexpr std::chrono::seconds kAnswerDeadline(10);
constexpr std::chrono::milliseconds kGlance(20);  // of the watching thread
constexpr int32_t kMostReplaced = 3;              // workers; then there are no more plans
// Steps that may wait for the controller; more are left out of its statistics.
constexpr int32_t kMostWaitingSteps = 256;
constexpr int64_t kNsPerMs = 1'000'000;
constexpr int64_t kPublishEveryNs = 1'000 * kNsPerMs;

struct PlanEnded {
  Rebalancer::Outcome outcome;
  Placement in_force;
};
struct RanksChanged {
  Regrouping how;
  Placement in_force;
};
struct Forced {
  std::promise<std::string> answer;
};
struct Vacating {
  int32_t rank = 0;
};
using Event = std::variant<StepRecord, PlanEnded, RanksChanged, Forced, Vacating>;

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

// A loop with its thread and what waits for it. Held by the leader, and by the thread itself, which
// may outlive the leader if it never comes back.
class Leader::Worker : public std::enable_shared_from_this<Leader::Worker> {
 public:
  static absl::StatusOr<std::shared_ptr<Worker>> Start(const LeaderLoopOptions& options,
                                                       LeaderLoop::Start start, LeaderHost* host) {
    auto worker = std::make_shared<Worker>();
    worker->tether_ = std::make_shared<Tether>(host);
    worker->window_ = std::make_shared<LeaderLoop::Window>(start.window);
    BALLAST_ASSIGN_OR_RETURN(worker->loop_,
                             LeaderLoop::Create(options, std::move(start), worker->tether_));
    worker->thread_ = std::thread([worker] { worker->Loop(); });
    return worker;
  }

  void Push(Event event) {
    {
      const std::lock_guard lock(mutex_);
      if (std::holds_alternative<StepRecord>(event) && ++waiting_steps_ > kMostWaitingSteps) {
        --waiting_steps_;
        return;
      }
      events_.push_back(std::move(event));
    }
    wake_.notify_one();
  }

  // Ends when nothing waits any more. REQUIRES not given up
  void Finish() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  // Reaches nobody from then on. What waited for it; nothing where it cannot be given up just now.
  std::optional<std::deque<Event>> GiveUp() {
    if (!tether_->TryCut()) return std::nullopt;
    const std::lock_guard lock(mutex_);
    stop_ = true;
    thread_.detach();
    return std::exchange(events_, {});
  }

  // How long it has been at one thing; 0: it waits.
  int64_t busy_ns() const {
    const int64_t since = busy_since_ns_;
    return since == 0 ? 0 : NowNs() - since;
  }

  std::shared_ptr<const LeaderLoop::Window> window() const {
    const std::lock_guard lock(mutex_);
    return window_;
  }

 private:
  void Loop() {
    int64_t published_ns = 0;
    loop_->Begin();
    while (true) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !events_.empty(); });
      if (events_.empty()) return;
      Event event = std::move(events_.front());
      events_.pop_front();
      waiting_steps_ -= std::holds_alternative<StepRecord>(event);
      // Planning can take longer than a step: the counts of waiting steps come first.
      may_plan_ = events_.empty();
      const bool last = stop_ && events_.empty();
      lock.unlock();
      const int64_t began = NowNs();
      busy_since_ns_ = began;
      std::visit([this](auto& e) { Handle(e); }, event);
      loop_->AdvanceVacating();
      if (last || began - published_ns >= kPublishEveryNs) {
        published_ns = began;
        auto window = std::make_shared<const LeaderLoop::Window>(loop_->window());
        lock.lock();
        window_ = std::move(window);
        lock.unlock();
      }
      busy_since_ns_ = 0;
    }
  }
  void Handle(const StepRecord& record) { loop_->OnStep(record, may_plan_); }
  void Handle(const PlanEnded& ended) { loop_->OnPlanEnded(ended.outcome, ended.in_force); }
  void Handle(const RanksChanged& e) { loop_->OnRegrouped(e.how, e.in_force); }
  void Handle(Forced& forced) { forced.answer.set_value(loop_->Rebalance()); }
  void Handle(const Vacating& vacating) { loop_->Vacate(vacating.rank); }

  std::shared_ptr<Tether> tether_;
  std::unique_ptr<LeaderLoop> loop_;  // the thread's
  bool may_plan_ = true;              // the thread's
  std::atomic<int64_t> busy_since_ns_ = 0;
  mutable std::mutex mutex_;
  // State below is protected by mutex_.
  std::condition_variable wake_;
  std::deque<Event> events_;
  int32_t waiting_steps_ = 0;  // among them
  bool stop_ = false;
  std::shared_ptr<const LeaderLoop::Window> window_;  // as it was a moment ago
  std::thread thread_;
};

absl::StatusOr<std::unique_ptr<Leader>> Leader::Create(
    const Options& options, const Placement& initial, RankObserver rank_observer,
    RankMetrics* metrics, std::function<absl::Status(std::vector<std::byte>)> send_plan) {
  std::unique_ptr<Leader> leader(
      new Leader(options, initial, std::move(rank_observer), metrics, std::move(send_plan)));
  BALLAST_RETURN_IF_ERROR(leader->OpenStepLog());
  BALLAST_ASSIGN_OR_RETURN(
      leader->worker_,
      Worker::Start(leader->options_.loop,
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
           .leave = options.leave};
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
  if (worker_ != nullptr) {
    // One that works on something for so long may do so for ever.
    const bool stalls = options_.stall_deadline_ms > 0 &&
                        worker_->busy_ns() > options_.stall_deadline_ms * kNsPerMs;
    if (!stalls || !worker_->GiveUp().has_value()) worker_->Finish();
  }
  keeper_.reset();  // after the last window
  if (log_ != nullptr) std::fclose(log_);
}

// Under the mutex, so that nothing goes to a worker that is just being given up.
template <typename T>
void Leader::Push(T event) {
  const std::lock_guard lock(mutex_);
  worker_->Push(std::move(event));
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
  }
  absl::Status sent = send_plan_(plan.Serialize());
  if (sent.ok()) return sent;
  const std::lock_guard lock(mutex_);
  plan_under_way_ = 0;
  return sent;
}

void Leader::OnStep(const StepRecord& record) {
  rank_observer_.OnStep(record);
  Push(record);
}

void Leader::OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) {
  rank_observer_.OnPlanEnded(outcome, in_force);
  {
    const std::lock_guard lock(mutex_);
    placement_ = in_force;
  }
  Push(PlanEnded{outcome, in_force});
}

void Leader::OnRegrouped(const Regrouping& regrouping, const Placement& in_force) {
  rank_observer_.OnRegrouped(regrouping, in_force);
  {
    const std::lock_guard lock(mutex_);
    placement_ = in_force;
    ranks_ = regrouping.group.ranks;
  }
  metrics_->SetRanksServing(static_cast<int64_t>(regrouping.group.ranks.size()));
  Push(RanksChanged{regrouping, in_force});
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
  std::optional<std::deque<Event>> waiting = worker_->GiveUp();
  if (!waiting.has_value()) return;  // in the middle of a call: at the next glance
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
  absl::StatusOr<std::shared_ptr<Worker>> next = Worker::Start(loop,
                                                               {.placement = placement_,
                                                                .ranks = ranks_,
                                                                .last_plan_id = last_plan_id_,
                                                                .window = *worker_->window()},
                                                               &host_);
  BALLAST_CHECK(next.ok());  // it was made of these options before
  worker_ = *std::move(next);
  for (Event& event : *waiting) worker_->Push(std::move(event));
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

void Leader::Vacate(int32_t rank) {
  Push(Vacating{.rank = rank});
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
  Forced forced;
  auto answer = forced.answer.get_future();
  Push(std::move(forced));
  if (answer.wait_for(kAnswerDeadline) != std::future_status::ready) {
    return R"({"planned":false,"reason":"the controller did not answer in time"})";
  }
  return answer.get();
}

}  // namespace ballast
