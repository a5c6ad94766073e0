#include <cstring>

#include "kernels/matmul_row_major.h"
#include "kernels/vector_math.h"

namespace ballast {
namespace {

template <typename From, typename To>
void Convert(const From* from, To* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = FromFloat<To>(ToFloat(from[i]));
}

}  // namespace

size_t RowMajorMatmul::packed_bytes() const {
  return static_cast<size_t>(n()) * static_cast<size_t>(k()) * SizeOf(dtype());
}

absl::Status RowMajorMatmul::Pack(const void* w, DType w_type, std::byte* packed) const {
  const size_t count = static_cast<size_t>(n()) * static_cast<size_t>(k());
  if (w_type == dtype()) {
    std::memcpy(packed, w, packed_bytes());
  } else if (dtype() == DType::kF32) {
    Convert(static_cast<const BFloat16*>(w), reinterpret_cast<float*>(packed), count);
  } else {
    Convert(static_cast<const float*>(w), reinterpret_cast<BFloat16*>(packed), count);
  }
  return absl::OkStatus();
}

namespace cpu {
namespace {

class PlainMatmul : public RowMajorMatmul {
 public:
  PlainMatmul(int n, int k, DType dtype) : RowMajorMatmul(n, k, dtype) {}

  absl::Status Run(const void* x, int m, const std::byte* packed, float* y, Stream) override {
    if (dtype() == DType::kF32) {
      Multiply(static_cast<const float*>(x), m, reinterpret_cast<const float*>(packed), y);
    } else {
      Multiply(static_cast<const BFloat16*>(x), m, reinterpret_cast<const BFloat16*>(packed), y);
    }
    return absl::OkStatus();
  }

 private:
  template <typename T>
  void Multiply(const T* x, int m, const T* w, float* y) const {
    for (int row = 0; row < m; ++row) {
      for (int col = 0; col < n(); ++col) {
        y[static_cast<size_t>(row) * n() + col] =
            Dot(x + static_cast<size_t>(row) * k(), w + static_cast<size_t>(col) * k(), k());
      }
    }
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<Matmul>> MakePlainMatmul(int n, int k, DType dtype) {
  return std::make_unique<PlainMatmul>(n, k, dtype);
}

}  // namespace cpu
}  // namespace ballast
