#include "tests/runtime/group_sim.h"

#include "tests/runtime/group_sim_state.h"

namespace ballast::testing {

Simulation::Simulation(uint64_t seed) : random_(seed) {
  const int32_t n = 2 + static_cast<int32_t>(random_.Below(5));
  const int32_t experts = 2 + static_cast<int32_t>(random_.Below(9));
  const int32_t slots = (experts + n - 1) / n + static_cast<int32_t>(random_.Below(3));
  longest_delay_ = 1 + random_.Below(random_.Below(2) == 0 ? 100'000 : 5'000'000);
  with_plans_ = random_.Below(8) != 0;
  const auto placement =
      Placement::Contiguous(kLayers, experts, Topology::Uniform(n, slots), random_.Below(2) == 0);
  group_ = std::make_unique<GroupLeader>(
      GroupLeader::Options{.report_deadline_ns = 2'000 * kMs, .trouble_grace_ns = kTroubleGrace},
      std::vector<int32_t>(n, slots), std::vector<int32_t>(n, 0));
  book_ = std::make_unique<RequestBook>(n, 1000);
  ControllerOptions options{.policy = "eplb", .window_tokens = 8, .min_gain = 0.0};
  options.min_steps_between = 0;
  options.backoff_steps = 1;
  controller_ = *Controller::Create(options, *placement);
  last_to_rank_.assign(n, 0);
  last_to_leader_.assign(n, 0);
  ranks_.resize(n);
  const double damage = random_.Below(3) == 0 ? 0.3 : 0.0;
  for (int32_t r = 0; r < n; ++r) {
    Rank& rank = ranks_[r];
    rank.member = r;
    for (int32_t other = 0; other < n; ++other) rank.ranks.push_back(other);
    rank.store = std::make_unique<SimStore>(&random_, damage, 2 * slots);
    rank.store->member = r;
    rank.store->alive = [this, r](int32_t member) {
      return ranks_[ranks_[r].ranks[member]].phase != Phase::kDead;
    };
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t e = 0; e < experts; ++e) {
        if (placement->Hosts(layer, e, r)) rank.store->has.insert({layer, e});
      }
    }
    rank.rebalancer = std::make_unique<Rebalancer>(
        Rebalancer::Options{.rank = r, .plan_deadline_ms = 50}, rank.store.get(), *placement);
    rank.protocol = std::make_unique<StepProtocol>(r, 0, rank.rebalancer.get());
  }
}

SimOutcome Simulation::Run() {
  for (int32_t r = 0; r < static_cast<int32_t>(ranks_.size()); ++r) {
    At(Delay(), [this, r] {
      if (ranks_[r].turn == 0) Begin(r);
    });
  }
  ScheduleFaults();
  size_t handled = 0;
  while (outcome_.failure.empty() && !events_.empty()) {
    if (++handled > kMostEvents || now_ > kMostTime) break;
    Event event = events_.top();
    events_.pop();
    now_ = event.at;
    event.act();
    for (const RequestBook::Delivery& d : book_->TakeDeliveries()) d.sink->OnEvent(d.event);
    if (now_ > kFaultsEnd && book_->size() == 0 && !group_->halting()) break;
  }
  if (book_->size() > 0 || group_->halting()) {
    Fail(absl::StrCat("no progress: ", book_->size(), " requests without an end, ", events_.size(),
                      " events left; ", StatesText()));
  }
  for (size_t i = 0; i < sinks_.size(); ++i) {
    std::vector<int32_t> expected;
    for (int32_t k = 0; k < lengths_[i]; ++k) expected.push_back(TokenOf(i + 1, k));
    if (sinks_[i]->tokens != expected || sinks_[i]->ends != 1) {
      Fail(absl::StrCat("request ", i + 1, " got ", sinks_[i]->tokens.size(), " of ", lengths_[i],
                        " tokens, or wrong ones, and ", sinks_[i]->ends, " ends"));
    }
  }
  return outcome_;
}

std::string Simulation::StatesText() const {
  std::string text = absl::StrCat("generation ", group_->generation());
  for (const Rank& rank : ranks_) {
    absl::StrAppend(&text, "; phase ", static_cast<int>(rank.phase), " of generation ",
                    rank.generation, " step ", rank.protocol->step(), " epoch ",
                    rank.rebalancer->placement().epoch(), " wake ", rank.wake_seq, " active ",
                    rank.active.size(), " inbox ", rank.inbox.size(), "+", rank.group_inbox.size());
  }
  return text;
}

// ---- what happens to the server ---------------------------------------------------------------

void Simulation::ScheduleFaults() {
  const auto sometime = [this] { return static_cast<int64_t>(random_.Below(kFaultsEnd)); };
  const int32_t n = static_cast<int32_t>(ranks_.size());
  for (uint32_t i = 3 + random_.Below(12); i > 0; --i) At(sometime(), [this] { SubmitRequest(); });
  const auto other = [this, n] { return 1 + static_cast<int32_t>(random_.Below(n - 1)); };
  for (uint32_t i = random_.Below(4); i > 0; --i) {
    const int64_t when = sometime();
    const int32_t together = random_.Below(3) == 0 ? 2 : 1;
    for (int32_t k = 0; k < together; ++k) {
      const int32_t r = other();
      const bool silently = random_.Below(2) == 0;
      At(when + static_cast<int64_t>(random_.Below(3 * longest_delay_)),
         [this, r, silently] { Kill(r, silently); });
    }
  }
  if (random_.Below(4) == 0) {
    const int32_t one = other();
    cut_ = {one, (one + other()) % n};
    cut_at_ = sometime();
  }
  for (uint32_t i = random_.Below(4); i > 0; --i) {
    const int32_t r = other();
    const int64_t when = sometime();
    At(when, [this, r] {
      if (!group_->Leave(r, now_)) return;
      ++outcome_.leaves;
      book_->SetOpen(r, false);
      book_->Orphan(r);
      RegroupLeader();
    });
    At(when + sometime() / 4, [this, r] {
      if (!group_->Return(r, now_)) return;
      ++outcome_.returns;
      RegroupLeader();
    });
  }
}

void Simulation::SubmitRequest() {
  GenerationRequest request;
  request.prompt = {1, 2, 3};
  request.max_tokens = 1 + static_cast<int32_t>(random_.Below(30));
  sinks_.push_back(std::make_shared<Sink>());
  lengths_.push_back(request.max_tokens);
  RequestBook::Assignment given = book_->Add(request, sinks_.back(), kMostTime);
  Broadcast(given.rank, SubmitFrame{given.request});
}

void Simulation::Kill(int32_t r, bool silently) {
  if (ranks_[r].phase == Phase::kDead) return;
  ranks_[r].phase = Phase::kDead;
  ++ranks_[r].turn;
  ++outcome_.deaths;
  outcome_.stops += silently;
  if (silently) return;
  // The leader hears of it behind everything that the rank has said.
  last_to_leader_[r] = std::max(last_to_leader_[r], now_) + Delay();
  At(last_to_leader_[r] - now_, [this, r] {
    group_->OnLost(r, absl::UnavailableError("its channel is closed"), now_);
    RegroupLeader();
  });
}

// ---- the leader -------------------------------------------------------------------------------

void Simulation::ToRank(int32_t r, decltype(LeaderFrame::body) body, uint64_t wake_seq) {
  last_to_rank_[r] = std::max(last_to_rank_[r] + 1, now_ + Delay());
  At(last_to_rank_[r] - now_, [this, r, frame = LeaderFrame{wake_seq, std::move(body)}]() mutable {
    Arrive(r, std::move(frame));
  });
}

void Simulation::Broadcast(int32_t to, decltype(LeaderFrame::body) body) {
  ++wake_seq_;
  for (int32_t r = 0; r < static_cast<int32_t>(ranks_.size()); ++r) {
    if (group_->is_lost(r)) continue;
    if (to < 0 || r == to) {
      ToRank(r, body, wake_seq_);
    } else {
      ToRank(r, WakeFrame{}, wake_seq_);
    }
  }
}

void Simulation::ToLeader(int32_t r, RankFrame frame) {
  last_to_leader_[r] = std::max(last_to_leader_[r] + 1, now_ + Delay());
  At(last_to_leader_[r] - now_, [this, r, frame = std::move(frame)] { LeaderHears(r, frame); });
}

void Simulation::LeaderHears(int32_t r, const RankFrame& frame) {
  if (group_->is_lost(r)) return;
  if (const auto* events = std::get_if<EventsFrame>(&frame.body)) {
    for (const TokenEvent& event : events->events) book_->OnEvent(r, event);
  } else if (const auto* halted = std::get_if<HaltedFrame>(&frame.body)) {
    group_->OnHalted(r, *halted, now_);
    RegroupLeader();
  } else if (const auto* trouble = std::get_if<TroubleFrame>(&frame.body)) {
    group_->OnTrouble(r, *trouble, now_);
    RegroupLeader();
  }
}

// As the front end does it.
void Simulation::RegroupLeader() {
  for (const auto& [r, why] : group_->TakeLost()) {
    if (r == 0) return Fail("the leader gave itself up");
    if (ranks_[r].phase != Phase::kDead) {
      const int32_t other = r == cut_.first ? cut_.second : cut_.first;
      if (!IsCut(r, other) || group_->is_lost(other)) {
        Fail(absl::StrCat("rank ", r, " was given up alive: ", std::string(why.message()), "; ",
                          StatesText()));
      }
      ++outcome_.cuts;
      ranks_[r].phase = Phase::kDead;  // its channel is shut down
      ++ranks_[r].turn;
    }
    book_->SetOpen(r, false);
    book_->Orphan(r);
  }
  while (auto send = group_->Take()) {
    if (group_->is_lost(send->rank)) continue;
    if (const auto* resume = std::get_if<ResumeFrame>(&send->frame)) {
      outcome_.commits_by_regrouping += send->rank == 0 && resume->commit_plan_id != 0;
      ToRank(send->rank, *resume, wake_seq_);
    } else {
      ToRank(send->rank, std::get<HaltFrame>(send->frame), wake_seq_);
    }
  }
  if (const auto wake = group_->wake_ns()) {
    At(*wake - now_, [this] {
      group_->OnTick(now_);
      RegroupLeader();
    });
  }
  if (group_->halting()) return;
  for (const int32_t r : group_->members()) book_->SetOpen(r, true);
  for (RequestBook::Assignment& given : book_->AssignWaiting()) {
    ++outcome_.moved;
    Broadcast(given.rank, SubmitFrame{std::move(given.request)});
  }
}

// Rank 0 has run a step: its controller may want to move something.
void Simulation::PlanSome() {
  const Placement& placement = controller_->placement();
  std::vector<int32_t> counts;
  for (int32_t i = 0; i < kLayers * placement.num_experts(); ++i) {
    counts.push_back(static_cast<int32_t>(random_.Below(20)));
  }
  controller_->OnStep(++leader_step_, StepCounts::Of(TokenKind::kDecode, 8, counts));
  if (!with_plans_ || controller_->in_flight()) return;
  Decision why = Decision::kNone;
  const auto plan = controller_->Decide(leader_step_, random_.Below(2) == 0, &why);
  if (plan.has_value()) Broadcast(-1, PlanFrame{plan->Serialize()});
}

SimOutcome Simulate(uint64_t seed) {
  return Simulation(seed).Run();
}

}  // namespace ballast::testing
