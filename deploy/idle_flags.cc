#include "deploy/idle_flags.h"

#include "absl/strings/str_cat.h"

namespace ballast {

std::vector<std::string> IdleFlags(const ServeFlags& flags, const Policy& policy) {
  const ServeFlags defaults;
  const ControllerFlags &mine = flags.controller, &usual = defaults.controller;
  std::vector<std::string> idle;
  const auto check = [&](const char* flag, bool set, bool has_effect, const std::string& why) {
    if (set && !has_effect) idle.push_back(absl::StrCat(flag, " has no effect ", why));
  };
  const std::string with_policy = "with --policy " + flags.policy;
  const bool weighs = policy.meters_itself();
  const bool has_interval = policy.interval_steps() > 0;
  const std::string no_weighing = with_policy + ", which does not weigh what a move costs";
  const std::string own_interval = with_policy + ", which plans at intervals of its own";
  check("--rho", flags.rho != defaults.rho, weighs, no_weighing);
  check("--batch-tokens", mine.batch_tokens != usual.batch_tokens, weighs, no_weighing);
  check("--min-gain", mine.min_gain != usual.min_gain, !weighs && !has_interval,
        weighs ? with_policy + ", which weighs by itself what a move gains" : own_interval);
  check("--min-steps-between", mine.min_steps_between != usual.min_steps_between, !has_interval,
        own_interval);
  check("--window-tokens", mine.window_tokens != usual.window_tokens, !has_interval, own_interval);
  check("--state-every-s", flags.state_every_s != defaults.state_every_s, !flags.state_file.empty(),
        "without --state-file");
  check("--metrics-port", flags.metrics_port != defaults.metrics_port, !flags.no_metrics,
        "with --no-metrics");
  return idle;
}

}  // namespace ballast
