// The ranks of a simulated server: the loop of Engine::Run, cut where it waits.
#include "tests/runtime/group_sim_state.h"

namespace ballast::testing {

void Simulation::Arrive(int32_t r, LeaderFrame frame) {
  Rank& rank = ranks_[r];
  if (rank.phase == Phase::kDead) return;
  const bool of_group = std::holds_alternative<HaltFrame>(frame.body) ||
                        std::holds_alternative<ResumeFrame>(frame.body);
  if (of_group) {
    rank.group_inbox.push_back(std::move(frame));
  } else if (rank.phase != Phase::kParked) {  // who waits to come back hears of nothing else
    rank.inbox.push_back(std::move(frame));
  }
  LookAround(r);
}

// A rank that waits sees sooner or later what has come.
void Simulation::LookAround(int32_t r) {
  const Rank& rank = ranks_[r];
  const auto later = [&](void (Simulation::*act)(int32_t)) {
    At(static_cast<int64_t>(random_.Below(50'000)), [this, r, turn = rank.turn, act] {
      if (ranks_[r].turn == turn) (this->*act)(r);
    });
  };
  const bool waits = rank.phase != Phase::kLoading && rank.phase != Phase::kDead;
  if (rank.phase == Phase::kSleeping) {
    if (!rank.inbox.empty() || !rank.group_inbox.empty()) later(&Simulation::Begin);
  } else if (waits && !rank.group_inbox.empty()) {
    later(&Simulation::Halt);
  }
}

void Simulation::Begin(int32_t r) {
  Rank& rank = ranks_[r];
  if (rank.phase == Phase::kDead) return;
  ++rank.turn;
  if (!rank.group_inbox.empty()) return Halt(r);
  while (!rank.inbox.empty()) {
    LeaderFrame frame = std::move(rank.inbox.front());
    rank.inbox.pop_front();
    rank.wake_seq = frame.wake_seq;
    if (const auto* submit = std::get_if<SubmitFrame>(&frame.body)) {
      rank.active[submit->request.id] = submit->request;
    } else if (const auto* plan_frame = std::get_if<PlanFrame>(&frame.body)) {
      auto plan = MigrationPlan::Deserialize(plan_frame->plan);
      Check(plan.status());
      rank.rebalancer->OnPlan(*std::move(plan));
    }
  }
  const StepHeader header = rank.protocol->Begin(
      {.num_tokens = static_cast<int32_t>(rank.active.size()), .wake_seq = rank.wake_seq});
  rank.phase = Phase::kOpening;
  Tell(r, /*body=*/false, {.header = header});
}

void Simulation::Tell(int32_t r, bool body, const Message& message) {
  Rank& rank = ranks_[r];
  const std::tuple what{rank.generation, rank.protocol->step(), body};
  for (const int32_t to : rank.ranks) {
    // A rank that dies may have told some and not others.
    At(to == r ? 0 : Delay(), [this, r, to, what, message] {
      if (ranks_[r].phase == Phase::kDead && random_.Below(2) == 0) return;
      if (IsCut(r, to)) return;
      Hear(to, r, what, message);
    });
  }
  At(kStepTimeout + static_cast<int64_t>(random_.Below(kMostLate)), [this, r, turn = rank.turn] {
    if (ranks_[r].turn == turn) Complain(r);
  });
  LookAround(r);
}

// It has waited for too long, and waits to be told to halt.
void Simulation::Complain(int32_t r) {
  Rank& rank = ranks_[r];
  const auto& heard =
      rank.heard[{rank.generation, rank.protocol->step(), rank.phase == Phase::kBody}];
  TroubleFrame trouble{.generation = rank.generation, .missing = {}};
  for (const int32_t other : rank.ranks) {
    if (!heard.contains(other)) trouble.missing.push_back(other);
  }
  ++outcome_.complaints;
  ++rank.turn;
  rank.phase = Phase::kHalted;
  ToLeader(r, {std::move(trouble)});
  LookAround(r);
}

void Simulation::Hear(int32_t r, int32_t from, std::tuple<int64_t, int64_t, bool> what,
                      Message message) {
  if (ranks_[r].phase == Phase::kDead) return;
  ranks_[r].heard[what][from] = message;
  TryGoOn(r);
}

// Goes on with the step if all have been heard.
void Simulation::TryGoOn(int32_t r) {
  Rank& rank = ranks_[r];
  if (rank.phase != Phase::kOpening && rank.phase != Phase::kBody) return;
  const std::tuple what{rank.generation, rank.protocol->step(), rank.phase == Phase::kBody};
  if (rank.heard[what].size() < rank.ranks.size()) return;
  ++rank.turn;
  const bool body = rank.phase == Phase::kBody;
  rank.phase = Phase::kLoading;  // at work: not interrupted
  // Now and then it takes long.
  const int64_t work =
      random_.Below(200) == 0 ? 30 * kMs : static_cast<int64_t>(random_.Below(20'000));
  At(work, [this, r, what, body] {
    Rank& self = ranks_[r];
    if (self.phase == Phase::kDead) return;
    const std::map<int32_t, Message> all = std::move(self.heard[what]);
    self.heard.erase(self.heard.begin(), self.heard.upper_bound(what));
    body ? RanBody(r, all) : Opened(r, all);
  });
}

void Simulation::Opened(int32_t r, const std::map<int32_t, Message>& all) {
  Rank& rank = ranks_[r];
  std::vector<StepHeader> headers;
  for (const auto& [from, message] : all) headers.push_back(message.header);
  auto opening = rank.protocol->Open(headers, now_);
  if (!opening.ok()) return Fail(std::string(opening.status().message()));
  rank.opening = *opening;
  if (opening->ended.has_value()) {
    const bool flipped = opening->ended->done == Command::kFlip;
    if (flipped) CheckCopies(rank);
    if (r == 0) {
      ++(flipped ? outcome_.flips : outcome_.aborts);
      const int64_t id = opening->ended->plan_id;
      if (controller_->in_flight() && controller_->last_plan_id() == id) {
        flipped ? controller_->OnCommitted(id, leader_step_)
                : controller_->OnAborted(id, leader_step_);
      }
    }
  }
  if (!rank.opening.run) return Rest(r);
  rank.phase = Phase::kBody;
  const Placement& placement = rank.rebalancer->placement();
  Tell(r, /*body=*/true, {.epoch = placement.epoch(), .fingerprint = placement.fingerprint()});
}

void Simulation::RanBody(int32_t r, const std::map<int32_t, Message>& all) {
  Rank& rank = ranks_[r];
  for (const auto& [from, message] : all) {
    const Placement& mine = rank.rebalancer->placement();
    if (message.epoch != mine.epoch() || message.fingerprint != mine.fingerprint()) {
      return Fail(absl::StrCat("rank ", r, " at epoch ", mine.epoch(), " runs a step with rank ",
                               from, " at epoch ", message.epoch));
    }
  }
  rank.rebalancer->Slice(SliceOf::kRest);
  EventsFrame events;
  for (auto it = rank.active.begin(); it != rank.active.end();) {
    GenerationRequest& request = it->second;
    const auto index = static_cast<int32_t>(request.generated.size());
    request.generated.push_back(TokenOf(request.id, index));
    const bool last = index + 1 == request.max_tokens;
    events.events.push_back({request.id, request.generated.back(),
                             last ? FinishReason::kLength : FinishReason::kNone, index});
    it = last ? rank.active.erase(it) : std::next(it);
  }
  if (!events.events.empty()) ToLeader(r, {events});
  if (r == 0) {
    ++outcome_.steps;
    PlanSome();
  }
  Begin(r);
}

void Simulation::Rest(int32_t r) {
  Rank& rank = ranks_[r];
  rank.rebalancer->Slice(SliceOf::kRest);
  const bool goes_on = rank.opening.busy || rank.rebalancer->busy() || !rank.opening.same_wake ||
                       !rank.inbox.empty() || !rank.group_inbox.empty();
  rank.phase = Phase::kSleeping;
  if (!goes_on) return LookAround(r);
  At(20'000, [this, r, turn = rank.turn] {
    if (ranks_[r].turn == turn) Begin(r);
  });
}

void Simulation::Halt(int32_t r) {
  Rank& rank = ranks_[r];
  ++rank.turn;
  if (rank.phase != Phase::kParked) rank.phase = Phase::kHalted;
  while (!rank.group_inbox.empty()) {
    const LeaderFrame frame = std::move(rank.group_inbox.front());
    rank.group_inbox.pop_front();
    if (const auto* halt = std::get_if<HaltFrame>(&frame.body)) {
      rank.phase = Phase::kHalted;
      Report(r, *halt);
      continue;
    }
    return Resume(r, std::get<ResumeFrame>(frame.body));
  }
}

void Simulation::Report(int32_t r, const HaltFrame& frame) {
  const Rank& rank = ranks_[r];
  ToLeader(r, {ReportTo(frame, rank.protocol->step(), *rank.rebalancer)});
}

void Simulation::Resume(int32_t r, const ResumeFrame& frame) {
  Rank& rank = ranks_[r];
  const Group group = GroupOf(frame, r);
  rank.generation = frame.generation;
  if (group.member < 0) {
    rank.phase = Phase::kParked;
    rank.active.clear();
    rank.inbox.clear();
    if (!rank.group_inbox.empty()) Halt(r);
    return;
  }
  const auto regrouped = Follow(frame, group, rank.rebalancer.get());
  if (!regrouped.ok()) return Fail(std::string(regrouped.status().message()));
  const int32_t mine = group.member;
  rank.store->member = mine;
  rank.member = mine;
  rank.ranks = group.ranks;
  const Placement& placement = regrouped->placement;
  std::set<std::pair<int32_t, int32_t>> has;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      if (!placement.Hosts(layer, e, mine)) continue;
      const bool reloads = std::ranges::count(regrouped->reloads, Reload{layer, e, mine}) > 0;
      if (!reloads && !rank.store->has.contains({layer, e})) {
        Fail(absl::StrCat("rank ", r, " was to have expert ", e, " of layer ", layer));
      }
      has.insert({layer, e});
    }
  }
  rank.store->has = has;
  rank.protocol = std::make_unique<StepProtocol>(mine, frame.step, rank.rebalancer.get());
  if (r == 0) {
    ++outcome_.regroupings;
    outcome_.reloads += static_cast<int64_t>(regrouped->reloads.size());
    ControllerOptions options{.policy = "eplb", .window_tokens = 8, .min_gain = 0.0};
    options.backoff_steps = 1;
    options.last_plan_id = controller_->last_plan_id();
    auto controller = Controller::Create(options, placement);
    if (!controller.ok()) {  // EPLB needs equal ranks
      options.policy = "never";
      controller = Controller::Create(options, placement);
    }
    controller_ = *std::move(controller);
  }
  rank.phase = Phase::kLoading;
  At(static_cast<int64_t>(random_.Below(5'000'000)), [this, r] { Begin(r); });
}

// Everything that the placement in force gives to this rank is here.
void Simulation::CheckCopies(const Rank& rank) {
  const Placement& placement = rank.rebalancer->placement();
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      if (placement.Hosts(layer, e, rank.member) != rank.store->has.contains({layer, e})) {
        Fail(absl::StrCat("rank ", rank.ranks[rank.member], " and the placement of epoch ",
                          placement.epoch(), " differ about expert ", e, " of layer ", layer));
      }
    }
  }
}

}  // namespace ballast::testing
