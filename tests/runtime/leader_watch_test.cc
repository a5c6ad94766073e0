// What happens when the controller itself fails: it makes no progress, or plans what cannot be.
#include <atomic>
#include <catch2/catch.hpp>
#include <latch>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "base/log.h"
#include "placement/policy.h"
#include "placement/regroup.h"
#include "runtime/leader.h"
#include "tests/support/test_metrics.h"

namespace ballast {
namespace {

constexpr int32_t kExperts = 8, kRanks = 4, kSlots = 3;

// What the planners of a test do, in all their lives.
struct Script {
  std::atomic<int> hangs = 0;        // so many plans still to hang in, until `release`
  std::atomic<int> batch_hangs = 0;  // the same of batches
  std::atomic<int> broken = 0;       // so many plans still to get wrong
  std::atomic<bool> release = false;
  std::atomic<int> hanging = 0;  // planners that hang now
};

// Puts expert 0 into the last slot, or does what the script says.
class ScriptedPlanner : public LayerPlanner {
 public:
  explicit ScriptedPlanner(std::shared_ptr<Script> script) : script_(std::move(script)) {}
  void OnBatch(std::span<const int32_t>, TokenKind, float) override {
    HangIn(&script_->batch_hangs);
  }
  void Adopt(std::span<const int32_t> row) override { row_ = {row.begin(), row.end()}; }
  std::optional<std::vector<int32_t>> Plan(const Input&) override {
    HangIn(&script_->hangs);
    std::vector<int32_t> row = row_;
    row.back() = row.back() == 0 ? 1 : 0;
    if (script_->broken > 0) {
      --script_->broken;
      row.assign(row.size(), 0);  // all other experts are gone
    }
    return row;
  }
  std::vector<int32_t> row_;

 private:
  void HangIn(std::atomic<int>* times) {
    if (*times == 0) return;
    --*times;
    ++script_->hanging;
    while (!script_->release) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    --script_->hanging;
  }
  std::shared_ptr<Script> script_;
};

class ScriptedPolicy : public Policy {
 public:
  explicit ScriptedPolicy(std::shared_ptr<Script> script) : script_(std::move(script)) {}
  std::unique_ptr<LayerPlanner> MakeLayerPlanner(const PolicyContext& context,
                                                 int32_t layer) const override {
    auto planner = std::make_unique<ScriptedPlanner>(script_);
    planner->Adopt(context.initial.expert_of_slot(layer));
    return planner;
  }

 private:
  std::shared_ptr<Script> script_;
};

class Watched {
  std::shared_ptr<Script> shared_ = std::make_shared<Script>();

 public:
  explicit Watched(Leader::Options options = {}) {
    auto metrics = testing::TestMetrics({.num_experts = kExperts, .num_ranks = kRanks});
    REQUIRE(metrics.ok());
    metrics_ = *std::move(metrics);
    options.loop.controller = {.policy = "scripted", .window_tokens = 100, .min_gain = 100.0};
    options.loop.make_controller = [shared = shared_](ControllerOptions o, Placement p) {
      return Controller::CreateWith(std::make_unique<ScriptedPolicy>(shared), o, p);
    };
    options.leave = [this](int32_t rank) { left = rank; };
    options.stay = [this](int32_t rank) { stays = rank; };
    options.stall_deadline_ms = 1000;  // far longer than anything but a hang takes
    auto leader =
        Leader::Create(options, placement, RankObserver(0, kRanks, 1, metrics_.get()),
                       metrics_.get(), [this](std::vector<std::byte> bytes) -> absl::Status {
                         const std::lock_guard lock(mutex_);
                         ++sends;
                         if (refuses) return absl::UnavailableError("refused");
                         plans_.push_back(*MigrationPlan::Deserialize(bytes));
                         return absl::OkStatus();
                       });
    REQUIRE(leader.ok());
    leader_ = *std::move(leader);
  }
  ~Watched() {
    script.release = true;
    leader_.reset();
    Await([this] { return script.hanging == 0; });
  }

