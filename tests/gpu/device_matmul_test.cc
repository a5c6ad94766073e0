#include "kernels/device_matmul.h"

#include <bit>
#include <limits>
#include <vector>

#include "base/random.h"
#include "kernels/matmul.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;
using Bytes = std::vector<uint8_t>;

// Numbers of any size, so that the order of a sum shows; a few are zeros of either sign or so small
// that products vanish.
Bytes RandomMatrix(size_t rows, size_t columns, DType type, Random* random) {
  Bytes bytes(rows * columns * SizeOf(type));
  for (size_t i = 0; i < rows * columns; ++i) {
    float x = static_cast<float>(2 * random->Uniform() - 1);
    const uint32_t odd = random->Below(40);
    if (odd == 0) x = -0.0f;
    if (odd == 1) x *= 1e-38f;
    if (odd == 2) x *= 1e6f;
    if (type == DType::kF32) {
      reinterpret_cast<float*>(bytes.data())[i] = x;
    } else {
      reinterpret_cast<BFloat16*>(bytes.data())[i] = ToBFloat16(x);
    }
  }
  return bytes;
}

struct Shape {
  int32_t m, n, k;
};

std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (float x : values) bits.push_back(std::bit_cast<uint32_t>(x));
  return bits;
}

std::vector<uint32_t> OnCpu(const Shape& s, DType type, const Bytes& x, const Bytes& w) {
  std::vector<float> y(static_cast<size_t>(s.m) * static_cast<size_t>(s.n));
  auto matmul = cpu::MakePlainMatmul(s.n, s.k, type);
  REQUIRE(matmul.ok());
  REQUIRE((*matmul)
              ->Run(x.data(), s.m, reinterpret_cast<const std::byte*>(w.data()), y.data(), nullptr)
              .ok());
  return Bits(y);
}

std::vector<uint32_t> OnDevice(const Shape& s, DType type, const Bytes& x, const Bytes& w) {
  const DeviceArray<uint8_t> d_x(x), d_w(w);
  const DeviceArray<float> y(static_cast<size_t>(s.m) * static_cast<size_t>(s.n));
  const absl::Status status = cuda::PlainMatmul({.m = s.m,
                                                 .n = s.n,
                                                 .k = s.k,
                                                 .dtype = type,
                                                 .x = d_x.data(),
                                                 .w = d_w.data(),
                                                 .y = y.data()},
                                                nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  return Bits(y.Read());
}

TEST_CASE("the plain product on the device gives the bits of the CPU", "[device][matmul]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 6);
    const auto below = [&](int32_t most) {
      return 1 + static_cast<int32_t>(random.Below(static_cast<uint32_t>(most)));
    };
    // The edges of a tile, a lane's tail, and whatever comes.
    for (const Shape& s : {Shape{16, 64, 64}, Shape{17, 65, 65}, Shape{1, 1, 1}, Shape{3, 7, 150},
                           Shape{0, 5, 8}, Shape{2, 3, 0}, Shape{below(40), below(140), below(200)},
                           Shape{below(16), below(300), below(40)}}) {
      for (const DType type : {DType::kF32, DType::kBF16}) {
        CAPTURE(round, s.m, s.n, s.k, NameOf(type));
        const auto size = [](int32_t x) { return static_cast<size_t>(x); };
        const Bytes x = RandomMatrix(size(s.m), size(s.k), type, &random);
        const Bytes w = RandomMatrix(size(s.n), size(s.k), type, &random);
        REQUIRE(OnDevice(s, type, x, w) == OnCpu(s, type, x, w));
      }
    }
  });
}

TEST_CASE("a product on the device that vanishes keeps its sign", "[device][matmul]") {
  // Every lane of k ends as -0, the one that a step of zeros would turn into 0 too.
  const Shape s{1, 1, 17};
  const std::vector<float> tiny(17, 1e-30f), minus(17, -1e-30f);
  const auto bytes = [](const std::vector<float>& v) {
    const auto* begin = reinterpret_cast<const uint8_t*>(v.data());
    return Bytes(begin, begin + v.size() * sizeof(float));
  };
  const auto y = OnDevice(s, DType::kF32, bytes(tiny), bytes(minus));
  REQUIRE(y == std::vector<uint32_t>{0x80000000u});
  REQUIRE(y == OnCpu(s, DType::kF32, bytes(tiny), bytes(minus)));
}

TEST_CASE("a row of a product on the device does not see the others", "[device][matmul]") {
  Random random(7);
  const Shape s{37, 70, 90};
  const DType type = DType::kF32;
  Bytes x = RandomMatrix(37, 90, type, &random);
  const Bytes w = RandomMatrix(70, 90, type, &random);
  for (size_t i = 5 * 90; i < 6 * 90; ++i) {  // one row is not even a number
    reinterpret_cast<float*>(x.data())[i] = std::numeric_limits<float>::quiet_NaN();
  }
  const auto all = OnDevice(s, type, x, w);
  for (const int t : {0, 4, 6, 15, 16, 36}) {
    const size_t row = 90 * sizeof(float), at = static_cast<size_t>(t);
    const Bytes alone(x.begin() + static_cast<std::ptrdiff_t>(at * row),
                      x.begin() + static_cast<std::ptrdiff_t>((at + 1) * row));
    const auto y = OnDevice({1, 70, 90}, type, alone, w);
    REQUIRE(std::equal(y.begin(), y.end(), all.begin() + t * 70));
  }
}

// One element of a matrix that RandomMatrix has made.
float ValueAt(const Bytes& bytes, size_t i, DType type) {
  return type == DType::kF32 ? reinterpret_cast<const float*>(bytes.data())[i]
                             : ToFloat(reinterpret_cast<const BFloat16*>(bytes.data())[i]);
}

TEST_CASE("the plain product behind the interface takes w in either type as it is",
          "[device][matmul]") {
  Random random(8);
  const Shape s{19, 33, 41};
  for (const DType type : {DType::kF32, DType::kBF16}) {
    for (const DType w_type : {DType::kF32, DType::kBF16}) {
      CAPTURE(NameOf(type), NameOf(w_type));
      const Bytes x = RandomMatrix(19, 41, type, &random);
      const Bytes w = RandomMatrix(33, 41, w_type, &random);
      const auto matmul = *cuda::MakePlainDeviceMatmul(s.n, s.k, type);
      REQUIRE(matmul->packed_bytes() == size_t{33} * 41 * SizeOf(type));
      Bytes packed(matmul->packed_bytes());
      REQUIRE(matmul->Pack(w.data(), w_type, reinterpret_cast<std::byte*>(packed.data())).ok());
      for (size_t i = 0; i < size_t{33} * 41; ++i) {
        const float value = ValueAt(w, i, w_type);
        const float kept = type == DType::kF32 ? value : ToFloat(ToBFloat16(value));
        REQUIRE(ValueAt(packed, i, type) == kept);
      }
      const DeviceArray<uint8_t> d_x(x), d_packed(packed);
      const DeviceArray<float> y(static_cast<size_t>(s.m * s.n));
      cudaStream_t stream = nullptr;
      testing::RequireCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      REQUIRE(matmul
                  ->Run(d_x.data(), s.m, reinterpret_cast<const std::byte*>(d_packed.data()),
                        y.data(), stream)
                  .ok());
      REQUIRE(Bits(y.Read()) == OnCpu(s, type, x, packed));
      testing::RequireCuda(cudaStreamDestroy(stream));
    }
  }
}

}  // namespace
}  // namespace ballast
