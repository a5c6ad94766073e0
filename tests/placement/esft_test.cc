#include "placement/esft.h"

#include <catch2/catch.hpp>

namespace ballast {
namespace {

using Catch::Matchers::Contains;

std::string MessageOf(const std::vector<NamedText>& layers, int32_t top_k = 2) {
  const auto arrays = ParseEsft(layers, top_k);
  REQUIRE(arrays.status().code() == absl::StatusCode::kInvalidArgument);
  return std::string(arrays.status().message());
}

TEST_CASE("the published text becomes ids and weights by token and layer", "[placement][esft]") {
  // Two samples of two tokens and one, top-2, in two layers.
  const std::vector<NamedText> layers = {
      {"l1", "8\t26\t5\t6\t\t0.0414\t0.1\t0\t1.0\n7\t8\t\t0.5\t0.25\n"},
      {"l2", "1\t2\t3\t4\t\t0.1\t0.2\t0.3\t0.4\r\n5\t6\t\t0.5\t0.6"}};
  const auto arrays = ParseEsft(layers, 2);
  REQUIRE(arrays.ok());
  REQUIRE(arrays->ids == MakeNpyArray(NpyType::kU8, {3, 2, 2},
                                      std::vector<int64_t>{8, 26, 1, 2, 5, 6, 3, 4, 7, 8, 5, 6}));
  REQUIRE(arrays->weights ==
          MakeNpyArray(NpyType::kU16, {3, 2, 2},
                       std::vector<int64_t>{414, 1000, 1000, 2000, 0, 10000, 3000, 4000, 5000, 2500,
                                            5000, 6000}));
}

TEST_CASE("ids beyond a byte make wide arrays", "[placement][esft]") {
  const std::vector<NamedText> layers = {{"l1", "300\t1\t\t0.5\t0.5\n"}};
  const auto arrays = ParseEsft(layers, 2);
  REQUIRE(arrays.ok());
  REQUIRE(arrays->ids.type == NpyType::kU16);
}

TEST_CASE("bad routing text is refused with file and line and value", "[placement][esft][errors]") {
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\n"}}), Contains("l1: line 1 has no ids and weights"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\t\t.1\t.2\n1\tx\t\t.1\t.2\n"}}),
               Contains("l1: line 2 token 0 has expert 'x', allowed: 0 to 65535"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t-2\t\t.1\t.2\n"}}), Contains("expert '-2'"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\t\t.1\tnan\n"}}), Contains("weight 'nan'"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\t\t.1\n"}}), Contains("has 2 ids and 1 weights"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\t3\t\t.1\t.2\t.3\n"}}), Contains("a multiple of top-k 2"));
  REQUIRE_THAT(MessageOf({{"l1", "\n"}}), Contains("without a sample"));
  REQUIRE_THAT(MessageOf({{"l1", "1\t2\t\t.1\t.2\n"}, {"l2", "1\t2\t3\t4\t\t.1\t.2\t.1\t.2\n"}}),
               Contains("l2: 1 samples of 2 tokens; l1 has 1 of 1"));
  REQUIRE_THAT(MessageOf({}), Contains("0 layers"));
}

}  // namespace
}  // namespace ballast