  void Step() {
    StepRecord record;
    record.step = ++step_;
    record.num_tokens[TokenKind::kDecode] = 10;
    record.layers.resize(1);
    for (auto& counts : record.layers[0].counts) counts.assign(kExperts, 0);
    record.layers[0].counts[TokenKind::kDecode][0] = 10;
    record.layers[0].rank_load.assign(kRanks, 3);
    leader_->OnStep(record);
  }
  nlohmann::json Rebalance() { return nlohmann::json::parse(leader_->Rebalance()); }
  void EndLastPlan() {
    const MigrationPlan plan = plans().back();
    placement = *plan.Apply(placement);
    leader_->OnPlanEnded({.done = Command::kFlip, .plan_id = plan.plan_id}, placement);
  }
  void AbortLastPlan() { Abort(plans().back().plan_id); }
  void Abort(int64_t plan_id) {
    leader_->OnPlanEnded({.done = Command::kAbort, .plan_id = plan_id}, placement);
  }
  // The same ranks go on under an epoch of their own.
  void Regroup(int64_t committed_plan_id = 0) {
    Regrouping how;
    how.group = {.generation = 1, .member = 0, .ranks = {0, 1, 2, 3}};
    how.committed_plan_id = committed_plan_id;
    std::vector<GroupMember> members;
    for (int32_t r = 0; r < kRanks; ++r) members.push_back({.old_rank = r});
    placement = ballast::Regroup(placement, members, placement.epoch() + 1)->placement;
    leader_->OnRegrouped(how, placement);
  }
  std::vector<MigrationPlan> plans() {
    const std::lock_guard lock(mutex_);
    return plans_;
  }
  template <typename Fn>
  static bool Await(const Fn& fn) {
    for (int i = 0; i < 30'000 && !fn(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return fn();
  }
  bool Shows(const std::string& line) const {
    return metrics_->Render()->find("\n" + line + "\n") != std::string::npos;
  }
  Leader& leader() { return *leader_; }
  // Of the script: every controller that lives has some.
  long holders() const { return shared_.use_count(); }

  std::atomic<bool> refuses = false;  // plans cannot be sent
  std::atomic<int> sends = 0;         // tried

  // Threads that were given up may outlive the test: the script is theirs too.
  Script& script = *shared_;
  std::atomic<int> left = -1, stays = -1;  // ranks whose departure has come to its end
  Placement placement =
      *Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, kSlots), false);

