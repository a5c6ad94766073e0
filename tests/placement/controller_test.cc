#include "placement/controller.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "base/random.h"
#include "placement/regroup.h"

namespace ballast {
namespace {

constexpr int32_t kLayers = 2;
constexpr int32_t kExperts = 32;
constexpr int32_t kTopK = 4;
constexpr int32_t kTokens = 256;

// Multinomial traffic: expert popularity falls as 1 / (position + 1), positions turned by `shift`.
class Traffic {
 public:
  explicit Traffic(uint64_t seed) : random_(seed) {}

  std::vector<int32_t> Step(int32_t shift) {
    double total = 0.0;
    for (int32_t e = 0; e < kExperts; ++e) total += 1.0 / (e + 1);
    std::vector<int32_t> counts(kLayers * kExperts, 0);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t i = 0; i < kTokens * kTopK; ++i) {
        double at = random_.Uniform() * total;
        int32_t e = 0;
        while (e < kExperts - 1 && (at -= 1.0 / (e + 1)) >= 0.0) ++e;
        ++counts[layer * kExperts + (e * 5 + shift + layer) % kExperts];
      }
    }
    return counts;
  }

 private:
  Random random_;
};

Placement Ring(const Topology& topology) {
  auto placement = Placement::Contiguous(kLayers, kExperts, topology, /*fill_spare=*/true);
  REQUIRE(placement.ok());
  return *placement;
}

std::unique_ptr<Controller> Make(const ControllerOptions& options) {
  auto controller = Controller::Create(options, Ring(Topology::Uniform(8, 5, 2)));
  REQUIRE(controller.ok());
  return *std::move(controller);
}

StepCounts OneKind(int64_t num_tokens, std::span<const int32_t> counts) {
  return StepCounts::Of(TokenKind::kDecode, num_tokens, counts);
}

struct Outcome {
  int plans = 0;
  size_t moves = 0;
  std::vector<std::byte> bytes;  // of all plans
};

// Runs `steps` steps of traffic; every plan commits four steps after it started.
Outcome Drive(Controller* controller, Traffic* traffic, int32_t shift, int64_t first,
              int64_t steps) {
  Outcome outcome;
  int64_t commit_at = -1;
  int64_t plan_id = 0;
  for (int64_t step = first; step < first + steps; ++step) {
    controller->OnStep(step, OneKind(kTokens, traffic->Step(shift)));
    if (step == commit_at) controller->OnCommitted(plan_id, step);
    Decision why;
    if (const auto plan = controller->Decide(step, /*force=*/false, &why)) {
      REQUIRE(plan->Apply(controller->placement()).ok());
      plan_id = plan->plan_id;
      commit_at = step + 4;
      ++outcome.plans;
      outcome.moves += plan->moves.size();
      const std::vector<std::byte> bytes = plan->Serialize();
      outcome.bytes.insert(outcome.bytes.end(), bytes.begin(), bytes.end());
    }
  }
  if (controller->in_flight()) controller->OnCommitted(plan_id, first + steps);
  return outcome;
}

TEST_CASE("steady traffic settles and a shift brings a plan", "[placement][controller]") {
  const auto controller = Make({});
  Traffic traffic(1);
  const Outcome start = Drive(controller.get(), &traffic, 0, 0, 200);
  REQUIRE(start.plans >= 1);
  const Outcome settled = Drive(controller.get(), &traffic, 0, 200, 400);
  REQUIRE(settled.plans <= 1);
  const Outcome shifted = Drive(controller.get(), &traffic, 13, 600, 100);
  REQUIRE(shifted.plans >= 1);
  REQUIRE(shifted.moves > 0);
  REQUIRE(controller->placement().epoch() == start.plans + settled.plans + shifted.plans);
}

