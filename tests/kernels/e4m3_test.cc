#include "kernels/e4m3.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "base/random.h"

namespace ballast {
namespace {

// By looking at all numbers: the nearest, of two equally near ones the even.
uint8_t NearestByDefinition(float x) {
  int best = 0;
  for (int bits = 0; bits < 0x7f; ++bits) {
    const double distance =
        std::fabs(double{FromE4M3(static_cast<uint8_t>(bits))} - std::fabs(double{x}));
    const double so_far =
        std::fabs(double{FromE4M3(static_cast<uint8_t>(best))} - std::fabs(double{x}));
    if (distance < so_far || (distance == so_far && bits % 2 == 0)) best = bits;
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

TEST_CASE("e4m3 has the numbers of its definition", "[kernels][e4m3]") {
  REQUIRE(FromE4M3(0x00) == 0.0f);
  REQUIRE(FromE4M3(0x01) == 0.001953125f);  // 2^-9
  REQUIRE(FromE4M3(0x07) == 0.013671875f);
  REQUIRE(FromE4M3(0x08) == 0.015625f);  // 2^-6, the smallest normal one
  REQUIRE(FromE4M3(0x38) == 1.0f);
  REQUIRE(FromE4M3(0xbc) == -1.5f);
  REQUIRE(FromE4M3(0x7e) == 448.0f);
  REQUIRE(std::isnan(FromE4M3(0x7f)));
  REQUIRE(std::isnan(FromE4M3(0xff)));
}

TEST_CASE("e4m3 rounds to the nearest and the even", "[kernels][e4m3]") {
  for (int bits = 0; bits < 256; ++bits) {
    const float x = FromE4M3(static_cast<uint8_t>(bits));
    if (!std::isnan(x)) REQUIRE(ToE4M3(x) == bits);
  }
  REQUIRE(ToE4M3(1.0625f) == 0x38);         // between 1 and 1.125
  REQUIRE(ToE4M3(1.1875f) == 0x3a);         // between 1.125 and 1.25
  REQUIRE(ToE4M3(0.0009765625f) == 0x00);   // 2^-10
  REQUIRE(ToE4M3(-0.0029296875f) == 0x82);  // -3 * 2^-10
  REQUIRE(ToE4M3(0.0155f) == 0x08);         // up to the smallest normal one
  REQUIRE(ToE4M3(1e9f) == 0x7e);
  REQUIRE(ToE4M3(-std::numeric_limits<float>::infinity()) == 0xfe);
  REQUIRE(ToE4M3(std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  REQUIRE(ToE4M3(1e-42f) == 0x00);
  Random random(7);
  for (int i = 0; i < 20000; ++i) {
    const float x = static_cast<float>(
        std::ldexp(2 * random.Uniform() - 1, static_cast<int>(random.Below(22)) - 11));
    REQUIRE(ToE4M3(x) == NearestByDefinition(x));
  }
}

}  // namespace
}  // namespace ballast
