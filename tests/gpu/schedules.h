// Where a test of kernels runs: on a device, or in the emulator under a schedule per round.
#ifndef BALLAST_TESTS_GPU_SCHEDULES_H_
#define BALLAST_TESTS_GPU_SCHEDULES_H_

#include <cstdint>
#include <functional>

namespace ballast::testing {

// Runs the body once per schedule; `round` counts them, for data of its own each time.
void ForEachSchedule(const std::function<void(int round)>& body);

// A deadline that tests wait out: long for whoever is there, short for who waits in vain.
uint64_t ShortDeadlineNs();

// How many calls of this process, so far, have waited for the device or taken what a launch needs
// of the driver: allocations, copies of memory that is not pinned, synchronisations. On a device
// nobody counts them: 0.
uint64_t BlockingCalls();

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_SCHEDULES_H_
