// Prefill and decode apart: what the memory, the controller and a replay make of two kinds of
// token.
#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/random.h"
#include "placement/controller.h"
#include "placement/replay.h"
#include "placement/split_exact.h"
#include "placement/traffic_memory.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

constexpr int32_t kExperts = 64, kRanks = 8, kSlots = 9;
constexpr int32_t kTopK = 6, kStepTokens = 1024;

// Traffic of fixed shares, which differ from seed to seed.
class Traffic {
 public:
  explicit Traffic(uint64_t seed) : random_(seed) {
    for (double& s : sums_) s = std::exp(4.0 * random_.Uniform());
    std::partial_sum(sums_.begin(), sums_.end(), sums_.begin());
  }
  std::vector<int32_t> Draw(int64_t tokens = kStepTokens) {
    std::vector<int32_t> counts(kExperts);
    for (int64_t i = 0; i < tokens * kTopK; ++i) {
      const double at = random_.Uniform() * sums_.back();
      ++counts[static_cast<size_t>(std::lower_bound(sums_.begin(), sums_.end() - 1, at) -
                                   sums_.begin())];
    }
    return counts;
  }

 private:
  Random random_;
  std::vector<double> sums_ = std::vector<double>(kExperts);
};

std::unique_ptr<Controller> Make(const ControllerOptions& options) {
  auto controller = Controller::Create(
      options, *Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, kSlots), true));
  REQUIRE(controller.ok());
  return *std::move(controller);
}

double Imbalance(const Placement& placement, const std::vector<int32_t>& counts) {
  Split split;
  ExactSplitter(placement.hosts(0)).Run(counts, &split);
  return static_cast<double>(split.largest_load) * kRanks /
         std::accumulate(counts.begin(), counts.end(), 0);
}

TEST_CASE("the load of a mix is at most that of its parts", "[placement][kinds][property]") {
  Random random(1);
  for (int trial = 0; trial < 2000; ++trial) {
    const int32_t ranks = 2 + static_cast<int32_t>(random.Below(5));
    const int32_t experts = ranks + static_cast<int32_t>(random.Below(8));
    const Topology topology = Topology::Uniform(ranks, experts / ranks + 2);
    const Placement placement = *Placement::Create(
        1, experts, topology, testing::RandomRow(&random, topology.num_slots(), experts), 0);
    std::vector<int32_t> a(experts), b(experts), sum(experts);
    for (int32_t e = 0; e < experts; ++e) {
      a[e] = static_cast<int32_t>(random.Below(100));
      b[e] = static_cast<int32_t>(random.Below(1000));
      sum[e] = a[e] + b[e];
    }
    Split split;
    const auto largest = [&](const std::vector<int32_t>& demand) {
      ExactSplitter(placement.hosts(0)).Run(demand, &split);
      return split.largest_load;
    };
    REQUIRE(largest(sum) <= largest(a) + largest(b));
  }
}

// ---- the memory --------------------------------------------------------------------------------

// Changes that the memory sees in 30 rounds of six decode and two prefill batches, all told as
// `kind_of` says.
int ChangesSeen(const std::function<TokenKind(TokenKind)>& kind_of) {
  Traffic prefill(11), decode(12);
  TrafficMemory memory(kExperts, kRanks, 1.0f);
  int changes = 0;
  for (int batch = 0; batch < 240; ++batch) {
    const TokenKind kind = batch % 8 < 6 ? TokenKind::kDecode : TokenKind::kPrefill;
    memory.Add((kind == TokenKind::kDecode ? decode : prefill).Draw(), kind_of(kind));
    changes += memory.batches_since_change(kind_of(kind)) == 1;
  }
  return changes;
}

TEST_CASE("alternation of kinds is no change of traffic", "[placement][kinds]") {
  // The first batch of each kind begins its traffic.
  CHECK(ChangesSeen([](TokenKind kind) { return kind; }) == 2);
  CHECK(ChangesSeen([](TokenKind) { return TokenKind::kPrefill; }) > 20);
}

