// Random numbers that are the same on every platform and compiler.
#ifndef BALLAST_BASE_RANDOM_H_
#define BALLAST_BASE_RANDOM_H_

#include <cstdint>

namespace ballast {

// A strong 64-bit mixing function (the finaliser of splitmix64).
constexpr uint64_t Mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Counter-based: the number depends on (seed, counter) alone, never on what was drawn before.
constexpr uint64_t RandomBits(uint64_t seed, uint64_t counter) {
  return Mix64(Mix64(seed + 0x9e3779b97f4a7c15ull) ^ Mix64(counter * 0xd1b54a32d192ed03ull + 1));
}

// Uniform in [0, 1) with 53 bits.
constexpr double RandomUniform(uint64_t seed, uint64_t counter) {
  return static_cast<double>(RandomBits(seed, counter) >> 11) * 0x1.0p-53;
}

// A sequence of random numbers from one seed.
class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}

  uint64_t Next() { return RandomBits(seed_, counter_++); }
  double Uniform() { return RandomUniform(seed_, counter_++); }

  // Uniform in [0, n) (by multiplication; bias below 2^-32 for n < 2^32). REQUIRES 0 < n < 2^32.
  uint32_t Below(uint32_t n) {
    return static_cast<uint32_t>(((Next() >> 32) * static_cast<uint64_t>(n)) >> 32);
  }

 private:
  uint64_t seed_;
  uint64_t counter_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_BASE_RANDOM_H_
