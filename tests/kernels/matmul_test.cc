#include "kernels/matmul.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/random.h"
#include "kernels/gated_mlp.h"
#include "kernels/kernel_set.h"

namespace ballast {
namespace {

struct Shape {
  int n, k;
};
constexpr Shape kShapes[] = {{8, 8},    {64, 32},   {32, 64}, {40, 24},
                             {130, 72}, {1040, 88}, {513, 40}};

struct Backend {
  const KernelSet* kernels;
  DType dtype;
};

// Every product that this build and this processor have.
std::vector<Backend> Backends() {
  std::vector<Backend> backends = {{&PlainKernels(), DType::kF32}, {&PlainKernels(), DType::kBF16}};
  if (OneDnnKernels() != nullptr) backends.push_back({OneDnnKernels(), DType::kF32});
  if (cpu::OneDnnHasBFloat16()) backends.push_back({OneDnnKernels(), DType::kBF16});
  return backends;
}

// Random numbers that both types hold exactly.
std::vector<float> RandomValues(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& x : values) x = ToFloat(ToBFloat16(static_cast<float>(2 * random.Uniform() - 1)));
  return values;
}

// Rows of `dtype` with room for whole blocks; what lies behind the rows is `filler`.
AlignedBuffer Rows(const std::vector<float>& values, int k, DType dtype, float filler = 0.0f) {
  const size_t rows = RoundUp(values.size() / static_cast<size_t>(k), kRowBlock);
  AlignedBuffer buffer(rows * static_cast<size_t>(k) * SizeOf(dtype));
  for (size_t i = 0; i < rows * static_cast<size_t>(k); ++i) {
    const float value = i < values.size() ? values[i] : filler;
    if (dtype == DType::kF32) {
      buffer.as<float>()[i] = value;
    } else {
      buffer.as<BFloat16>()[i] = ToBFloat16(value);
    }
  }
  return buffer;
}

// A product with its packed parameters.
class Product {
 public:
  Product(const Backend& backend, Shape shape, const std::vector<float>& w)
      : shape_(shape), dtype_(backend.dtype) {
    auto matmul = backend.kernels->make_matmul(shape.n, shape.k, backend.dtype);
    REQUIRE(matmul.ok());
    matmul_ = *std::move(matmul);
    packed_ = AlignedBuffer(matmul_->packed_bytes());
    REQUIRE(matmul_->Pack(w.data(), DType::kF32, packed_.data()).ok());
  }
  std::vector<float> Run(const std::vector<float>& x, float filler = 0.0f) {
    const int m = static_cast<int>(x.size()) / shape_.k;
    const AlignedBuffer rows = Rows(x, shape_.k, dtype_, filler);
    const size_t n = static_cast<size_t>(shape_.n);
    AlignedBuffer y(RoundUp(static_cast<size_t>(m), kRowBlock) * n * sizeof(float));
    REQUIRE(matmul_->Run(rows.data(), m, packed_.data(), y.as<float>(), nullptr).ok());
    return {y.as<float>(), y.as<float>() + static_cast<size_t>(m) * n};
  }

 private:
  Shape shape_;
  DType dtype_;
  std::unique_ptr<Matmul> matmul_;
  AlignedBuffer packed_;
};

bool SameBits(const float* a, const float* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(float)) == 0;
}

TEST_CASE("products are within their bound of fp64", "[kernels][property]") {
  for (const Backend& backend : Backends()) {
    for (const Shape shape : kShapes) {
      CAPTURE(backend.kernels->name, NameOf(backend.dtype), shape.n, shape.k);
      const auto w = RandomValues(static_cast<size_t>(shape.n) * shape.k, 1);
      const int m = 19;
      const auto x = RandomValues(static_cast<size_t>(m) * shape.k, 2);
      const auto y = Product(backend, shape, w).Run(x);
      double worst = 0;
      for (int row = 0; row < m; ++row) {
        for (int col = 0; col < shape.n; ++col) {
          double sum = 0, size = 0;
          for (int i = 0; i < shape.k; ++i) {
            const double term = double{x[static_cast<size_t>(row) * shape.k + i]} *
                                w[static_cast<size_t>(col) * shape.k + i];
            sum += term;
            size += std::abs(term);
          }
          const double error = std::abs(y[static_cast<size_t>(row) * shape.n + col] - sum);
          worst = std::max(worst, error / (size * shape.k));
        }
      }
      // Operands are exact in both types and sums are in fp32: k roundings of half an ulp at most.
      REQUIRE(worst <= 0x1.0p-24);
    }
  }
}

TEST_CASE("a row's bits depend on the row alone", "[kernels][property]") {
  for (const Backend& backend : Backends()) {
    for (const Shape shape : kShapes) {
      CAPTURE(backend.kernels->name, NameOf(backend.dtype), shape.n, shape.k);
      const size_t n = static_cast<size_t>(shape.n), k = static_cast<size_t>(shape.k);
      Product product(backend, shape, RandomValues(n * k, 3));
      const auto row = RandomValues(k, 4);
      const auto alone = product.Run(row);
      for (const size_t m :
           {size_t{2}, size_t{15}, size_t{16}, size_t{17}, size_t{33}, size_t{100}}) {
        for (const size_t at : {size_t{0}, m / 2, m - 1}) {
          CAPTURE(m, at);
          auto x = RandomValues(m * k, 5 + m);
          std::copy(row.begin(), row.end(), x.begin() + static_cast<std::ptrdiff_t>(at * k));
          const auto y = product.Run(x, /*filler=*/std::nanf(""));
          REQUIRE(SameBits(&y[at * n], alone.data(), n));
        }
      }
    }
  }
}

