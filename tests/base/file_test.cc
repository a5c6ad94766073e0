#include "base/file.h"

#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <filesystem>

namespace ballast {
namespace {

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "ballast-file-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string At(const std::string& name) const { return path_ + "/" + name; }
  int64_t NumFiles() const {
    return std::distance(std::filesystem::directory_iterator(path_),
                         std::filesystem::directory_iterator());
  }

 private:
  std::string path_;
};

TEST_CASE("a file that can be written is, and asking leaves nothing behind", "[base][file]") {
  const Folder folder;
  const std::string path = folder.At("a");
  REQUIRE(CheckWritable(path).ok());
  REQUIRE(folder.NumFiles() == 0);
  REQUIRE(WriteFile(path, "one").ok());
  REQUIRE(CheckWritable(path).ok());
  REQUIRE(*ReadFile(path) == "one");
  REQUIRE(WriteFile(path, "two").ok());
  REQUIRE(*ReadFile(path) == "two");
  REQUIRE(folder.NumFiles() == 1);
}

TEST_CASE("what is no file is not written over, and the reason is given", "[base][file]") {
  const Folder folder;
  const std::string pipe = folder.At("pipe");
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  for (const auto& [path, why] : {std::pair(pipe, "it is not a regular file"),
                                  {folder.At(""), "it is a folder"},
                                  {folder.At("none/x"), "No such file or directory"}}) {
    for (const absl::Status& status : {CheckWritable(path), WriteFile(path, "x")}) {
      INFO(status.message());
      REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
      REQUIRE(std::string(status.message()) == path + ": cannot be written: " + why);
    }
  }
  REQUIRE(folder.NumFiles() == 1);
  REQUIRE(std::filesystem::is_fifo(pipe));
}

}  // namespace
}  // namespace ballast
