#include "kernels/row_moves.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {
namespace {

absl::Status CheckRows(const char* what, int32_t num_rows, int64_t row_bytes) {
  if (num_rows >= 0 && row_bytes > 0 && row_bytes % 16 == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": ", num_rows, " rows of ", row_bytes,
                   " bytes, allowed: 0 and more, of a multiple of 16 bytes"));
}

template <typename T>
void CombineRowsTyped(const CombineRowsArgs& a) {
  const size_t width = static_cast<size_t>(a.width);
  for (int t = 0; t < a.num_tokens; ++t) {
    float* const out = a.out + static_cast<size_t>(t) * width;
    std::copy_n(a.base + static_cast<size_t>(t) * width, width, out);
    for (int k = 0; k < a.top_k; ++k) {
      const size_t copy = static_cast<size_t>(t) * a.top_k + k;
      const T* const row = reinterpret_cast<const T*>(a.results) + a.index[copy] * width;
      for (size_t i = 0; i < width; ++i)
        out[i] = std::fma(a.weights[copy], ToFloat(row[i]), out[i]);
    }
  }
}

}  // namespace

absl::Status CheckGatherRows(const GatherRowsArgs& a) {
  return CheckRows("gather", a.num_rows, a.row_bytes);
}

absl::Status CheckCombineRows(const CombineRowsArgs& a) {
  BALLAST_RETURN_IF_ERROR(
      CheckRows("combine", a.num_tokens, static_cast<int64_t>(a.width * SizeOf(a.type))));
  if (a.top_k >= 1 && a.top_k <= kMostChoices) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("combine: top-k is ", a.top_k, ", allowed: 1 to ", kMostChoices));
}

namespace cpu {

absl::Status GatherRows(const GatherRowsArgs& a, Stream) {
  BALLAST_RETURN_IF_ERROR(CheckGatherRows(a));
  const size_t bytes = static_cast<size_t>(a.row_bytes);
  for (int32_t i = 0; i < a.num_rows; ++i) {
    if (a.index[i] < 0) continue;
    std::memcpy(a.out + static_cast<size_t>(i) * bytes,
                a.in + static_cast<size_t>(a.index[i]) * bytes, bytes);
  }
  return absl::OkStatus();
}

absl::Status CombineRows(const CombineRowsArgs& a, Stream) {
  BALLAST_RETURN_IF_ERROR(CheckCombineRows(a));
  if (a.type == DType::kF32) {
    CombineRowsTyped<float>(a);
  } else {
    CombineRowsTyped<BFloat16>(a);
  }
  return absl::OkStatus();
}

}  // namespace cpu
}  // namespace ballast
