// Sixteen numbers that are computed on together: one per scenario of the load.
#ifndef BALLAST_PLACEMENT_LANES_H_
#define BALLAST_PLACEMENT_LANES_H_

#include <cmath>

namespace ballast {

inline constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

inline Lanes Splat(float x) {
  return Lanes{} + x;
}
inline Lanes Smaller(const Lanes& a, const Lanes& b) {
  return a < b ? a : b;
}
inline Lanes Larger(const Lanes& a, const Lanes& b) {
  return a > b ? a : b;
}
inline Lanes SquareRoot(Lanes a) {
  for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
  return a;
}
// ORDER lanes i and i + 8 first, then i and i + 4, and so on: halves, as vector units add
inline float Sum(const Lanes& a) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  typedef float Quarter __attribute__((vector_size(kLanes / 4 * sizeof(float))));
  const Half h = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter q =
      __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_LANES_H_