TEST_CASE("the same calls give the same plans byte for byte", "[placement][controller]") {
  Outcome outcomes[2];
  for (Outcome& outcome : outcomes) {
    const auto controller = Make({.force_every_steps = 20});
    Traffic traffic(2);
    outcome = Drive(controller.get(), &traffic, 3, 0, 200);
  }
  REQUIRE(outcomes[0].plans >= 5);
  REQUIRE(outcomes[0].bytes == outcomes[1].bytes);
}

TEST_CASE("a decision says why there is no plan", "[placement][controller]") {
  const auto controller =
      Make({.window_tokens = 4 * kTokens, .min_steps_between = 8, .backoff_steps = 50});
  Traffic traffic(3);
  Decision why;
  REQUIRE_FALSE(controller->Decide(0, /*force=*/true, &why).has_value());
  REQUIRE(why == Decision::kWindowNotFull);
  int64_t step = 0;
  for (; step < 3; ++step) controller->OnStep(step, OneKind(kTokens, traffic.Step(0)));
  REQUIRE_FALSE(controller->Decide(step, /*force=*/false, &why).has_value());
  REQUIRE(why == Decision::kWindowNotFull);

  controller->OnStep(step, OneKind(kTokens, traffic.Step(0)));
  const auto plan = controller->Decide(step, /*force=*/false, &why);
  REQUIRE(plan.has_value());
  REQUIRE(why == Decision::kPlanned);
  REQUIRE(plan->plan_id == 1);
  REQUIRE_FALSE(controller->Decide(step, /*force=*/true, &why).has_value());
  REQUIRE(why == Decision::kInFlight);

  controller->OnAborted(1, 10);
  REQUIRE(controller->placement().epoch() == 0);
  REQUIRE_FALSE(controller->Decide(59, /*force=*/false, &why).has_value());
  REQUIRE(why == Decision::kTooSoon);
  const auto again = controller->Decide(60, /*force=*/false, &why);
  REQUIRE(again.has_value());
  REQUIRE(again->plan_id == 2);
  REQUIRE(again->rows.size() == plan->rows.size());
  controller->OnCommitted(2, 61);
  REQUIRE(controller->placement().epoch() == 1);
  REQUIRE(controller->placement().fingerprint() == again->target_fingerprint);
  REQUIRE_FALSE(controller->Decide(68, /*force=*/false, &why).has_value());
  REQUIRE(why == Decision::kTooSoon);
  REQUIRE_FALSE(controller->Decide(69, /*force=*/false, &why).has_value());
  REQUIRE(why == Decision::kNothingToGain);
}

TEST_CASE("a forced plan needs no gain and no patience", "[placement][controller]") {
  const auto controller =
      Make({.min_steps_between = 1000, .min_gain = 100.0, .backoff_steps = 1000});
  Traffic traffic(4);
  Decision why;
  controller->OnStep(0, OneKind(kTokens, traffic.Step(0)));
  auto plan = controller->Decide(0, /*force=*/true, &why);
  REQUIRE(plan.has_value());
  controller->OnAborted(plan->plan_id, 1);
  plan = controller->Decide(2, /*force=*/true, &why);
  REQUIRE(plan.has_value());
  controller->OnCommitted(plan->plan_id, 3);
  controller->OnStep(4, OneKind(kTokens, traffic.Step(7)));
  REQUIRE(controller->Decide(4, /*force=*/true, &why).has_value());
}

TEST_CASE("plans at an interval wait for the backoff but not for gain", "[placement][controller]") {
  const auto controller = Make(
      {.min_steps_between = 1000, .force_every_steps = 10, .min_gain = 100.0, .backoff_steps = 50});
  Traffic traffic(8);
  Decision why;
  controller->OnStep(0, OneKind(kTokens, traffic.Step(0)));
  REQUIRE_FALSE(controller->Decide(9, /*force=*/false, &why).has_value());
  REQUIRE(controller->Decide(10, /*force=*/false, &why).has_value());
  controller->OnAborted(1, 12);
  REQUIRE_FALSE(controller->Decide(61, /*force=*/false, &why).has_value());
  REQUIRE(why == Decision::kTooSoon);
  REQUIRE(controller->Decide(62, /*force=*/false, &why).has_value());
  controller->OnCommitted(2, 63);
  controller->OnStep(64, OneKind(kTokens, traffic.Step(7)));
  REQUIRE_FALSE(controller->Decide(71, /*force=*/false, &why).has_value());
  REQUIRE(controller->Decide(72, /*force=*/false, &why).has_value());
}

