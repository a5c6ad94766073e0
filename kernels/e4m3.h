// The 8-bit floats of the experts' tensor path: sign, 4 bits of exponent, 3 of mantissa; no
// infinity, 448 is the largest.
#ifndef BALLAST_KERNELS_E4M3_H_
#define BALLAST_KERNELS_E4M3_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace ballast {

inline constexpr float kLargestE4M3 = 448.0f;

inline float FromE4M3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::bit_cast<float>(0x7fc00000u);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even; what is larger than 448 becomes 448; NaN is 0x7f.
inline uint8_t ToE4M3(float x) {
  if (std::isnan(x)) return 0x7f;
  const int sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= kLargestE4M3) return static_cast<uint8_t>(sign | 0x7e);
  const int biased = static_cast<int>(std::bit_cast<uint32_t>(magnitude) >> 23);
  const int exponent = std::max(biased - 127, -6);  // below: subnormal
  // Steps of 2^(exponent - 3). 8 to 16 of them, or fewer where subnormal; 16 carry over.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return static_cast<uint8_t>(sign | (((exponent + 6) << 3) + steps));
}

}  // namespace ballast

#endif  // BALLAST_KERNELS_E4M3_H_
