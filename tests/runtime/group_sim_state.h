// What a simulated server is made of: group_sim.cc has the leader and what happens to the server,
// group_sim_rank.cc the ranks.
#ifndef BALLAST_TESTS_RUNTIME_GROUP_SIM_STATE_H_
#define BALLAST_TESTS_RUNTIME_GROUP_SIM_STATE_H_

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <queue>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "placement/controller.h"
#include "runtime/control_frames.h"
#include "runtime/group_leader.h"
#include "runtime/group_member.h"
#include "runtime/request_book.h"
#include "runtime/step_protocol.h"
#include "tests/runtime/group_sim.h"

namespace ballast::testing {

inline constexpr int32_t kLayers = 2;
inline constexpr int64_t kMs = 1'000'000;
inline constexpr int64_t kFaultsEnd = 400 * kMs, kMostTime = 60'000 * kMs;
// A rank that waits for longer complains: as soon as it looks at the time.
inline constexpr int64_t kStepTimeout = 150 * kMs, kMostLate = 20 * kMs;
// Delays of messages and of the look at the time make up for the difference of two complaints.
inline constexpr int64_t kTroubleGrace = 40 * kMs;
inline constexpr size_t kMostEvents = 400'000;

// What a request generates, as a function of the request alone.
inline int32_t TokenOf(uint64_t id, int32_t index) {
  return static_cast<int32_t>((id * 7919 + static_cast<uint64_t>(index) * 104'729) % 1000);
}

// A store that keeps names instead of parameters.
class SimStore : public CopyStore {
 public:
  SimStore(Random* random, double damage, int32_t staging)
      : random_(random), damage_(damage), staging_blocks_(staging) {}

  int32_t member = 0;
  std::function<bool(int32_t member)> alive;
  std::set<std::pair<int32_t, int32_t>> has;  // (layer, expert)

  absl::Status Stage(const MigrationPlan& plan, const Placement& current) override {
    std::map<int32_t, int32_t> incoming;
    for (const Move& move : plan.moves) {
      if (++incoming[current.topology().rank_of_slot(move.to_slot)] > staging_blocks_) {
        return absl::ResourceExhaustedError("staging");
      }
    }
    plan_ = plan;
    polls_left_ = static_cast<int32_t>(random_->Below(8));
    damaged_ = random_->Uniform() < damage_;
    for (const Move& move : plan.moves) {
      if (current.topology().rank_of_slot(move.to_slot) == member) staged_.push_back(move);
    }
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Poll(TransferBudget*) override {
    for (const Move& move : staged_) {
      if (move.from_rank != Move::kFromFile && !alive(move.from_rank))
        return false;  // it will never come
    }
    if (polls_left_-- > 0) return false;
    if (damaged_ && !staged_.empty()) return absl::DataLossError("damaged");
    return true;
  }
  void Commit(const Placement& target) override {
    for (const Move& move : staged_) has.insert({move.layer, move.expert});
    for (const Placement::LayerRow& row : plan_->rows) {
      std::erase_if(has, [&](const auto& copy) {
        return copy.first == row.layer && !target.Hosts(row.layer, copy.second, member);
      });
    }
    Abandon();
  }
  void Discard() override { Abandon(); }
  void Abandon() override {
    plan_.reset();
    staged_.clear();
  }
  bool staging() const override { return plan_.has_value(); }
  bool draining() const override { return false; }
  size_t block_bytes() const override { return 1; }

 private:
  Random* random_;
  double damage_;
  int32_t staging_blocks_;
  std::optional<MigrationPlan> plan_;
  std::vector<Move> staged_;
  int32_t polls_left_ = 0;
  bool damaged_ = false;
};

enum class Phase { kOpening, kBody, kSleeping, kHalted, kParked, kLoading, kDead };

// What members exchange: the header of a step, then under which placement they run it.
struct Message {
  StepHeader header = {};
  int64_t epoch = 0;
  uint64_t fingerprint = 0;
};

struct Rank {
  Phase phase = Phase::kSleeping;
  int64_t turn = 0;  // rises with everything it does: what was meant for an earlier turn is void
  int64_t generation = 0;
  int32_t member = 0;
  std::vector<int32_t> ranks;  // of the group
  std::deque<LeaderFrame> inbox, group_inbox;
  uint64_t wake_seq = 0;
  std::map<uint64_t, GenerationRequest> active;
  std::unique_ptr<SimStore> store;
  std::unique_ptr<Rebalancer> rebalancer;
  std::unique_ptr<StepProtocol> protocol;
  StepProtocol::Opening opening;
  // (generation, step, body?) -> by rank of the job
  std::map<std::tuple<int64_t, int64_t, bool>, std::map<int32_t, Message>> heard;
};

class Sink : public TokenSink {
 public:
  void OnEvent(const TokenEvent& event) override {
    if (event.token >= 0) tokens.push_back(event.token);
    ends += event.finish != FinishReason::kNone;
    finish = event.finish;
  }
  std::vector<int32_t> tokens;
  int ends = 0;
  FinishReason finish = FinishReason::kNone;
};

class Simulation {
 public:
  explicit Simulation(uint64_t seed);
  SimOutcome Run();

 private:
  struct Event {
    int64_t at;
    int64_t number;
    std::function<void()> act;
    bool operator<(const Event& other) const {
      return std::tie(at, number) > std::tie(other.at, other.number);
    }
  };
  void At(int64_t delay, std::function<void()> act) {
    events_.push({now_ + delay, ++num_events_, std::move(act)});
  }
  int64_t Delay() { return 1'000 + static_cast<int64_t>(random_.Below(longest_delay_)); }
  void Fail(const std::string& what) {
    if (outcome_.failure.empty()) outcome_.failure = absl::StrCat(what, " at ", now_ / 1000, " us");
  }
  void Check(const absl::Status& status) {
    if (!status.ok()) Fail(std::string(status.message()));
  }

  std::string StatesText() const;
  // The leader.
  void ScheduleFaults();
  void ToRank(int32_t r, decltype(LeaderFrame::body) body, uint64_t wake_seq);
  void Broadcast(int32_t r, decltype(LeaderFrame::body) body);
  void ToLeader(int32_t r, RankFrame frame);
  void LeaderHears(int32_t r, const RankFrame& frame);
  void SubmitRequest();
  void RegroupLeader();
  void PlanSome();
  // A rank.
  void Arrive(int32_t r, LeaderFrame frame);
  void LookAround(int32_t r);
  void Begin(int32_t r);  // a step, or what goes before one
  void Tell(int32_t r, bool body, const Message& message);
  void Hear(int32_t r, int32_t from, std::tuple<int64_t, int64_t, bool> what, Message message);
  void TryGoOn(int32_t r);
  void Complain(int32_t r);
  void Opened(int32_t r, const std::map<int32_t, Message>& all);
  void RanBody(int32_t r, const std::map<int32_t, Message>& all);
  void Rest(int32_t r);
  void Halt(int32_t r);
  void Report(int32_t r, const HaltFrame& frame);
  void Resume(int32_t r, const ResumeFrame& frame);
  void Kill(int32_t r, bool silently);
  bool IsCut(int32_t a, int32_t b) const {
    return now_ >= cut_at_ && std::minmax(a, b) == std::minmax(cut_.first, cut_.second);
  }
  void CheckCopies(const Rank& rank);

  Random random_;
  int64_t now_ = 0, num_events_ = 0;
  uint32_t longest_delay_;
  std::priority_queue<Event> events_;
  SimOutcome outcome_;

  std::vector<Rank> ranks_;
  std::vector<int64_t> last_to_rank_, last_to_leader_;  // arrivals: channels keep their order
  std::unique_ptr<GroupLeader> group_;
  std::unique_ptr<RequestBook> book_;
  std::unique_ptr<Controller> controller_;
  uint64_t wake_seq_ = 0;
  std::vector<std::shared_ptr<Sink>> sinks_;  // by request id - 1
  std::vector<int32_t> lengths_;
  int64_t leader_step_ = 0;
  bool with_plans_ = true;
  // Two ranks that do not hear each other from some moment on.
  std::pair<int32_t, int32_t> cut_ = {-1, -1};
  int64_t cut_at_ = 0;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_RUNTIME_GROUP_SIM_STATE_H_
