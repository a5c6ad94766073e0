// Monotonic time and CPU time.
#ifndef BALLAST_BASE_CLOCK_H_
#define BALLAST_BASE_CLOCK_H_

#include <time.h>

#include <cstdint>

namespace ballast {

inline int64_t ReadClockNs(clockid_t clock) {
  timespec now{};
  clock_gettime(clock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline int64_t NowNs() { return ReadClockNs(CLOCK_MONOTONIC); }
inline int64_t ThreadCpuNs() { return ReadClockNs(CLOCK_THREAD_CPUTIME_ID); }

}  // namespace ballast

#endif  // BALLAST_BASE_CLOCK_H_