TEST_CASE("a policy with an interval plans from the steps of that interval alone",
          "[placement][controller][policy]") {
  const auto controller = Make({.policy = "eplb-interval:5", .min_steps_between = 1000});
  Traffic traffic(9);
  Decision why;
  std::vector<int64_t> sums;
  for (int64_t step = 1; step <= 10; ++step) {
    const std::vector<int32_t> counts = traffic.Step(step <= 5 ? 0 : 7);
    if (step % 5 == 1) sums.assign(counts.size(), 0);
    for (size_t i = 0; i < counts.size(); ++i) sums[i] += counts[i];
    controller->OnStep(step, OneKind(kTokens, counts));
    for (int32_t layer = 0; layer < controller->placement().num_layers(); ++layer) {
      const auto window = controller->window_load(layer);
      REQUIRE(std::equal(window.begin(), window.end(), sums.begin() + layer * kExperts));
    }
    const auto plan = controller->Decide(step, /*force=*/false, &why);
    REQUIRE(plan.has_value() == (step % 5 == 0));
    if (plan.has_value()) {
      controller->OnCommitted(plan->plan_id, step);
    } else {
      REQUIRE(why == Decision::kTooSoon);
    }
  }
}

TEST_CASE("policies are made by name, with an argument where they take one",
          "[placement][policy]") {
  for (const std::string& name : PolicyNames()) {
    INFO(name);
    const size_t colon = name.find(':');
    const std::string given = colon == std::string::npos ? name : name.substr(0, colon + 1) + "8";
    REQUIRE(MakePolicy(given).ok());
  }
  const auto message = [](const std::string& name) {
    return std::string(MakePolicy(name).status().message());
  };
  REQUIRE((*MakePolicy("eplb-interval:8"))->interval_steps() == 8);
  REQUIRE(message("eplb-interval:0") ==
          "policy 'eplb-interval:0': the interval is '0', allowed: 1 to 1048576");
  for (const char* name : {"eplb-interval", "regret:3", "best", "", ":", "eplb:"}) {
    REQUIRE(message(name) == std::string("unknown policy '") + name +
                                 "'; the choices are eplb, eplb-interval:N, full, regret, "
                                 "static, never");
  }
}

TEST_CASE("policies that never plan say so", "[placement][controller]") {
  for (const char* policy : {"static", "never"}) {
    const auto controller = Make({.policy = policy, .window_tokens = kTokens});
    Traffic traffic(5);
    controller->OnStep(0, OneKind(kTokens, traffic.Step(0)));
    Decision why;
    REQUIRE_FALSE(controller->Decide(0, /*force=*/false, &why).has_value());
    REQUIRE(why == Decision::kPolicyStays);
    REQUIRE_FALSE(controller->Decide(0, /*force=*/true, &why).has_value());
    REQUIRE(why == Decision::kPolicyStays);
  }
  REQUIRE_FALSE((*MakePolicy("static"))->fills_spare_slots_at_start());
  REQUIRE((*MakePolicy("never"))->fills_spare_slots_at_start());
  REQUIRE((*MakePolicy("eplb"))->fills_spare_slots_at_start());
}