TEST_CASE("each kind has a usual noise of its own", "[placement][kinds]") {
  // Batches of few tokens are several times as noisy as those of many.
  Traffic prefill(16), decode(17);
  TrafficMemory memory(kExperts, kRanks, 1.0f);
  int changes = 0;
  for (int batch = 0; batch < 80; ++batch) {
    const bool is_prefill = batch % 2 == 0;
    const TokenKind kind = is_prefill ? TokenKind::kPrefill : TokenKind::kDecode;
    memory.Add(is_prefill ? prefill.Draw(4096) : decode.Draw(128), kind);
    changes += memory.batches_since_change(kind) == 1;
  }
  CHECK(changes == 2);
  // Prefill that moves by less than the noise of decode is a change all the same.
  std::vector<int32_t> moved = prefill.Draw(4096);
  const auto busiest = std::max_element(moved.begin(), moved.end());
  *busiest += 4096 * kTopK / 8;
  memory.Add(moved, TokenKind::kPrefill);
  CHECK(memory.batches_since_change(TokenKind::kPrefill) == 1);
  CHECK(memory.batches_since_change(TokenKind::kDecode) == 40);
}

TEST_CASE("each kind has means of its own that count by its share", "[placement][kinds]") {
  Traffic prefill(13), decode(14), other(15);
  TrafficMemory memory(kExperts, kRanks, 1.0f);
  // Three decode batches to one of prefill, which comes last.
  for (int batch = 0; batch < 32; ++batch) {
    const bool is_prefill = batch % 4 == 3;
    memory.Add((is_prefill ? prefill : decode).Draw(),
               is_prefill ? TokenKind::kPrefill : TokenKind::kDecode);
  }
  const Lanes& weights = memory.weights();
  CHECK(Sum(weights) == Approx(1.0));
  // Decode was seen first: lanes 1 and 2; prefill has 14 and 15; the slow mean 3 is of both.
  for (int m = 0; m < 2; ++m) {
    CHECK(weights[1 + m] == Approx(0.75 * weights[3]));
    CHECK(weights[14 + m] == Approx(0.25 * weights[3]));
  }
  const auto distance = [&](int lane, const std::vector<int32_t>& counts) {
    double sum = 0.0;
    for (int32_t e = 0; e < kExperts; ++e) {
      sum += std::abs(memory.scenarios()[e][lane] -
                      double{kRanks} * counts[e] / (kStepTokens * kTopK));
    }
    return sum / (2 * kRanks);
  };
  for (int m = 0; m < 2; ++m) {
    CHECK(distance(1 + m, decode.Draw()) < 0.06);
    CHECK(distance(14 + m, prefill.Draw()) < 0.06);
    CHECK(distance(1 + m, prefill.Draw()) > 0.15);
  }
  for (int32_t e = 0; e < kExperts; ++e) {
    const Lanes& of = memory.scenarios()[e];
    REQUIRE(memory.typical_load(e) == Approx(0.75 * of[1] + 0.25 * of[14]));
  }
  // All ten single batches speak, the older the less.
  for (int lane = 5; lane < 14; ++lane) CHECK(weights[lane] == Approx(0.8 * weights[lane - 1]));
  // Decode changes: what it was before says nothing any more, and prefill (ages 1, 5, 9) still
  // does.
  memory.Add(other.Draw(), TokenKind::kDecode);
  CHECK(memory.batches_since_change(TokenKind::kDecode) == 1);
  CHECK(memory.batches_since_change(TokenKind::kPrefill) == 8);
  for (int lane = 4; lane < 14; ++lane) {
    CAPTURE(lane);
    CHECK((memory.weights()[lane] > 0.0f) == ((lane - 3) % 4 == 1));
  }
  memory.Add(prefill.Draw(), TokenKind::kPrefill);
  CHECK(memory.batches_since_change(TokenKind::kDecode) == 1);
}

TEST_CASE("batches count by their weight", "[placement][kinds]") {
  Traffic prefill(18), decode(19);
  TrafficMemory memory(kExperts, kRanks, 1.0f);
  for (int step = 0; step < 20; ++step) {
    memory.Add(prefill.Draw(960), TokenKind::kPrefill, 0.9375f);
    memory.Add(decode.Draw(64), TokenKind::kDecode, 0.0625f);
  }
  const Lanes& weights = memory.weights();
  // Prefill was seen first.
  CHECK(weights[1] == Approx(0.9375 * weights[3]));
  CHECK(weights[14] == Approx(0.0625 * weights[3]));
  // The last batch is of decode, the one before of prefill.
  CHECK(weights[0] == Approx(0.0625 * weights[3]));
  CHECK(weights[4] == Approx(0.3 * 0.9375 * weights[3]));
  CHECK(weights[5] == Approx(0.8 * weights[4] / 15.0));
}

