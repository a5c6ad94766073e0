// Simulated lives of a server by the thousand: group_sweep COUNT [FIRST_SEED].
// Prints the seed of the first that fails, and what came of all.
#include <cstdio>
#include <cstdlib>

#include "base/log.h"
#include "tests/runtime/group_sim.h"

int main(int argc, char** argv) {
  using ballast::testing::SimOutcome;
  if (argc < 2 || argc > 3 || std::atoll(argv[1]) < 1) {
    std::fprintf(stderr, "usage: group_sweep COUNT [FIRST_SEED]\n");
    return 2;
  }
  ballast::SetLogLevel(ballast::LogLevel::kError);
  const auto count = static_cast<uint64_t>(std::atoll(argv[1]));
  const auto first = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
  SimOutcome all;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const SimOutcome one = ballast::testing::Simulate(seed);
    if (!one.failure.empty()) {
      std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), one.failure.c_str());
      return 1;
    }
    all.steps += one.steps;
    all.flips += one.flips;
    all.aborts += one.aborts;
    all.deaths += one.deaths;
    all.leaves += one.leaves;
    all.returns += one.returns;
    all.regroupings += one.regroupings;
    all.reloads += one.reloads;
    all.commits_by_regrouping += one.commits_by_regrouping;
    all.moved += one.moved;
    all.stops += one.stops;
    all.cuts += one.cuts;
    all.complaints += one.complaints;
  }
  const auto n = [](int64_t value) { return static_cast<long long>(value); };
  std::printf(
      "%lld schedules, 0 failures: %lld steps, %lld flips, %lld aborts, %lld deaths, %lld leaves, "
      "%lld returns, %lld regroupings (%lld of them put a plan in force), %lld reloads, %lld "
      "requests moved, %lld deaths without a word, %lld cut links, %lld complaints\n",
      n(static_cast<int64_t>(count)), n(all.steps), n(all.flips), n(all.aborts), n(all.deaths),
      n(all.leaves), n(all.returns), n(all.regroupings), n(all.commits_by_regrouping),
      n(all.reloads), n(all.moved), n(all.stops), n(all.cuts), n(all.complaints));
  return 0;
}