TEST_CASE("a plan brings no rank more copies than allowed", "[placement][controller]") {
  const auto unlimited = Make({});
  const auto limited = Make({.min_steps_between = 0, .max_incoming_per_rank = 5});
  Traffic traffic(6);
  for (int64_t step = 0; step < 40; ++step) {
    const std::vector<int32_t> counts = traffic.Step(11);
    unlimited->OnStep(step, OneKind(kTokens, counts));
    limited->OnStep(step, OneKind(kTokens, counts));
  }
  Decision why;
  const auto all = unlimited->Decide(40, /*force=*/false, &why);
  REQUIRE(all.has_value());
  REQUIRE(all->rows.size() == kLayers);
  size_t rows = 0;
  for (int64_t step = 40; rows < all->rows.size(); ++step) {
    const auto plan = limited->Decide(step, /*force=*/false, &why);
    REQUIRE(plan.has_value());
    std::vector<int32_t> incoming(8, 0);
    for (const Move& move : plan->moves) {
      ++incoming[limited->placement().topology().rank_of_slot(move.to_slot)];
    }
    REQUIRE(*std::max_element(incoming.begin(), incoming.end()) <= 5);
    rows += plan->rows.size();
    limited->OnCommitted(plan->plan_id, step);
  }
  REQUIRE(limited->placement().fingerprint() == all->target_fingerprint);
}

TEST_CASE("copies never exceed the grants of any window of steps and the burst",
          "[placement][controller][budget]") {
  for (const char* policy : {"eplb", "regret"}) {
    for (const double grant : {0.0, 0.3, 2.5}) {
      const double burst = 40;  // the slots of a layer
      const auto controller = Make({.policy = policy,
                                    .rho = 0.01,
                                    .min_steps_between = 0,
                                    .min_gain = 0.0,
                                    .copy_burst = burst});
      Traffic traffic(21);
      std::vector<size_t> copies;  // of each step
      int over_budget = 0;
      for (int64_t step = 0; step < 300; ++step) {
        controller->OnStep(step,
                           OneKind(kTokens, traffic.Step(static_cast<int32_t>(step / 20) * 7)));
        controller->GrantCopies(grant);
        Decision why;
        const auto plan = controller->Decide(step, /*force=*/step % 10 == 9, &why);
        copies.push_back(plan.has_value() ? plan->moves.size() : 0);
        over_budget += why == Decision::kOverBudget;
        if (!plan.has_value()) continue;
        // An aborted plan has spent its copies too.
        if (step % 7 == 0) {
          controller->OnAborted(plan->plan_id, step);
        } else {
          controller->OnCommitted(plan->plan_id, step);
        }
      }
      INFO(policy << " with " << grant << " copies per step");
      size_t all = 0;
      for (size_t first = 0; first < copies.size(); ++first) {
        size_t sum = 0;
        for (size_t last = first; last < copies.size(); ++last) {
          sum += copies[last];
          const double granted = grant * static_cast<double>(last - first + 1);
          REQUIRE(static_cast<double>(sum) <= granted + burst + 1e-6);
        }
        all = std::max(all, sum);
      }
      // What is granted is used, too: there is always something to move in this traffic.
      REQUIRE(static_cast<double>(all) >= grant * 300 * 0.5);
      REQUIRE((over_budget > 0 || grant > 1.0));
    }
  }
}

