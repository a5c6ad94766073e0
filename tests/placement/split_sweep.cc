// Checks the exact split on as many random instances as asked for (ctest runs a sample of them),
// every 50th against a maximum flow:
//   split_sweep [instances=100000] [seed=1]
#include <cstdlib>
#include <iostream>

#include "tests/placement/split_check.h"

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 100000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::string broken = ballast::testing::CheckExactSplits(seed, rounds, /*flow_every=*/50);
  std::cout << (broken.empty() ? "all " + std::to_string(rounds) + " instances proven" : broken)
            << "\n";
  return broken.empty() && rounds > 0 ? 0 : 1;
}