// ---- the controller ----------------------------------------------------------------------------

struct Outcome {
  int64_t copies = 0;
  double cost = 0.0;  // mean of imbalance + rho * copies, over the second half
};

// 24 rounds of sixteen decode and four prefill steps, each stationary.
Outcome Alternate(bool separate_kinds, uint64_t seed) {
  constexpr double kRho = 0.1;
  constexpr int kSteps = 480;
  const auto controller = Make({.policy = "regret",
                                .rho = kRho,
                                .separate_kinds = separate_kinds,
                                .batch_tokens = kStepTokens,
                                .min_steps_between = 0});
  Traffic prefill(seed), decode(seed + 1);
  Outcome outcome;
  for (int step = 0; step < kSteps; ++step) {
    const TokenKind kind = step % 20 < 16 ? TokenKind::kDecode : TokenKind::kPrefill;
    const auto counts = (kind == TokenKind::kDecode ? decode : prefill).Draw();
    double cost = Imbalance(controller->placement(), counts);
    controller->OnStep(step, StepCounts::Of(kind, kStepTokens, counts));
    Decision why;
    const auto plan = controller->Decide(step, /*force=*/false, &why);
    if (plan.has_value()) {
      controller->OnCommitted(plan->plan_id, step);
      cost += kRho * static_cast<double>(plan->moves.size());
    }
    if (step < kSteps / 2) continue;
    outcome.copies += plan.has_value() ? static_cast<int64_t>(plan->moves.size()) : 0;
    outcome.cost += cost / (kSteps / 2);
  }
  return outcome;
}

TEST_CASE("kinds that alternate settle where they are told apart", "[placement][kinds]") {
  // One pair of kinds may happen to suit either way: five speak.
  Outcome separate, joint;
  for (uint64_t seed : {21, 31, 41, 51, 61}) {
    for (auto [sum, separate_kinds] : {std::pair{&separate, true}, {&joint, false}}) {
      const Outcome one = Alternate(separate_kinds, seed);
      sum->copies += one.copies;
      sum->cost += one.cost / 5;
    }
  }
  CAPTURE(separate.copies, separate.cost, joint.copies, joint.cost);
  CHECK(5 * separate.copies < joint.copies);
  CHECK(1.5 * (separate.cost - 1.0) < joint.cost - 1.0);
}

// Copies that regret makes for steps of both kinds, each stationary.
int64_t CopiesOfMixedSteps(bool separate_kinds, int64_t prefill_tokens, int64_t decode_tokens,
                           bool in_step) {
  Traffic prefill(81), decode(82);
  std::vector<int64_t> by_kind;
  constexpr int64_t kSteps = 120;
  for (int64_t step = 0; step < kSteps; ++step) {
    for (const auto& counts : {prefill.Draw(prefill_tokens), decode.Draw(decode_tokens)}) {
      by_kind.insert(by_kind.end(), counts.begin(), counts.end());
    }
  }
  const NamedArray array = {"mixed",
                            MakeNpyArray(NpyType::kI32, {kSteps, 2, 1, kExperts}, by_kind)};
  const auto trace = CountSteps({&array, 1}, {.step_tokens = kStepTokens, .top_k = kTopK});
  REQUIRE(trace.ok());
  ReplayOptions options{
      .topology = Topology::Uniform(kRanks, kSlots), .policies = {"regret"}, .rhos = {0.1}};
  options.when = in_step ? PlanTime::kInStep : PlanTime::kAfterStep;
  options.controller.min_steps_between = 0;
  options.controller.separate_kinds = separate_kinds;
  const auto result = Replay(*trace, options);
  REQUIRE(result.ok());
  return std::llround(result->figures[0].copies_per_layer_step * kSteps);
}