TEST_CASE("a plan waits for credit and comes when it is there", "[placement][controller][budget]") {
  const auto controller = Make({.min_steps_between = 0, .copy_burst = 40});
  const auto unlimited = Make({.min_steps_between = 0});
  Traffic traffic(22);
  for (int64_t step = 0; step < 40; ++step) {
    const auto counts = traffic.Step(3);
    controller->OnStep(step, OneKind(kTokens, counts));
    unlimited->OnStep(step, OneKind(kTokens, counts));
  }
  Decision why;
  const auto all = unlimited->Decide(40, false, &why);
  REQUIRE(all.has_value());
  REQUIRE(all->rows.size() == 2);
  std::vector<size_t> of_row(2, 0);  // copies of each layer
  for (const Move& move : all->moves) ++of_row[move.layer];
  REQUIRE(of_row[0] + of_row[1] > 40);
  // The burst is enough for one of the layers, the one with more to gain.
  const auto first = controller->Decide(40, false, &why);
  REQUIRE(first.has_value());
  REQUIRE(first->rows.size() == 1);
  const int32_t layer = first->rows[0].layer, other = 1 - layer;
  REQUIRE(first->moves.size() == of_row[layer]);
  controller->OnCommitted(first->plan_id, 40);
  // The other waits, forced or not, for the copies that it lacks, to the last one.
  const double lacking = static_cast<double>(of_row[layer] + of_row[other]) - 40;
  controller->GrantCopies(lacking - 0.5);
  REQUIRE_FALSE(controller->Decide(41, false, &why).has_value());
  REQUIRE(why == Decision::kOverBudget);
  REQUIRE(std::string(NameOf(why)) == "over_budget");
  REQUIRE_FALSE(controller->Decide(41, true, &why).has_value());
  REQUIRE(why == Decision::kOverBudget);
  controller->GrantCopies(0.5);
  const auto second = controller->Decide(42, false, &why);
  REQUIRE(second.has_value());
  REQUIRE(second->moves.size() == of_row[other]);
  REQUIRE(second->rows[0].layer == other);
  controller->OnCommitted(second->plan_id, 42);
  REQUIRE(controller->placement().fingerprint() == all->target_fingerprint);
  REQUIRE_FALSE(controller->Decide(43, false, &why).has_value());
  REQUIRE(why == Decision::kNothingToGain);
}

TEST_CASE("a plan after an aborted one takes its copies from the other kind of source",
          "[placement][controller]") {
  for (const bool retry : {false, true}) {
    const auto controller = Make({.retry_from_file = retry});
    Traffic traffic(6);
    int64_t step = 0;
    const auto plan_reads = [&] {
      controller->OnStep(step, OneKind(kTokens, traffic.Step(static_cast<int32_t>(step))));
      Decision why;
      const auto plan = controller->Decide(++step, /*force=*/true, &why);
      REQUIRE(plan.has_value());
      REQUIRE_FALSE(plan->moves.empty());
      const auto from_file = [](const Move& m) { return m.from_rank == Move::kFromFile; };
      const bool reads = from_file(plan->moves[0]);
      REQUIRE(std::all_of(plan->moves.begin(), plan->moves.end(),
                          [&](const Move& m) { return from_file(m) == reads; }));
      return reads;
    };
    for (const bool expected : {false, true, false, true}) {
      REQUIRE(plan_reads() == (retry && expected));
      controller->OnAborted(controller->last_plan_id(), step);
    }
    REQUIRE_FALSE(plan_reads());
    controller->OnAborted(controller->last_plan_id(), step);
    REQUIRE(plan_reads() == retry);
    controller->OnCommitted(controller->last_plan_id(), step);
    REQUIRE_FALSE(plan_reads());
  }
}

TEST_CASE("the window forgets what is older than its tokens", "[placement][controller]") {
  const auto controller = Make({.window_tokens = 1600});
  std::vector<int32_t> counts(kLayers * kExperts, 0);
  counts[3] = 10;
  for (int64_t step = 0; step < 100; ++step) controller->OnStep(step, OneKind(10, counts));
  REQUIRE(controller->window_tokens() == 1000);
  REQUIRE(controller->window_load(0)[3] == 1000);
  counts[3] = 0;
  counts[kExperts + 4] = 10;
  for (int64_t step = 100; step < 400; ++step) {
    controller->OnStep(step, OneKind(10, counts));
    REQUIRE(controller->window_tokens() <= 1600 + 100);
  }
  REQUIRE(controller->window_tokens() >= 1600);
  REQUIRE(controller->window_load(0)[3] == 0);
  REQUIRE(controller->window_load(1)[4] == controller->window_tokens());
}

