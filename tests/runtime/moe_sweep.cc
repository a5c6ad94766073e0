// Lives of MoE layers by the thousand: moe_sweep LIVES [FIRST_SEED [FLIPS]].
// Prints the seed of the first that fails, and what came of all. With FLIPS each life goes on for
// so many migrations: `moe_sweep 8 1 125` in the tsan preset commits a thousand.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "base/log.h"
#include "tests/runtime/moe_life.h"

int main(int argc, char** argv) {
  using ballast::testing::MoeLifeOutcome;
  if (argc < 2 || argc > 4 || std::atoll(argv[1]) < 1) {
    std::fprintf(stderr, "usage: moe_sweep LIVES [FIRST_SEED [FLIPS]]\n");
    return 2;
  }
  ballast::SetLogLevel(ballast::LogLevel::kOff);  // plans that must fail are reported by each rank
  const auto count = static_cast<uint64_t>(std::atoll(argv[1]));
  const auto first = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
  const int64_t flips = argc > 3 ? std::atoll(argv[3]) : -1;
  MoeLifeOutcome all;
  std::map<ballast::SplitMode, int64_t> lives;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const MoeLifeOutcome one = ballast::testing::LiveMoe(seed, flips);
    if (!one.failure.empty()) {
      std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), one.failure.c_str());
      return 1;
    }
    ++lives[one.split];
    all.steps += one.steps;
    all.flips += one.flips;
    all.aborts += one.aborts;
    all.copies += one.copies;
    all.rows += one.rows;
    all.differing_bits += one.differing_bits;
  }
  const auto n = [](int64_t value) { return static_cast<long long>(value); };
  for (const auto& [split, number] : lives) {
    std::printf("%s: %lld lives, ", NameOf(split), n(number));
  }
  std::printf(
      "%lld steps, %lld flips, %lld aborts, %lld copies moved, %lld tokens compared, %lld "
      "differing bits\n",
      n(all.steps), n(all.flips), n(all.aborts), n(all.copies), n(all.rows), n(all.differing_bits));
  return 0;
}