TEST_CASE("a row's bits do not depend on the number of threads", "[kernels][property]") {
  for (const Backend& backend : Backends()) {
    const Shape shape{1040, 512};
    CAPTURE(backend.kernels->name, NameOf(backend.dtype));
    const auto w = RandomValues(static_cast<size_t>(shape.n) * shape.k, 6);
    const auto x = RandomValues(size_t{48} * shape.k, 7);
    const auto one = Product(backend, shape, w).Run(x);
    for (int threads : {2, 3, 8}) {
      CAPTURE(threads);
      cpu::SetMatmulThreads(threads);
      const auto many = Product(backend, shape, w).Run(x);
      cpu::SetMatmulThreads(1);
      REQUIRE(SameBits(one.data(), many.data(), one.size()));
    }
  }
}

TEST_CASE("parameters of either type pack to the same product", "[kernels][unit]") {
  for (const Backend& backend : Backends()) {
    CAPTURE(backend.kernels->name, NameOf(backend.dtype));
    const Shape shape{40, 24};
    const auto w = RandomValues(size_t{40} * 24, 8);
    auto matmul = backend.kernels->make_matmul(shape.n, shape.k, backend.dtype);
    REQUIRE(matmul.ok());
    AlignedBuffer from_f32((*matmul)->packed_bytes()), from_bf16((*matmul)->packed_bytes());
    const AlignedBuffer rounded = Rows(w, shape.k, DType::kBF16);
    REQUIRE((*matmul)->Pack(w.data(), DType::kF32, from_f32.data()).ok());
    REQUIRE((*matmul)->Pack(rounded.data(), DType::kBF16, from_bf16.data()).ok());
    REQUIRE(std::memcmp(from_f32.data(), from_bf16.data(), from_f32.size()) == 0);
  }
}

TEST_CASE("the gated MLP is within its bound of fp64 and row deterministic",
          "[kernels][property]") {
  const int hidden = 48, inter = 24, rows = 21;
  const auto gate = RandomValues(size_t{24} * 48, 9), up = RandomValues(size_t{24} * 48, 10);
  const auto down = RandomValues(size_t{24} * 48, 11);
  const auto x = RandomValues(size_t{rows} * hidden, 12);
  for (const Backend& backend : Backends()) {
    CAPTURE(backend.kernels->name, NameOf(backend.dtype));
    auto mlp = GatedMlp::Create(*backend.kernels, hidden, inter, backend.dtype);
    REQUIRE(mlp.ok());
    AlignedBuffer packed((*mlp)->packed_bytes());
    REQUIRE((*mlp)->Pack(gate.data(), up.data(), down.data(), DType::kF32, packed.data()).ok());
    const AlignedBuffer in = Rows(x, hidden, backend.dtype);
    AlignedBuffer y(size_t{32} * hidden * 4), one(size_t{16} * hidden * 4);
    REQUIRE((*mlp)->Run(in.data(), rows, packed.data(), y.as<float>(), nullptr).ok());
    const double bound = backend.dtype == DType::kF32 ? 2e-5 : 3e-2;
    for (int t = 0; t < rows; ++t) {
      std::vector<double> act(inter);
      for (int f = 0; f < inter; ++f) {
        double g = 0, u = 0;
        for (int h = 0; h < hidden; ++h) {
          g += double{gate[f * hidden + h]} * x[t * hidden + h];
          u += double{up[f * hidden + h]} * x[t * hidden + h];
        }
        act[f] = g / (1 + std::exp(-g)) * u;
      }
      for (int h = 0; h < hidden; ++h) {
        double want = 0, size = 1;
        for (int f = 0; f < inter; ++f) {
          want += act[f] * down[h * inter + f];
          size += std::abs(act[f] * down[h * inter + f]);
        }
        REQUIRE(std::abs(y.as<float>()[t * hidden + h] - want) <= bound * size);
      }
      const AlignedBuffer single =
          Rows({x.begin() + std::ptrdiff_t{t} * hidden, x.begin() + std::ptrdiff_t{t + 1} * hidden},
               hidden, backend.dtype);
      REQUIRE((*mlp)->Run(single.data(), 1, packed.data(), one.as<float>(), nullptr).ok());
      REQUIRE(SameBits(one.as<float>(), y.as<float>() + std::ptrdiff_t{t} * hidden, hidden));
    }
  }
}

TEST_CASE("a build without a product says so", "[kernels][errors]") {
  const auto bf16 = cpu::MakeOneDnnMatmul(64, 64, DType::kBF16);
  REQUIRE(bf16.ok() == cpu::OneDnnHasBFloat16());
  if (!bf16.ok()) REQUIRE(bf16.status().code() == absl::StatusCode::kUnimplemented);
  REQUIRE(DefaultCpuKernels().name == std::string(OneDnnKernels() != nullptr ? "onednn" : "plain"));
}

}  // namespace
}  // namespace ballast