TEST_CASE("options and topologies that cannot work are refused by name",
          "[placement][controller][errors]") {
  const auto message = [](const ControllerOptions& options, const Topology& topology) {
    return std::string(Controller::Create(options, Ring(topology)).status().message());
  };
  const Topology even = Topology::Uniform(8, 5);
  REQUIRE(message({.policy = "best"}, even) ==
          "unknown policy 'best'; the choices are eplb, eplb-interval:N, full, regret, static, "
          "never");
  REQUIRE(message({.window_tokens = 0}, even).find("window_tokens is 0") == 0);
  REQUIRE(message({.min_gain = std::nan("")}, even).find("min_gain") == 0);
  REQUIRE(message({.max_incoming_per_rank = 4}, even).find("max_incoming_per_rank is 4") == 0);
  REQUIRE(message({.copy_burst = 39.5}, even).find("copy_burst is 39.5") == 0);
  REQUIRE(message({.copy_burst = std::nan("")}, even).find("copy_burst") == 0);
  const Topology uneven{{0, 20, 38}, {0, 0}};
  REQUIRE(message({}, uneven) ==
          "policy eplb needs ranks with equally many slots; rank 0 has 20 and rank 1 has 18");
  REQUIRE(message({.policy = "never"}, uneven).empty());
}

TEST_CASE("eplb plans rows that are valid and balance the window", "[placement][policy]") {
  Random random(7);
  const auto policy = *MakePolicy("eplb");
  for (int i = 0; i < 100; ++i) {
    const Topology topology = Topology::Uniform(8, 5, 1 + random.Below(2));
    const Placement current = Ring(topology);
    std::vector<int64_t> load(kExperts);
    for (int64_t& l : load) l = random.Below(1000);
    const int32_t num_groups = static_cast<int32_t>(1 + random.Below(5));
    const PolicyContext context{.initial = current, .num_groups = num_groups};
    const auto planner = policy->MakeLayerPlanner(context, 1);
    const auto row = planner->Plan({.window = load});
    REQUIRE(row.has_value());
    const auto next = current.With(std::vector<Placement::LayerRow>{{1, *row}}, 1);
    REQUIRE(next.ok());
    // The same load asks for nothing more.
    planner->Adopt(*row);
    REQUIRE(planner->Plan({.window = load}) == row);
  }
}

// ---- departures
// ----------------------------------------------------------------------------------

TEST_CASE("a rank is vacated in plans that others have room for", "[controller][vacate]") {
  for (const int32_t limit : {0, 6, 8}) {
    CAPTURE(limit);
    const Topology topology = Topology::Uniform(8, 6, 2);
    auto made =
        Controller::Create({.policy = "eplb", .max_incoming_per_rank = limit}, Ring(topology));
    REQUIRE(made.ok());
    Controller& controller = **made;
    constexpr int32_t kRank = 3;
    REQUIRE(ReloadsIfLost(controller.placement())[kRank] > 0);
    int plans = 0;
    while (auto plan = controller.Vacate(/*step=*/plans, kRank)) {
      REQUIRE(++plans < 20);
      std::vector<int32_t> incoming(8, 0);
      for (const Move& move : plan->moves) {
        const int32_t to = topology.rank_of_slot(move.to_slot);
        CHECK(to != kRank);
        ++incoming[static_cast<size_t>(to)];
      }
      if (limit > 0) CHECK(*std::ranges::max_element(incoming) <= limit);
      controller.OnCommitted(plan->plan_id, plans);
    }
    CHECK(plans > 0);
    CHECK(ReloadsIfLost(controller.placement())[kRank] == 0);
    CHECK(!controller.in_flight());
  }
}

TEST_CASE("a rank whose experts have no room elsewhere is not vacated", "[controller][vacate]") {
  auto full = Placement::Contiguous(kLayers, kExperts, Topology::Uniform(8, 4), false);
  REQUIRE(full.ok());
  auto controller = Controller::Create({.policy = "static"}, *full);
  REQUIRE(controller.ok());
  CHECK(!(*controller)->Vacate(0, 2).has_value());
}

}  // namespace
}  // namespace ballast