 private:
  int64_t step_ = 0;
  std::mutex mutex_;
  std::vector<MigrationPlan> plans_;
  std::unique_ptr<RankMetrics> metrics_;
  std::unique_ptr<Leader> leader_;
};

// SOURCE vllm#57883: a balancer that stopped without a sign.
TEST_CASE("a controller that hangs is reported, and another takes its place", "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  CHECK(watched.leader().ControllerNote().empty());
  CHECK(watched.Shows("ballast_controller_stalls_total{rank=\"0\"} 0"));

  watched.script.hangs = 1;
  std::thread forces([&] { watched.leader().Rebalance(); });
  REQUIRE(watched.Await([&] { return !watched.leader().ControllerNote().empty(); }));
  CHECK(watched.script.hanging == 1);
  CHECK(watched.leader().ControllerNote().find("another one has taken its place") !=
        std::string::npos);
  CHECK(watched.Shows("ballast_controller_stalls_total{rank=\"0\"} 1"));

  // Steps cost nothing meanwhile, and the new one plans.
  for (int i = 0; i < 1000; ++i) watched.Step();
  CHECK(watched.Rebalance()["planned"] == true);
  REQUIRE(watched.plans().size() == 1);
  watched.EndLastPlan();

  // The old one comes back: it reaches nobody before it ends.
  const long holders = watched.holders();
  watched.script.release = true;
  REQUIRE(watched.Await([&] { return watched.holders() < holders; }));
  forces.join();
  CHECK(watched.plans().size() == 1);
  CHECK(watched.Rebalance()["planned"] == true);
  REQUIRE(watched.plans().size() == 2);
  CHECK(watched.plans()[1].plan_id > watched.plans()[0].plan_id);
  CHECK(watched.plans()[1].base_epoch == watched.plans()[0].base_epoch + 1);
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("a plan that a regrouping ends counts as what became of it", "[leader][watch]") {
  SetLogLevel(LogLevel::kWarning);
  Watched watched;
  const auto count = [](const char* result) {
    return absl::StrCat("ballast_rebalances_total{rank=\"0\",result=\"", result,
                        "\",trigger=\"failure\"} 1");
  };
  watched.Step();
  REQUIRE(watched.Rebalance()["planned"] == true);
  // The regrouping was begun twice before it came through: two epochs, and no plan in them.
  watched.placement =
      ballast::Regroup(watched.placement,
                       std::vector<GroupMember>{
                           {.old_rank = 0}, {.old_rank = 1}, {.old_rank = 2}, {.old_rank = 3}},
                       watched.placement.epoch() + 1)
          ->placement;
  watched.Regroup();
  REQUIRE(watched.Await([&] { return watched.Shows(count("aborted")); }));
  CHECK_FALSE(watched.Shows(count("applied")));

  watched.Step();
  REQUIRE(watched.Rebalance()["planned"] == true);
  const MigrationPlan plan = watched.plans().back();
  watched.placement = *plan.Apply(watched.placement);
  watched.Regroup(plan.plan_id);
  REQUIRE(watched.Await([&] { return watched.Shows(count("applied")); }));
  CHECK(watched.Shows(count("aborted")));
}

TEST_CASE("a new controller waits for the plan of the old one, and goes on from it",
          "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  REQUIRE(watched.Rebalance()["planned"] == true);
  REQUIRE(watched.plans().size() == 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));  // the load is known by then
  watched.script.batch_hangs = 1;
  watched.Step();
  REQUIRE(watched.Await([&] { return !watched.leader().ControllerNote().empty(); }));
  auto answer = watched.Rebalance();
  CHECK(answer["planned"] == false);
  CHECK(answer["reason"] == "in_flight");
  CHECK(watched.plans().size() == 1);

  watched.EndLastPlan();
  watched.Step();
  CHECK(watched.Rebalance()["planned"] == true);
  REQUIRE(watched.plans().size() == 2);
  CHECK(watched.plans()[1].base_epoch == 1);
  watched.EndLastPlan();  // Apply checks that it fits
  CHECK(watched.placement.epoch() == 2);
  watched.script.release = true;
  SetLogLevel(LogLevel::kInfo);
}

// What the next one begins with is what the last one hung in.
TEST_CASE("a controller that hangs in the load it is given anew is replaced as well",
          "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  REQUIRE(watched.Rebalance()["planned"] == true);
  watched.EndLastPlan();
  std::this_thread::sleep_for(std::chrono::milliseconds(1200));  // the load is known by then
  watched.script.batch_hangs = 2;
  watched.Step();
  REQUIRE(watched.Await(
      [&] { return watched.Shows("ballast_controller_stalls_total{rank=\"0\"} 2"); }));
  watched.Step();
  CHECK(watched.leader().PlacementJson().size() > 0);
  CHECK(watched.Rebalance()["planned"] == true);
  watched.script.release = true;
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("a departure under way outlives its controller", "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  watched.leader().Vacate(2);
  REQUIRE(watched.Await([&] { return !watched.plans().empty(); }));
  // Its plan is under way; the controller hangs, and the plan ends meanwhile.
  watched.script.batch_hangs = 1;
  watched.Step();
  REQUIRE(watched.Await([&] { return watched.script.hanging == 1; }));
  watched.EndLastPlan();
  REQUIRE(watched.Await([&] { return !watched.leader().ControllerNote().empty(); }));
  REQUIRE(watched.Await([&] {
    const MigrationPlan last = watched.plans().back();
    if (last.base_epoch == watched.placement.epoch()) watched.EndLastPlan();
    return watched.left == 2;
  }));
  watched.script.release = true;
  SetLogLevel(LogLevel::kInfo);
}

// Leaving would lose last copies if the checkpoint cannot be read.
TEST_CASE("a departure whose plans abort three times in a row is called off", "[leader]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  // A plan that was under way before is none of the departure's.
  REQUIRE(watched.Rebalance()["planned"] == true);
  watched.leader().Vacate(2);
  watched.AbortLastPlan();
  for (size_t aborts = 0; aborts < 3; ++aborts) {
    REQUIRE(watched.Await([&] { return watched.plans().size() == 2 + aborts; }));
    CHECK(watched.stays == -1);
    watched.AbortLastPlan();
  }
  REQUIRE(watched.Await([&] { return watched.stays == 2; }));
  CHECK(watched.left == -1);
  watched.Step();
  CHECK(watched.Rebalance()["planned"] == true);  // other plans go on
  REQUIRE(watched.plans().size() == 5);
  watched.AbortLastPlan();

  // The next drain starts anew, and takes place.
  watched.leader().Vacate(2);
  REQUIRE(watched.Await([&] { return watched.plans().size() == 6; }));
  watched.AbortLastPlan();
  REQUIRE(watched.Await([&] {
    const MigrationPlan last = watched.plans().back();
    if (last.base_epoch == watched.placement.epoch() && watched.plans().size() > 6) {
      watched.EndLastPlan();
    }
    return watched.left == 2;
  }));
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("a departure whose plan cannot be sent waits and is not aborted", "[leader]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.refuses = true;
  watched.Step();
  watched.leader().Vacate(2);
  REQUIRE(watched.Await([&] { return watched.sends == 1; }));
  for (int round = 2; round <= 6; ++round) {
    for (int i = 0; i < 10; ++i) watched.Step();
    watched.Regroup();
    REQUIRE(watched.Await([&] { return watched.sends == round; }));
  }
  watched.refuses = false;
  watched.Regroup();
  REQUIRE(watched.Await([&] { return !watched.plans().empty(); }));
  CHECK(watched.sends == 7);
  CHECK(watched.stays == -1);
  CHECK(watched.left == -1);
  watched.EndLastPlan();
  REQUIRE(watched.Await([&] {
    const MigrationPlan last = watched.plans().back();
    if (last.base_epoch == watched.placement.epoch()) watched.EndLastPlan();
    return watched.left == 2;
  }));
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("after three losses there are no more plans, and steps go on", "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.script.hangs = 3;
  std::vector<std::thread> forces;
  for (int i = 1; i <= 3; ++i) {
    watched.Step();
    forces.emplace_back([&] { watched.leader().Rebalance(); });
    REQUIRE(watched.Await([&] {
      return watched.Shows("ballast_controller_stalls_total{rank=\"0\"} " + std::to_string(i));
    }));
  }
  CHECK(watched.leader().ControllerNote().find("there are no more plans") != std::string::npos);
  watched.Step();
  const auto answer = watched.Rebalance();
  CHECK(answer["planned"] == false);
  CHECK(answer["reason"] == "policy_stays");
  CHECK(watched.plans().empty());
  watched.script.release = true;
  for (std::thread& thread : forces) thread.join();
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("a plan that cannot be served is rejected, counted, and nothing is sent",
          "[leader][watch]") {
  SetLogLevel(LogLevel::kOff);
  Watched watched;
  watched.Step();
  watched.script.broken = 1;
  const auto answer = watched.Rebalance();
  CHECK(answer["planned"] == false);
  CHECK(answer["reason"] == "planner_failed");
  CHECK(watched.plans().empty());
  CHECK(watched.Shows(
      "ballast_rebalances_total{rank=\"0\",result=\"rejected\",trigger=\"manual\"} 1"));
  // The next one is sound.
  CHECK(watched.Rebalance()["planned"] == true);
  CHECK(watched.plans().size() == 1);
  SetLogLevel(LogLevel::kInfo);
}

TEST_CASE("what is known of the load before the first step counts", "[leader]") {
  SetLogLevel(LogLevel::kWarning);
  {
    Watched fresh;
    CHECK(fresh.Rebalance()["reason"] == "window_not_full");
  }
  Leader::Options options;
  options.window = {.num_tokens = 50, .load = std::vector<int64_t>(kExperts, 6)};
  Watched resumed(options);
  CHECK(resumed.Rebalance()["planned"] == true);
}

}  // namespace
}  // namespace ballast
