#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "kernels/matmul_cublaslt.h"
#include "tests/gpu/device_array.h"

namespace ballast {
namespace {

using testing::DeviceArray;

constexpr int kMostRows = 300;

std::vector<float> RandomValues(size_t count, DType type, Random* random) {
  std::vector<float> values(count);
  for (float& v : values) {
    v = static_cast<float>(2 * random->Uniform() - 1);
    if (type == DType::kBF16) v = ToFloat(ToBFloat16(v));
  }
  return values;
}

std::vector<std::byte> Bytes(const std::vector<float>& values, DType type) {
  std::vector<std::byte> bytes(values.size() * SizeOf(type));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == DType::kF32) {
      reinterpret_cast<float*>(bytes.data())[i] = values[i];
    } else {
      reinterpret_cast<BFloat16*>(bytes.data())[i] = ToBFloat16(values[i]);
    }
  }
  return bytes;
}

struct Shape {
  int n, k;
};

// Products of one random w with the first rows of one random x.
class Product {
 public:
  Product(Shape shape, DType type)
      : shape_(shape),
        x_(RandomValues(static_cast<size_t>(kMostRows) * shape.k, type, &random_)),
        w_(RandomValues(static_cast<size_t>(shape.n) * shape.k, type, &random_)),
        device_x_(Bytes(x_, type)) {
    auto matmul = cuda::MakeCublasLtMatmul(shape.n, shape.k, type);
    INFO(matmul.status().message());
    REQUIRE(matmul.ok());
    matmul_ = *std::move(matmul);
    std::vector<std::byte> packed(matmul_->packed_bytes());
    REQUIRE(matmul_->Pack(w_.data(), DType::kF32, packed.data()).ok());
    device_w_ = std::make_unique<DeviceArray<std::byte>>(packed);
  }

  // SHAPES [m, n]
  std::vector<float> Run(int m) {
    const DeviceArray<float> y(static_cast<size_t>(m) * shape_.n);
    const absl::Status status =
        matmul_->Run(device_x_.data(), m, device_w_->data(), y.data(), nullptr);
    INFO(status.message());
    REQUIRE(status.ok());
    return y.Read();
  }

  // One element in fp64, and the sum of the magnitudes of its terms.
  std::pair<double, double> Exact(int row, int column) const {
    double sum = 0, size = 0;
    for (int i = 0; i < shape_.k; ++i) {
      const double term = double{x_[static_cast<size_t>(row) * shape_.k + i]} *
                          double{w_[static_cast<size_t>(column) * shape_.k + i]};
      sum += term;
      size += std::abs(term);
    }
    return {sum, size};
  }

 private:
  Random random_{11};
  const Shape shape_;
  const std::vector<float> x_, w_;
  std::unique_ptr<Matmul> matmul_;
  const DeviceArray<std::byte> device_x_;
  std::unique_ptr<DeviceArray<std::byte>> device_w_;
};

// What models have, and no multiple of anything.
constexpr Shape kShapes[] = {{2560, 2048}, {128, 2048}, {2048, 768}, {24, 40}, {33, 57}};

TEST_CASE("a product of cuBLASLt is within the rounding of fp32 of fp64", "[device][cublaslt]") {
  for (const Shape& shape : kShapes) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      CAPTURE(shape.n, shape.k, NameOf(type));
      Product product(shape, type);
      const std::vector<float> y = product.Run(kMostRows);
      for (const int row : {0, 1, 63, 128, kMostRows - 1}) {
        for (int column = 0; column < shape.n; ++column) {
          const auto [exact, size] = product.Exact(row, column);
          // 64 roundings of fp32; one of TF32's operands errs by 8192.
          const double bound = std::ldexp(size, -18);
          REQUIRE(std::abs(y[static_cast<size_t>(row) * shape.n + column] - exact) <= bound);
        }
      }
    }
  }
}

TEST_CASE("a row of a product of cuBLASLt has the same bits beside any number of rows",
          "[device][cublaslt]") {
  for (const Shape& shape : kShapes) {
    for (const DType type : {DType::kF32, DType::kBF16}) {
      Product product(shape, type);
      const std::vector<float> all = product.Run(kMostRows);
      for (const int m : {1, 2, 7, 16, 17, 64}) {
        CAPTURE(shape.n, shape.k, NameOf(type), m);
        const std::vector<float> y = product.Run(m);
        REQUIRE(std::memcmp(y.data(), all.data(), y.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST_CASE("a product of cuBLASLt without rows is none and one without columns refused",
          "[device][cublaslt][errors]") {
  const auto matmul = cuda::MakeCublasLtMatmul(8, 16, DType::kF32);
  REQUIRE(matmul.ok());
  REQUIRE((*matmul)->Run(nullptr, 0, nullptr, nullptr, nullptr).ok());
  const absl::Status refused = cuda::MakeCublasLtMatmul(0, 16, DType::kBF16).status();
  REQUIRE(refused.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(refused.message()).find("0 x 16") != std::string::npos);
}

}  // namespace
}  // namespace ballast
