// The two macros with which every function of Ballast passes a failure on.
#ifndef BALLAST_BASE_STATUS_H_
#define BALLAST_BASE_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

// Returns the status of `expr` from this function unless it is OK.
#define BALLAST_RETURN_IF_ERROR(expr)                                  \
  do {                                                                 \
    if (absl::Status ballast_status = (expr); !ballast_status.ok()) {  \
      return ballast_status;                                           \
    }                                                                  \
  } while (false)

#define BALLAST_STATUS_CONCAT_INNER(a, b) a##b
#define BALLAST_STATUS_CONCAT(a, b) BALLAST_STATUS_CONCAT_INNER(a, b)

// `lhs` becomes the value of the StatusOr `expr`, or its status is returned from this function.
#define BALLAST_ASSIGN_OR_RETURN(lhs, expr) \
  BALLAST_ASSIGN_OR_RETURN_IMPL(BALLAST_STATUS_CONCAT(ballast_or_, __LINE__), lhs, expr)
#define BALLAST_ASSIGN_OR_RETURN_IMPL(result, lhs, expr) \
  auto result = (expr);                                  \
  if (!result.ok()) return std::move(result).status();   \
  lhs = std::move(result).value()

#endif  // BALLAST_BASE_STATUS_H_
