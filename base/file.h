// Whole files in and out.
#ifndef BALLAST_BASE_FILE_H_
#define BALLAST_BASE_FILE_H_

#include <string>

#include "absl/status/statusor.h"

namespace ballast {

// All bytes of the file.
// ERRORS kNotFound: it cannot be opened or read (a folder, for example); the message names the path
absl::StatusOr<std::string> ReadFile(const std::string& path);

// Whether WriteFile could write there: what has that name, if anything, is a regular file, and its
// folder takes new ones. Leaves nothing behind.
// ERRORS kInvalidArgument names the path and the reason
absl::Status CheckWritable(const std::string& path);

// Replaces the file by `bytes`: written beside it first, then renamed, so that no reader sees half.
// ERRORS kInvalidArgument: it cannot be written; the message names the path
absl::Status WriteFile(const std::string& path, const std::string& bytes);

}  // namespace ballast

#endif  // BALLAST_BASE_FILE_H_
