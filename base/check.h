// Checks for our own bugs: a condition that only wrong code of Ballast can break ends the process.
// What callers, files or peers can get wrong returns an absl::Status instead.
#ifndef BALLAST_BASE_CHECK_H_
#define BALLAST_BASE_CHECK_H_

namespace ballast {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition);

}  // namespace ballast

#define BALLAST_CHECK(condition)                                   \
  do {                                                             \
    if (!(condition)) [[unlikely]] {                               \
      ::ballast::CheckFailed(__FILE__, __LINE__, #condition);      \
    }                                                              \
  } while (false)

#endif  // BALLAST_BASE_CHECK_H_
