// Checks the full plan on as many random instances as asked for (ctest runs a sample of them):
//   full_plan_sweep [instances=100000] [seed=1]
#include <cstdlib>
#include <iostream>

#include "tests/placement/full_plan_check.h"

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 100000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::string broken = ballast::testing::CheckWindows(seed, rounds);
  std::cout << (broken.empty() ? "all " + std::to_string(rounds) + " instances balanced" : broken)
            << "\n";
  return broken.empty() && rounds > 0 ? 0 : 1;
}
