#include "kernels/grouped_mlp_fp8.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/status.h"
#include "kernels/e4m3.h"

namespace ballast {
namespace {

constexpr int32_t kMultiple = 16;  // rows of values are copied in units of 16 bytes
constexpr int32_t kRun = 8;        // rows of gate, then as many of up

size_t Elements(const Fp8ExpertShape& s) {
  return static_cast<size_t>(s.inter) * static_cast<size_t>(s.hidden);
}
int32_t Blocks(int32_t n) {
  return (n + kScaleBlock - 1) / kScaleBlock;
}
// Of any of the three matrices: they have the same two sizes.
size_t ScaleBytes(const Fp8ExpertShape& s) {
  return static_cast<size_t>(Blocks(s.inter)) * static_cast<size_t>(Blocks(s.hidden)) *
         sizeof(float);
}

absl::Status CheckMultiple(const char* name, int32_t size) {
  if (size > 0 && size % kMultiple == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("grouped mlp fp8: ", name, " is ", size,
                                                 ", allowed: positive multiples of ", kMultiple));
}

absl::Status CheckShape(const Fp8ExpertShape& shape) {
  BALLAST_RETURN_IF_ERROR(CheckMultiple("hidden", shape.hidden));
  return CheckMultiple("inter", shape.inter);
}

// Magnitudes in the order of their bits, so that a NaN is the largest.
uint32_t Magnitude(float x) {
  return std::bit_cast<uint32_t>(x) & 0x7fffffffu;
}
float ScaleOf(uint32_t largest) {
  return largest == 0 ? 1.0f : std::bit_cast<float>(largest) / kLargestE4M3;
}

}  // namespace

size_t Fp8ExpertShape::down_offset() const {
  return 2 * Elements(*this);
}
size_t Fp8ExpertShape::scales_offset() const {
  return 3 * Elements(*this);
}
size_t Fp8ExpertShape::down_scales_offset() const {
  return scales_offset() + 2 * ScaleBytes(*this);
}
size_t Fp8ExpertShape::packed_bytes() const {
  return RoundUp(scales_offset() + 3 * ScaleBytes(*this), kMultiple);
}

void QuantiseMatrix(const float* w, int32_t rows, int32_t columns, uint8_t* values, float* scales) {
  for (int32_t r0 = 0; r0 < rows; r0 += kScaleBlock) {
    for (int32_t c0 = 0; c0 < columns; c0 += kScaleBlock) {
      const auto for_block = [&](const auto& body) {
        for (int32_t r = r0; r < std::min(rows, r0 + kScaleBlock); ++r) {
          for (int32_t c = c0; c < std::min(columns, c0 + kScaleBlock); ++c) {
            body(static_cast<size_t>(r) * static_cast<size_t>(columns) + static_cast<size_t>(c));
          }
        }
      };
      uint32_t largest = 0;
      for_block([&](size_t i) { largest = std::max(largest, Magnitude(w[i])); });
      const float scale = ScaleOf(largest);
      for_block([&](size_t i) { values[i] = ToE4M3(w[i] / scale); });
      scales[r0 / kScaleBlock * Blocks(columns) + c0 / kScaleBlock] = scale;
    }
  }
}

absl::Status PackFp8Expert(const Fp8ExpertShape& shape, const Fp8Matrix& gate, const Fp8Matrix& up,
                           const Fp8Matrix& down, std::byte* packed) {
  BALLAST_RETURN_IF_ERROR(CheckShape(shape));
  std::memset(packed, 0, shape.packed_bytes());
  const auto hidden = static_cast<size_t>(shape.hidden);
  for (int32_t row = 0; row < 2 * shape.inter; ++row) {
    const auto from = static_cast<size_t>(row / (2 * kRun) * kRun + row % kRun);
    const Fp8Matrix& part = row / kRun % 2 == 0 ? gate : up;
    std::memcpy(packed + static_cast<size_t>(row) * hidden, part.values + from * hidden, hidden);
  }
  std::memcpy(packed + shape.down_offset(), down.values, Elements(shape));
  const size_t bytes = ScaleBytes(shape);
  std::memcpy(packed + shape.scales_offset(), gate.scales, bytes);
  std::memcpy(packed + shape.scales_offset() + bytes, up.scales, bytes);
  std::memcpy(packed + shape.down_scales_offset(), down.scales, bytes);
  return absl::OkStatus();
}

absl::Status CheckQuantiseRows(const QuantiseRowsArgs& a) {
  BALLAST_RETURN_IF_ERROR(CheckMultiple("width", a.width));
  BALLAST_RETURN_IF_ERROR(CheckAligned("x", a.x));
  return CheckAligned("values", a.values);
}

absl::Status CheckFp8Mlp(const Fp8MlpArgs& a) {
  BALLAST_RETURN_IF_ERROR(CheckShape(a.shape));
  BALLAST_RETURN_IF_ERROR(CheckExpertGroups(a.groups, a.shape.packed_bytes()));
  for (const auto& [name, at] : {std::pair<const char*, const void*>{"x", a.x},
                                 {"activated", a.activated},
                                 {"values", a.values},
                                 {"scales", a.scales},
                                 {"y", a.y}}) {
    BALLAST_RETURN_IF_ERROR(CheckAligned(name, at));
  }
  return absl::OkStatus();
}

namespace cpu {

absl::Status QuantiseRows(const QuantiseRowsArgs& a, Stream) {
  BALLAST_RETURN_IF_ERROR(CheckQuantiseRows(a));
  const auto* x = static_cast<const BFloat16*>(a.x);
  for (int32_t g = 0; g < a.groups.num_groups; ++g) {
    for (int32_t i = 0; i < a.groups.rows[g]; ++i) {
      const auto row = static_cast<size_t>(a.groups.begin[g] + i);
      const size_t first = row * static_cast<size_t>(a.width);
      for (int32_t c0 = 0; c0 < a.width; c0 += kScaleBlock) {
        const size_t begin = first + static_cast<size_t>(c0);
        const size_t end = first + static_cast<size_t>(std::min(a.width, c0 + kScaleBlock));
        uint32_t largest = 0;
        for (size_t at = begin; at < end; ++at) {
          largest = std::max(largest, Magnitude(ToFloat(x[at])));
        }
        const float scale = ScaleOf(largest);
        for (size_t at = begin; at < end; ++at) a.values[at] = ToE4M3(ToFloat(x[at]) / scale);
        const auto block = static_cast<size_t>(c0 / kScaleBlock);
        a.scales[block * static_cast<size_t>(a.groups.num_rows) + row] = scale;
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace cpu
}  // namespace ballast
