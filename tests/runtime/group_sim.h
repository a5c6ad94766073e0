#ifndef BALLAST_TESTS_RUNTIME_GROUP_SIM_H_
#define BALLAST_TESTS_RUNTIME_GROUP_SIM_H_

#include <cstdint>
#include <string>

namespace ballast::testing {

// What one simulated life of a server came to.
struct SimOutcome {
  std::string failure;  // empty: every invariant held
  int64_t steps = 0;    // of rank 0, with tokens
  int64_t flips = 0, aborts = 0;
  int64_t deaths = 0, leaves = 0, returns = 0;
  int64_t regroupings = 0, reloads = 0;
  int64_t commits_by_regrouping = 0;  // plans that were in force on some ranks only
  int64_t moved = 0;                  // requests that went on at another rank
  int64_t stops = 0;                  // deaths that show themselves by silence alone
  int64_t cuts = 0;                   // links between two ranks that broke, and cost one of them
  int64_t complaints = 0;             // of ranks that waited in vain
};

// A server of a few ranks under a simulated clock and network, all drawn from the seed: requests
// come, plans are made, copies arrive late or damaged, ranks die, stop without a word, leave and
// come back, links break, messages of different pairs overtake each other. What decides is the real
// code (GroupLeader, RequestBook, StepProtocol, Rebalancer, Regroup, Controller); what is simulated
// is what moves and keeps bytes. After some time the faults stop, and all requests must come to
// their end.
//
// It fails if a step is run under two placements, if an expert has no copy where the placement in
// force says so, if a request gets a wrong token, one twice, or none, if a rank is given up that
// lives and hears all others, or if nothing happens any more.
SimOutcome Simulate(uint64_t seed);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_RUNTIME_GROUP_SIM_H_
