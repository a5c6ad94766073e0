#include "deploy/idle_flags.h"

#include <catch2/catch.hpp>

namespace ballast {
namespace {

// The flags that are called idle under a policy, in order, without the reasons.
std::vector<std::string> Idle(ServeFlags flags, const std::string& policy) {
  flags.policy = policy;
  const auto made = MakePolicy(policy);
  REQUIRE(made.ok());
  std::vector<std::string> names;
  for (const std::string& sentence : IdleFlags(flags, **made)) {
    names.push_back(sentence.substr(0, sentence.find(' ')));
  }
  return names;
}

// SOURCE TRT-LLM#18626: an option was silently ignored unless others were set as well.
TEST_CASE("flags without an effect are named", "[deploy]") {
  using Names = std::vector<std::string>;
  for (const char* policy : {"eplb", "eplb-interval:8", "regret"}) {
    CHECK(Idle({}, policy) == Names{});
  }
  ServeFlags all;
  all.rho = 0.5;
  all.controller = {
      .window_tokens = 1, .batch_tokens = 7, .min_gain = 0.5, .min_steps_between = 9, .rules = {}};
  CHECK(Idle(all, "regret") == Names{"--min-gain"});
  CHECK(Idle(all, "eplb") == Names{"--rho", "--batch-tokens"});
  CHECK(Idle(all, "eplb-interval:8") ==
        Names{"--rho", "--batch-tokens", "--min-gain", "--min-steps-between", "--window-tokens"});

  ServeFlags apart;
  apart.state_every_s = 5;
  apart.metrics_port = 1;
  CHECK(Idle(apart, "regret") == Names{"--state-every-s"});
  apart.no_metrics = true;
  apart.state_file = "state.json";
  CHECK(Idle(apart, "regret") == Names{"--metrics-port"});

  const auto eplb = MakePolicy("eplb");
  REQUIRE(eplb.ok());
  all.policy = "eplb";
  CHECK(IdleFlags(all, **eplb).front() ==
        "--rho has no effect with --policy eplb, which does not weigh what a move costs");
}

}  // namespace
}  // namespace ballast
