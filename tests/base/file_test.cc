#include "base/file.h"

#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <filesystem>

#include "tests/support/temp_folder.h"

namespace ballast {
namespace {

using testing::TempFolder;

int64_t NumFiles(const TempFolder& folder) {
  return std::distance(std::filesystem::directory_iterator(folder.path()),
                       std::filesystem::directory_iterator());
}

TEST_CASE("a file that can be written is, and asking leaves nothing behind", "[base][file]") {
  const TempFolder folder;
  const std::string path = folder.path() + "/a";
  REQUIRE(CheckWritable(path).ok());
  REQUIRE(NumFiles(folder) == 0);
  REQUIRE(WriteFile(path, "one").ok());
  REQUIRE(CheckWritable(path).ok());
  REQUIRE(*ReadFile(path) == "one");
  REQUIRE(WriteFile(path, "two").ok());
  REQUIRE(*ReadFile(path) == "two");
  REQUIRE(NumFiles(folder) == 1);
}

TEST_CASE("what is no file is not written over, and the reason is given", "[base][file]") {
  const TempFolder folder;
  const std::string pipe = folder.path() + "/pipe";
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  for (const auto& [path, why] : {std::pair(pipe, "it is not a regular file"),
                                  {folder.path() + "/", "it is a folder"},
                                  {folder.path() + "/none/x", "No such file or directory"}}) {
    for (const absl::Status& status : {CheckWritable(path), WriteFile(path, "x")}) {
      INFO(status.message());
      REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
      REQUIRE(std::string(status.message()) == path + ": cannot be written: " + why);
    }
  }
  REQUIRE(NumFiles(folder) == 1);
  REQUIRE(std::filesystem::is_fifo(pipe));
}

}  // namespace
}  // namespace ballast
