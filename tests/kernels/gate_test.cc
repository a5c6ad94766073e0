#include "kernels/gate.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/random.h"

namespace ballast {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Chosen {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<int32_t> histogram;
};

Chosen RunGate(const GateRule& rule, const std::vector<float>& logits,
               const std::vector<float>& bias, int32_t num_prefill = 0) {
  const size_t experts = static_cast<size_t>(rule.num_experts);
  const int32_t tokens = static_cast<int32_t>(logits.size() / experts);
  Chosen chosen;
  chosen.ids.resize(static_cast<size_t>(tokens) * rule.top_k);
  chosen.weights.resize(chosen.ids.size());
  chosen.histogram.assign(2 * experts, -7);
  const absl::Status status = cpu::Gate({.rule = rule,
                                         .num_tokens = tokens,
                                         .num_prefill = num_prefill,
                                         .logits = logits,
                                         .bias = bias,
                                         .ids = chosen.ids,
                                         .weights = chosen.weights,
                                         .histogram = chosen.histogram},
                                        nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  return chosen;
}

// The rule by definition, in fp64, by sorting.
struct Fp64Gate {
  std::vector<int32_t> ids;
  std::vector<double> weights;
  double margin = 1;  // smallest difference that decided between experts or groups
};

Fp64Gate ReferenceToken(const GateRule& rule, const float* logits, const std::vector<float>& bias) {
  const size_t experts = static_cast<size_t>(rule.num_experts);
  std::vector<double> score(experts), choice(experts);
  for (size_t e = 0; e < experts; ++e) {
    const bool sound = !std::isnan(logits[e]);
    score[e] = sound ? 1.0 / (1.0 + std::exp(-double{logits[e]})) : 0.0;
    choice[e] = sound ? score[e] + (bias.empty() ? 0.0 : double{bias[e]}) : -kInf;
  }
  Fp64Gate out;
  const auto better = [](const std::vector<double>& value) {
    return [&value](size_t a, size_t b) {
      return value[a] != value[b] ? value[a] > value[b] : a < b;
    };
  };
  const size_t groups = static_cast<size_t>(rule.num_groups), size = experts / groups;
  std::vector<double> group_score(groups);
  for (size_t g = 0; g < groups; ++g) {
    std::vector<double> own(choice.begin() + static_cast<std::ptrdiff_t>(g * size),
                            choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::sort(own.rbegin(), own.rend());
    group_score[g] = size > 1 ? own[0] + own[1] : own[0];
  }
  std::vector<size_t> group_order(groups);
  std::iota(group_order.begin(), group_order.end(), 0);
  std::sort(group_order.begin(), group_order.end(), better(group_score));
  std::vector<size_t> candidates;
  for (int32_t i = 0; i < rule.top_groups; ++i) {
    for (size_t e = 0; e < size; ++e) candidates.push_back(group_order[i] * size + e);
  }
  if (rule.top_groups < rule.num_groups) {
    out.margin = group_score[group_order[rule.top_groups - 1]] -
                 group_score[group_order[rule.top_groups]];
  }
  std::sort(candidates.begin(), candidates.end(), better(choice));
  double sum = 0;
  for (int32_t k = 0; k < rule.top_k; ++k) {
    out.ids.push_back(static_cast<int32_t>(candidates[k]));
    sum += score[candidates[k]];
    if (k + 1u < candidates.size()) {
      out.margin = std::min(out.margin, choice[candidates[k]] - choice[candidates[k + 1]]);
    }
  }
  for (int32_t id : out.ids) {
    out.weights.push_back(score[id] / (rule.renormalise ? sum + 1e-20 : 1.0) * rule.scale);
  }
  return out;
}

TEST_CASE("the gate agrees with its definition in fp64", "[kernels][property]") {
  const GateRule rules[] = {
      {.num_experts = 32, .top_k = 4},
      {.num_experts = 512, .top_k = 32, .renormalise = false, .scale = 2.5f},
      {.num_experts = 261, .top_k = 8, .scale = 2.5f},
      {.num_experts = 256, .top_k = 8, .num_groups = 8, .top_groups = 4, .scale = 2.5f},
      {.num_experts = 90, .top_k = 6, .num_groups = 15, .top_groups = 3},
      {.num_experts = 12, .top_k = 2, .num_groups = 12, .top_groups = 5},
      {.num_experts = 7, .top_k = 7},
      {.num_experts = 1, .top_k = 1},
  };
  Random random(2024);
  int compared = 0;
  for (const GateRule& rule : rules) {
    const size_t experts = static_cast<size_t>(rule.num_experts);
    for (int batch = 0; batch < 20; ++batch) {
      const double spread = batch % 2 == 0 ? 1.5 : 8.0;
      std::vector<float> logits(experts * 16), bias(batch % 3 == 0 ? 0 : experts);
      for (float& x : logits) x = static_cast<float>(spread * (2 * random.Uniform() - 1));
      for (float& x : bias) x = static_cast<float>(2 * random.Uniform() - 1.5);
      const int32_t num_prefill = batch % 17;
      const Chosen chosen = RunGate(rule, logits, bias, num_prefill);
      std::vector<int32_t> histogram(2 * experts, 0);
      for (size_t t = 0; t < 16; ++t) {
        CAPTURE(rule.num_experts, batch, t);
        const Fp64Gate want = ReferenceToken(rule, &logits[t * experts], bias);
        const size_t first = t + static_cast<size_t>(num_prefill) >= 16 ? 0 : experts;
        for (int32_t k = 0; k < rule.top_k; ++k)
          ++histogram[first + chosen.ids[t * rule.top_k + k]];
        // Rounding may decide where fp64 sees a difference that fp32 does not.
        if (want.margin < 4e-6) continue;
        ++compared;
        for (int32_t k = 0; k < rule.top_k; ++k) {
          REQUIRE(chosen.ids[t * rule.top_k + k] == want.ids[k]);
          REQUIRE(chosen.weights[t * rule.top_k + k] ==
                  Approx(want.weights[k]).epsilon(4e-6).margin(1e-12));
        }
      }
      REQUIRE(chosen.histogram == histogram);
    }
  }
  REQUIRE(compared > 1500);
}

TEST_CASE("ties go to the lower expert and the lower group", "[kernels][unit]") {
  const std::vector<float> equal(12, 0.25f);
  REQUIRE(RunGate({.num_experts = 12, .top_k = 4}, equal, {}).ids ==
          std::vector<int32_t>{0, 1, 2, 3});
  REQUIRE(RunGate({.num_experts = 12, .top_k = 4, .num_groups = 4, .top_groups = 2}, equal, {})
              .ids == std::vector<int32_t>{0, 1, 2, 3});
  std::vector<float> two = equal;
  two[7] = two[11] = 0.5f;
  REQUIRE(RunGate({.num_experts = 12, .top_k = 4}, two, {}).ids ==
          std::vector<int32_t>{7, 11, 0, 1});
  // Groups 2 and 3 lead with equal scores; inside them the lower id.
  REQUIRE(RunGate({.num_experts = 12, .top_k = 4, .num_groups = 4, .top_groups = 2}, two, {})
              .ids == std::vector<int32_t>{7, 11, 6, 8});
}

TEST_CASE("the bias chooses and never weighs", "[kernels][unit]") {
  const std::vector<float> logits = {0.0f, 0.0f, 0.0f, 0.0f};
  const Chosen chosen = RunGate({.num_experts = 4, .top_k = 2}, logits, {-900, 40, -900, 700});
  REQUIRE(chosen.ids == std::vector<int32_t>{3, 1});
  REQUIRE(chosen.weights == std::vector<float>{0.5f, 0.5f});
}

TEST_CASE("a near tie in fp32 is decided in fp32", "[kernels][unit]") {
  // Differs from its neighbour in the last bits only: rounded to bf16 the two would tie.
  std::vector<float> bias = {0.5f, 0.5f + 0x1.0p-22f, 0.5f};
  REQUIRE(RunGate({.num_experts = 3, .top_k = 1}, {0, 0, 0}, bias).ids ==
          std::vector<int32_t>{1});
}

TEST_CASE("logits that are no numbers have a defined outcome", "[kernels][unit]") {
  const GateRule rule{.num_experts = 4, .top_k = 2};
  const Chosen one = RunGate(rule, {kNan, 0.0f, kInf, -kInf}, {});
  REQUIRE(one.ids == std::vector<int32_t>{2, 1});
  REQUIRE(one.weights[0] == Approx(2.0 / 3));
  REQUIRE(RunGate(rule, {kNan, kNan, kNan, kNan}, {}).ids == std::vector<int32_t>{0, 1});
  REQUIRE(RunGate(rule, {kNan, kNan, kNan, kNan}, {}).weights == std::vector<float>{0, 0});
  REQUIRE(RunGate(rule, {-kInf, -kInf, -kInf, -kInf}, {}).ids == std::vector<int32_t>{0, 1});
  REQUIRE(RunGate(rule, {kInf, kInf, kInf, kInf}, {}).weights == std::vector<float>{0.5f, 0.5f});
  // A NaN is chosen last, with no weight.
  const Chosen last = RunGate({.num_experts = 3, .top_k = 3}, {kNan, -3.0f, 3.0f}, {});
  REQUIRE(last.ids == std::vector<int32_t>{2, 1, 0});
  REQUIRE(last.weights[2] == 0.0f);
}

TEST_CASE("no expert outside the best groups is chosen even when numbers run out",
          "[kernels][unit]") {
  // Groups 1 and 2 lead, and have seven sound experts for eight places.
  std::vector<float> logits(16, -2.0f);
  for (size_t e = 4; e < 12; ++e) logits[e] = 2.0f;
  logits[9] = kNan;
  const Chosen chosen = RunGate(
      {.num_experts = 16, .top_k = 8, .num_groups = 4, .top_groups = 2}, logits, {});
  REQUIRE(chosen.ids == std::vector<int32_t>{4, 5, 6, 7, 8, 10, 11, 9});
}

TEST_CASE("no tokens give empty histograms", "[kernels][unit]") {
  const Chosen chosen = RunGate({.num_experts = 5, .top_k = 2}, {}, {});
  REQUIRE(chosen.histogram == std::vector<int32_t>(10, 0));
}

TEST_CASE("rules and arrays that do not fit are refused", "[kernels][errors]") {
  std::vector<float> logits(8), weights(2);
  std::vector<int32_t> ids(2), histogram(16);
  const auto run = [&](const GateRule& rule, int32_t num_prefill = 0) {
    return cpu::Gate({.rule = rule,
                      .num_tokens = 1,
                      .num_prefill = num_prefill,
                      .logits = logits,
                      .bias = {},
                      .ids = ids,
                      .weights = weights,
                      .histogram = histogram},
                     nullptr);
  };
  REQUIRE(run({.num_experts = 8, .top_k = 2}).ok());
  REQUIRE(run({.num_experts = 8, .top_k = 2}, 1).ok());
  for (int32_t num_prefill : {-1, 2}) {
    REQUIRE(absl::IsInvalidArgument(run({.num_experts = 8, .top_k = 2}, num_prefill)));
  }
  for (const GateRule& bad : {GateRule{.num_experts = 8, .top_k = 9},
                              GateRule{.num_experts = 8, .top_k = 2, .num_groups = 3},
                              GateRule{.num_experts = 8, .top_k = 2, .num_groups = 4,
                                       .top_groups = 5},
                              GateRule{.num_experts = 8, .top_k = 2, .num_groups = 8,
                                       .top_groups = 1},
                              GateRule{.num_experts = 8, .top_k = 3},
                              GateRule{.num_experts = 9, .top_k = 2},
                              GateRule{.num_experts = 4096, .top_k = 2}}) {
    CAPTURE(bad.num_experts, bad.top_k, bad.num_groups);
    REQUIRE(run(bad).code() == absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace ballast
