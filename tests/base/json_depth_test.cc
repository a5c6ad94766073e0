#include "base/json_depth.h"

#include <catch2/catch.hpp>
#include <string>

namespace ballast {
namespace {

std::string Nest(int depth) {
  const size_t n = static_cast<size_t>(depth);
  return std::string(n, '[') + std::string(n, ']');
}

TEST_CASE("the depth of a JSON text counts what is open at a time", "[base][unit]") {
  REQUIRE_FALSE(JsonNestsTooDeep(""));
  REQUIRE_FALSE(JsonNestsTooDeep(Nest(kMostJsonDepth)));
  REQUIRE(JsonNestsTooDeep(Nest(kMostJsonDepth + 1)));
  REQUIRE(JsonNestsTooDeep("{\"a\":" + Nest(kMostJsonDepth) + "}"));
  std::string row = "[";
  for (int i = 0; i < 1000; ++i) row += "{},";
  REQUIRE_FALSE(JsonNestsTooDeep(row + "1]"));
}

TEST_CASE("brackets in strings and comments are no nest", "[base][unit]") {
  const std::string deep = Nest(100);
  REQUIRE_FALSE(JsonNestsTooDeep("[\"" + deep + "\"]"));
  REQUIRE_FALSE(JsonNestsTooDeep("[\"\\\"" + deep + "\"]"));
  REQUIRE_FALSE(JsonNestsTooDeep("[ // " + deep + "\n]"));
  REQUIRE_FALSE(JsonNestsTooDeep("[ /* " + deep + " */ ]"));
  // Behind them it counts again.
  REQUIRE(JsonNestsTooDeep("[\"\\\\\"," + deep + "]"));
  REQUIRE(JsonNestsTooDeep("[ // a \"\n" + deep + "]"));
  REQUIRE(JsonNestsTooDeep("[ /* \" */" + deep + "]"));
}

}  // namespace
}  // namespace ballast
