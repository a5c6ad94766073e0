// Plans that are cut into layers (ControllerOptions::layers_per_plan).
#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>

#include "placement/controller.h"

namespace ballast {
namespace {

constexpr int32_t kLayers = 5, kExperts = 8;
constexpr int64_t kTokens = 8000;

// Four ranks with a spare slot each. In layer l one expert gets more than its share, the more so
// the higher l.
std::unique_ptr<Controller> Loaded(ControllerOptions options) {
  options.min_steps_between = 1000;
  auto initial =
      Placement::Contiguous(kLayers, kExperts, Topology::Uniform(4, 3), /*fill_spare=*/false);
  REQUIRE(initial.ok());
  auto made = Controller::Create(options, *std::move(initial));
  INFO(made.status().message());
  REQUIRE(made.ok());
  std::unique_ptr<Controller> controller = *std::move(made);
  std::vector<int32_t> counts;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    const int32_t hot = 3000 + 1000 * layer;
    for (int32_t e = 0; e < kExperts; ++e) {
      counts.push_back(e == layer ? hot : (8000 - hot) / (kExperts - 1));
    }
  }
  for (int64_t step = 0; step < 40; ++step) {
    controller->OnStep(step, StepCounts::Of(TokenKind::kDecode, kTokens, counts));
  }
  return controller;
}

std::optional<MigrationPlan> Decide(Controller* controller, int64_t step, Decision expected) {
  Decision why = Decision::kNone;
  auto plan = controller->Decide(step, /*force=*/false, &why);
  REQUIRE(NameOf(why) == NameOf(expected));
  REQUIRE(plan.has_value() == (expected == Decision::kPlanned));
  return plan;
}

TEST_CASE("a large plan is committed in parts without waiting in between",
          "[placement][controller]") {
  const auto at_once = Loaded({});
  const auto all = Decide(at_once.get(), 40, Decision::kPlanned);
  REQUIRE(all->rows.size() == kLayers);
  for (const int32_t most : {1, 2, 3, 5}) {
    CAPTURE(most);
    const auto controller = Loaded({.layers_per_plan = most});
    std::vector<int32_t> layers;
    while (layers.size() < kLayers) {
      const auto plan = Decide(controller.get(), 40, Decision::kPlanned);
      const size_t left = kLayers - layers.size();
      REQUIRE(plan->rows.size() == std::min<size_t>(left, most));
      REQUIRE(plan->Apply(controller->placement()).ok());
      for (const Placement::LayerRow& row : plan->rows) layers.push_back(row.layer);
      REQUIRE(controller->has_more() == (layers.size() < kLayers));
      Decide(controller.get(), 40, Decision::kInFlight);
      controller->OnCommitted(plan->plan_id, 40);
    }
    // The layers that gain most go first.
    if (most == 1) REQUIRE(layers == std::vector<int32_t>{4, 3, 2, 1, 0});
    REQUIRE(controller->placement().fingerprint() == all->target_fingerprint);
    // That was all of it: from here on the wait between plans holds.
    Decide(controller.get(), 1039, Decision::kTooSoon);
  }
}

TEST_CASE("the rest of a large plan ends with an abort and with a departure",
          "[placement][controller]") {
  for (const bool abort : {true, false}) {
    CAPTURE(abort);
    const auto controller = Loaded({.layers_per_plan = 2});
    const auto first = Decide(controller.get(), 40, Decision::kPlanned);
    if (abort) {
      controller->OnAborted(first->plan_id, 40);
    } else {
      controller->OnCommitted(first->plan_id, 40);
      REQUIRE(controller->has_more());
      // Rank 3 goes, two layers at a time.
      int32_t plans = 0;
      while (const auto plan = controller->Vacate(40, 3)) {
        REQUIRE(plan->rows.size() <= 2);
        controller->OnCommitted(plan->plan_id, 40);
        REQUIRE(++plans <= kLayers);
      }
      REQUIRE(plans >= 2);
    }
    REQUIRE_FALSE(controller->has_more());
    Decide(controller.get(), 41, Decision::kTooSoon);
  }
}

TEST_CASE("what credit does not last for is decided anew", "[placement][controller][budget]") {
  const auto controller = Loaded({.layers_per_plan = 1, .copy_burst = 12.0});
  int32_t plans = 0;
  Decision why = Decision::kNone;
  while (const auto plan = controller->Decide(40, /*force=*/false, &why)) {
    controller->OnCommitted(plan->plan_id, 40);
    REQUIRE(++plans < kLayers);
  }
  REQUIRE(plans >= 1);
  REQUIRE(NameOf(why) == NameOf(Decision::kOverBudget));
  REQUIRE_FALSE(controller->has_more());
  Decide(controller.get(), 41, Decision::kTooSoon);
}

TEST_CASE("a negative number of layers is refused", "[placement][controller][errors]") {
  auto initial = Placement::Contiguous(1, 2, Topology::Uniform(2, 2), /*fill_spare=*/false);
  const auto made = Controller::Create({.layers_per_plan = -1}, *initial);
  REQUIRE(made.status().message() == "layers_per_plan is -1; it must be at least 0");
}

}  // namespace
}  // namespace ballast
