#ifndef BALLAST_TESTS_SUPPORT_TEMP_FOLDER_H_
#define BALLAST_TESTS_SUPPORT_TEMP_FOLDER_H_

#include <filesystem>
#include <string>

namespace ballast::testing {

// A new folder that is removed with all it holds.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_TEMP_FOLDER_H_
