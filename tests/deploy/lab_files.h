// Runs the laboratory's commands on small files.
#ifndef BALLAST_TESTS_DEPLOY_LAB_FILES_H_
#define BALLAST_TESTS_DEPLOY_LAB_FILES_H_

#include <sys/wait.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/npy.h"
#include "base/random.h"
#include "tests/support/temp_folder.h"

namespace ballast::testing {

struct Ended {
  int exit_code = -1;
  std::string output;  // stdout and stderr
};

// `environment` as before a command in a shell: NAME=VALUE ...
inline Ended Ballast(const std::string& arguments, const std::string& environment = "") {
  const std::string command =
      absl::StrCat(environment, " ", BALLAST_COMMAND, " ", arguments, " 2>&1");
  std::FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  Ended ended;
  char block[4096];
  size_t count = 0;
  while ((count = std::fread(block, 1, sizeof block, pipe)) > 0) ended.output.append(block, count);
  const int status = pclose(pipe);
  ended.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return ended;
}

inline nlohmann::json JsonAt(const std::string& path) {
  const auto text = ReadFile(path);
  REQUIRE(text.ok());
  const nlohmann::json parsed = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  REQUIRE_FALSE(parsed.is_discarded());
  return parsed;
}

// Refused with exit code 2 and a message that has all of `parts`.
inline void RequireRefused(const std::string& arguments, const std::vector<std::string>& parts) {
  const Ended ended = Ballast(arguments);
  INFO(arguments << "\n" << ended.output);
  REQUIRE(ended.exit_code == 2);
  for (const std::string& part : parts) REQUIRE_THAT(ended.output, Catch::Matchers::Contains(part));
}

// Files of a folder of their own: traces a.npy and b.npy [256, 2, 2] over 16 experts, load.csv.
class Files {
 public:
  Files() {
    Random random(1);
    for (const char* name : {"a.npy", "b.npy"}) {
      std::vector<int64_t> ids;
      for (int i = 0; i < 256 * 2 * 2; ++i) {
        ids.push_back(random.Below(name[0] == 'a' ? 4 : 16));
      }
      ids[0] = 15;
      REQUIRE(WriteNpy(At(name), MakeNpyArray(NpyType::kU8, {256, 2, 2}, ids)).ok());
    }
    REQUIRE(WriteFile(At("load.csv"), "900,10,10,10,10,10,10,10\n10,10,10,10,40,40,40,40\n").ok());
  }
  std::string At(const std::string& name) const { return folder_.path() + "/" + name; }

 private:
  TempFolder folder_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_DEPLOY_LAB_FILES_H_
