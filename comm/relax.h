#ifndef BALLAST_COMM_RELAX_H_
#define BALLAST_COMM_RELAX_H_

#include <sched.h>
#include <time.h>

namespace ballast {

inline constexpr int kPollsPerLook = 64;  // at the deadline and for interruptions

// Gives the core away between polls: ranks may outnumber cores. After many fruitless polls it
// sleeps.
inline void Relax(int polls) {
  constexpr int kPollsBeforeSleep = 20'000;
  if (polls < kPollsBeforeSleep) {
    sched_yield();
  } else {
    const timespec pause{0, 50'000};
    nanosleep(&pause, nullptr);
  }
}

}  // namespace ballast

#endif  // BALLAST_COMM_RELAX_H_
