#include "tests/gpu/schedules.h"

#include "tests/support/cuda_shim/emulator.h"

namespace ballast::testing {

void ForEachSchedule(const std::function<void(int round)>& body) {
  constexpr int kSchedules = 20;
  for (int round = 0; round < kSchedules; ++round) {
    cuda_shim::Reseed(static_cast<uint64_t>(round) + 1);
    body(round);
  }
}

// Of the emulator's clock, which advances by 20 with every switch.
uint64_t ShortDeadlineNs() {
  return 5'000'000;
}

uint64_t BlockingCalls() {
  return cuda_shim::BlockingCalls();
}

}  // namespace ballast::testing
