#ifndef BALLAST_TESTS_SUPPORT_DUMPED_H_
#define BALLAST_TESTS_SUPPORT_DUMPED_H_

#include <catch2/catch.hpp>
#include <utility>

#include "base/npy.h"
#include "monitor/trace_recorder.h"

namespace ballast::testing {

// What `ballast record dump` would write, read again.
inline NpyArray Dumped(const TraceRecorder& recorder) {
  const auto file = recorder.Dump();
  REQUIRE(file.ok());
  auto array = ParseNpy("dump", *file);
  REQUIRE(array.ok());
  return *std::move(array);
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_DUMPED_H_
