#include "deploy/controller_flags.h"

#include <CLI/CLI.hpp>

namespace ballast {

ControllerOptions ControllerFlags::Options() const {
  ControllerOptions options;
  options.separate_kinds = windows == "separate";
  options.window_tokens = window_tokens;
  options.batch_tokens = batch_tokens;
  options.min_gain = min_gain;
  options.min_steps_between = min_steps_between;
  options.rules = rules;
  return options;
}

void AddControllerFlags(CLI::App* app, const char* group, ControllerFlags* f) {
  app->add_option("--windows", f->windows,
                  "separate: prefill and decode have windows and batches of their own, where they "
                  "can be told apart; joint: one for both")
      ->check(CLI::IsMember({"separate", "joint"}))
      ->group(group);
  app->add_option("--window-tokens", f->window_tokens,
                  "Tokens, of each kind, that a decision looks back over")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->group(group);
  app->add_option("--batch-tokens", f->batch_tokens,
                  "Policy regret: steps in a row are added up to batches of so many tokens of a "
                  "kind")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->group(group);
  app->add_option("--min-gain", f->min_gain,
                  "Policy eplb: smallest fall of a layer's imbalance (max/mean) worth moving for")
      ->check(CLI::Range(0.0, 100.0))
      ->group(group);
  app->add_option("--min-steps-between", f->min_steps_between, "Steps from one plan to the next")
      ->check(CLI::Range(0, 1 << 30))
      ->group(group);
  app->add_option("--coverage", f->rules.coverage,
                  "1: the loss of any one rank leaves each of the hottest experts, as many as "
                  "there are spare slots, a copy. Policy regret")
      ->check(CLI::Range(0, 1))
      ->group(group);
  app->add_flag("--node-local", f->rules.node_local,
                "Copies stay on the node of their expert. Policies regret, never, static")
      ->group(group);
}

}  // namespace ballast