TEST_CASE("the noise of a few tokens in a step moves nothing", "[placement][kinds][replay]") {
  const int64_t joint = CopiesOfMixedSteps(false, 1000, 24, /*in_step=*/false);
  const int64_t separate = CopiesOfMixedSteps(true, 1000, 24, /*in_step=*/false);
  CAPTURE(joint, separate);
  CHECK(joint > 0);
  CHECK(separate <= 3 * joint);
}

TEST_CASE("plans for the step under way see it whole", "[placement][kinds][replay]") {
  CHECK(CopiesOfMixedSteps(true, 600, 424, /*in_step=*/true) ==
        CopiesOfMixedSteps(false, 600, 424, /*in_step=*/true));
}

TEST_CASE("a long prompt does not flush what generation did", "[placement][kinds]") {
  std::vector<int32_t> decode(kExperts), prompt(kExperts);
  decode[3] = 10;
  prompt[5] = 100'000;
  for (bool separate : {true, false}) {
    const auto controller = Make({.separate_kinds = separate, .window_tokens = 1600});
    int64_t step = 0;
    for (; step < 200; ++step) {
      controller->OnStep(step, StepCounts::Of(TokenKind::kDecode, 10, decode));
    }
    // Sixteen chunks of 100 tokens.
    REQUIRE(controller->window_tokens() == 1600);
    StepCounts both = StepCounts::Of(TokenKind::kDecode, 10, decode);
    both.num_tokens[TokenKind::kPrefill] = 100'000;
    both.counts[TokenKind::kPrefill] = prompt;
    controller->OnStep(step++, both);
    CHECK(controller->window_load(0)[3] == (separate ? 1610 : 10));
    CHECK(controller->window_load(0)[5] == 100'000);
    CHECK(controller->window_tokens() == 100'000 + controller->window_load(0)[3]);
    // The prompt leaves with the next 1,600 tokens of its kind, or of any where kinds are one.
    prompt[5] = 0;
    prompt[6] = 100;
    for (int i = 0; i < 16; ++i) {
      REQUIRE(controller->window_load(0)[5] == 100'000);
      controller->OnStep(step++, StepCounts::Of(TokenKind::kPrefill, 100, prompt));
    }
    CHECK(controller->window_load(0)[5] == 0);
    CHECK(controller->window_load(0)[3] == (separate ? 1610 : 0));
    CHECK(controller->window_load(0)[6] == 1600);
    prompt[5] = 100'000;
    prompt[6] = 0;
  }
}

// The plans for traffic that changes every 40 steps, told as `step_of` says.
std::vector<std::byte> PlansOf(
    const std::string& policy, bool separate_kinds,
    const std::function<StepCounts(const std::vector<int32_t>&, const std::vector<int32_t>&)>&
        step_of) {
  const auto controller = Make({.policy = policy,
                                .rho = 0.03,
                                .separate_kinds = separate_kinds,
                                .batch_tokens = 600,
                                .window_tokens = 4096,
                                .min_steps_between = 3});
  std::vector<std::byte> plans;
  for (int step = 0; step < 200; ++step) {
    const uint64_t phase = 50 + static_cast<uint64_t>(step / 40);
    const auto a = Traffic(phase * 1000 + static_cast<uint64_t>(step)).Draw(1);
    const auto b = Traffic(phase).Draw(256);
    controller->OnStep(step, step_of(a, b));
    Decision why;
    const auto plan = controller->Decide(step, /*force=*/step == 150, &why);
    if (!plan.has_value()) continue;
    const auto bytes = plan->Serialize();
    plans.insert(plans.end(), bytes.begin(), bytes.end());
    controller->OnCommitted(plan->plan_id, step);
  }
  return plans;
}

TEST_CASE("with one kind separate and joint windows plan alike to the byte", "[placement][kinds]") {
  for (const char* policy : {"regret", "eplb", "eplb-interval:8", "full"}) {
    CAPTURE(policy);
    const auto one_kind = [&](bool separate_kinds, TokenKind kind) {
      return PlansOf(policy, separate_kinds,
                     [kind](const auto&, const auto& b) { return StepCounts::Of(kind, 256, b); });
    };
    const auto joint = one_kind(false, TokenKind::kPrefill);
    CHECK(joint.size() > 500);
    CHECK(joint == one_kind(true, TokenKind::kPrefill));
    CHECK(joint == one_kind(true, TokenKind::kDecode));
    CHECK(joint == one_kind(false, TokenKind::kDecode));
    // Joint windows see the sum of both kinds as one.
    std::vector<int32_t> sum;
    const auto mixed = PlansOf(policy, false, [](const auto& a, const auto& b) {
      StepCounts step = StepCounts::Of(TokenKind::kPrefill, 256, b);
      step.num_tokens[TokenKind::kDecode] = 1;
      step.counts[TokenKind::kDecode] = a;
      return step;
    });
    const auto summed = PlansOf(policy, false, [&](const auto& a, const auto& b) {
      sum = a;
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += b[i];
      return StepCounts::Of(TokenKind::kDecode, 257, sum);
    });
    CHECK(mixed == summed);
  }
}

// ---- replays -----------------------------------------------------------------------------------

TEST_CASE("a replay gives each kind of a trace to the controller as its kind",
          "[placement][kinds][replay]") {
  // Alternating steps as one trace of counts by kind, and their sums.
  Traffic prefill(61), decode(62);
  std::vector<int64_t> by_kind, sums;
  const std::vector<int32_t> none(kExperts);
  constexpr int64_t kSteps = 160;
  for (int64_t step = 0; step < kSteps; ++step) {
    const bool decodes = step % 8 < 6;
    const auto counts = (decodes ? decode : prefill).Draw();
    for (const auto& of : {decodes ? none : counts, decodes ? counts : none}) {
      by_kind.insert(by_kind.end(), of.begin(), of.end());
    }
    sums.insert(sums.end(), counts.begin(), counts.end());
  }
  const NamedArray four = {"four", MakeNpyArray(NpyType::kI32, {kSteps, 2, 1, kExperts}, by_kind)};
  const NamedArray three = {"three", MakeNpyArray(NpyType::kI32, {kSteps, 1, kExperts}, sums)};
  const TraceOptions trace_options{.step_tokens = kStepTokens, .top_k = kTopK};
  const auto with = CountSteps({&four, 1}, trace_options);
  const auto without = CountSteps({&three, 1}, trace_options);
  REQUIRE(with.ok());
  REQUIRE(without.ok());
  CHECK(with->counts == without->counts);
  ReplayOptions options{.topology = Topology::Uniform(kRanks, kSlots),
                        .policies = {"never", "regret", "eplb"},
                        .rhos = {0.1}};
  options.controller.min_steps_between = 0;
  const auto figures = [&](const StepTrace& trace, bool separate_kinds) {
    options.controller.separate_kinds = separate_kinds;
    const auto result = Replay(trace, options);
    REQUIRE(result.ok());
    return result->figures;
  };
  const auto separate = figures(*with, true), joint = figures(*with, false);
  const auto plain = figures(*without, true);
  for (size_t i = 0; i < plain.size(); ++i) {
    CAPTURE(plain[i].policy);
    CHECK(joint[i].total_cost == plain[i].total_cost);
    CHECK(joint[i].copies_per_layer_step == plain[i].copies_per_layer_step);
  }
  CHECK(separate[0].mean_imbalance == plain[0].mean_imbalance);
  // A controller that is told the kinds by hand; plans of the last step are not charged.
  const auto controller = Make({.policy = "regret", .rho = 0.1, .min_steps_between = 0});
  size_t copies = 0;
  for (int64_t step = 0; step + 1 < kSteps; ++step) {
    const std::span<const int32_t> counts = with->step(step);
    const TokenKind kind = step % 8 < 6 ? TokenKind::kDecode : TokenKind::kPrefill;
    controller->OnStep(step, StepCounts::Of(kind, kStepTokens, counts));
    Decision why;
    const auto plan = controller->Decide(step + 1, /*force=*/false, &why);
    if (!plan.has_value()) continue;
    copies += plan->moves.size();
    controller->OnCommitted(plan->plan_id, step + 1);
  }
  CHECK(separate[1].policy == "regret");
  CHECK(separate[1].copies_per_layer_step == Approx(static_cast<double>(copies) / kSteps));
  CHECK(separate[1].copies_per_layer_step != joint[1].copies_per_layer_step);
}

}  // namespace
}  // namespace ballast
