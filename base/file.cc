#include "base/file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/status.h"

namespace ballast {
namespace {

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

absl::Status CannotWrite(const std::string& path, const char* why) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be written: ", why));
}

// What is written beside the file and then takes its place.
std::string Beside(const std::string& path) {
  return absl::StrCat(path, ".", getpid(), ".tmp");
}

// A device, a pipe or a folder would be replaced by a file of its name.
absl::Status CheckRegular(const std::string& path) {
  struct stat there {};
  if (stat(path.c_str(), &there) != 0 || S_ISREG(there.st_mode)) return absl::OkStatus();
  return CannotWrite(path, S_ISDIR(there.st_mode) ? "it is a folder" : "it is not a regular file");
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  const auto failed = [&](int error) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(error)));
  };
  const File file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return failed(errno);
  std::string bytes;
  char block[1 << 16];
  size_t count = 0;
  while ((count = std::fread(block, 1, sizeof block, file.get())) > 0) bytes.append(block, count);
  if (std::ferror(file.get()) != 0) return failed(errno);
  return bytes;
}

absl::Status CheckWritable(const std::string& path) {
  BALLAST_RETURN_IF_ERROR(CheckRegular(path));
  const std::string beside = Beside(path);
  const File file(std::fopen(beside.c_str(), "wb"), &std::fclose);
  if (file == nullptr) return CannotWrite(path, std::strerror(errno));
  std::remove(beside.c_str());
  return absl::OkStatus();
}

absl::Status WriteFile(const std::string& path, const std::string& bytes) {
  const auto failed = [&](int error) { return CannotWrite(path, std::strerror(error)); };
  BALLAST_RETURN_IF_ERROR(CheckRegular(path));
  const std::string beside = Beside(path);
  File file(std::fopen(beside.c_str(), "wb"), &std::fclose);
  if (file == nullptr) return failed(errno);
  const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
  const int error = errno;
  // On the disk before it takes the old one's place: a crash leaves one or the other.
  const bool kept = written && std::fflush(file.get()) == 0 && fsync(fileno(file.get())) == 0;
  const int keep_error = errno;
  const bool closed = std::fclose(file.release()) == 0;
  if (kept && closed && std::rename(beside.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const int last_error = !written ? error : !kept ? keep_error : errno;
  std::remove(beside.c_str());
  return failed(last_error);
}

}  // namespace ballast
