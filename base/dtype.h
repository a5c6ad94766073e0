// Element types of parameters and activations.
#ifndef BALLAST_BASE_DTYPE_H_
#define BALLAST_BASE_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>

namespace ballast {

enum class DType : uint8_t { kF32, kBF16 };

constexpr size_t SizeOf(DType type) { return type == DType::kF32 ? 4 : 2; }
constexpr const char* NameOf(DType type) { return type == DType::kF32 ? "fp32" : "bf16"; }

// A bfloat16 number as its bits: the upper half of a binary32.
struct BFloat16 {
  uint16_t bits;
};

constexpr float ToFloat(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
constexpr float ToFloat(float x) { return x; }

// Rounds to nearest, ties to even; a NaN stays a NaN.
constexpr BFloat16 ToBFloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <typename T>
constexpr T FromFloat(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return ToBFloat16(x);
  }
}

}  // namespace ballast

#endif  // BALLAST_BASE_DTYPE_H_
