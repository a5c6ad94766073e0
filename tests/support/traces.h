// Recorded routing, where it lies beside the checkout.
#ifndef BALLAST_TESTS_SUPPORT_TRACES_H_
#define BALLAST_TESTS_SUPPORT_TRACES_H_

#include <cstdlib>
#include <iostream>

namespace ballast::testing {

// The folder of the recorded traces; or null, and a line on stdout by which ctest knows that the
// test was skipped (SKIP_REGULAR_EXPRESSION in cmake/BallastTargets.cmake): the test must then
// return at once, for nothing that comes after this line can fail it.
inline const char* TracesFolder() {
  const char* folder = std::getenv("BALLAST_TRACES");
  if (folder == nullptr) std::cout << "BALLAST_TRACES is not set: skipped\n";
  return folder;
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_TRACES_H_
