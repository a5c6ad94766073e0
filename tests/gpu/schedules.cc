#include "tests/gpu/schedules.h"

namespace ballast::testing {

void ForEachSchedule(const std::function<void(int round)>& body) {
  constexpr int kRounds = 20;  // of fresh data, as many as the emulator has schedules
  for (int round = 0; round < kRounds; ++round) body(round);
}

uint64_t ShortDeadlineNs() {
  return 500'000'000;
}

uint64_t BlockingCalls() {
  return 0;
}

}  // namespace ballast::testing
