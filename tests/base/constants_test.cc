// What the compiler's flags must hold true (cmake/BallastTargets.cmake). Without them this fails
// where the compiler may use AVX-512.
#include <catch2/catch.hpp>
#include <cstdint>
#include <vector>

namespace ballast {
namespace {

// Out of line and unknown to the optimiser, so that a constant has to be stored before it is read.
[[gnu::noinline]] int64_t At(const std::vector<int64_t>& values, size_t index) {
  asm volatile("" : : "r"(values.data()) : "memory");
  return values[index];
}

TEST_CASE("constants with zeros at their end are stored as they are written", "[base]") {
  const std::vector<int64_t> half = {20, 20, 0, 0};
  CHECK(At(half, 0) == 20);
  CHECK(At(half, 1) == 20);
  CHECK(At(half, 2) == 0);
  CHECK(At(half, 3) == 0);
  const std::vector<int64_t> one = {7, 0, 0, 0};
  CHECK(At(one, 0) == 7);
  CHECK(At(one, 1) == 0);
  CHECK(At(one, 3) == 0);
  const std::vector<int64_t> eight = {3, 3, 3, 3, 0, 0, 0, 0};
  CHECK(At(eight, 3) == 3);
  CHECK(At(eight, 4) == 0);
  CHECK(At(eight, 7) == 0);
}

}  // namespace
}  // namespace ballast
