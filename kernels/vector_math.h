// Sums and functions whose bits depend on their operands alone: fixed lanes, fixed order, one form
// of every expression. The CPU kernels are built from these.
#ifndef BALLAST_KERNELS_VECTOR_MATH_H_
#define BALLAST_KERNELS_VECTOR_MATH_H_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"

namespace ballast::cpu {

inline constexpr int kLanes = 16;

// Adds the lanes as a binary tree.
inline float SumLanes(const float (&lane)[kLanes]) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = lane[i] + lane[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// sum over i of a[i] * b[i]: lane i mod 16 by fused multiply-add, then SumLanes.
template <typename A, typename B>
inline float Dot(const A* a, const B* b, int n) {
  float lane[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lane[j] = std::fma(ToFloat(a[i + j]), ToFloat(b[i + j]), lane[j]);
    }
  }
  for (; i < n; ++i) lane[i % kLanes] = std::fma(ToFloat(a[i]), ToFloat(b[i]), lane[i % kLanes]);
  return SumLanes(lane);
}

// e^x within 2 ulp for |x| < 87; 0 below -87.5, and never more than e^88.5 (finite). Branch-free,
// so that loops over it vectorise. SOURCE the range reduction and polynomial of Cephes' expf (S.
// Moshier), fused.
inline float Exp(float x) {
  const float clamped = std::min(std::max(x, -87.5f), 88.5f);
  const float shifted = std::fma(clamped, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23
  const float k = shifted - 12582912.0f;
  float r = std::fma(k, -0.693359375f, clamped);
  r = std::fma(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1.0f;
  // The low bits of `shifted` are the integer k; 2^k goes into the exponent in two halves, so that
  // neither overflows.
  const int32_t ki = std::bit_cast<int32_t>(shifted) - 0x4b400000;
  const int32_t half = ki >> 1;
  const float scale_a = std::bit_cast<float>((half + 127) << 23);
  const float scale_b = std::bit_cast<float>((ki - half + 127) << 23);
  const float y = p * scale_a * scale_b;
  return x < -87.5f ? 0.0f : y;
}

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }
inline float Silu(float x) { return x * Sigmoid(x); }

}  // namespace ballast::cpu

#endif  // BALLAST_KERNELS_VECTOR_MATH_H_
