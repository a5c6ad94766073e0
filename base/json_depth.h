#ifndef BALLAST_BASE_JSON_DEPTH_H_
#define BALLAST_BASE_JSON_DEPTH_H_

#include <cstddef>

#include "absl/strings/string_view.h"

namespace ballast {

// How deep lists and objects may stand in each other in a JSON text from outside. Libraries copy
// and print nested values by recursion: a nest as deep as a text is long would end the process.
inline constexpr int kMostJsonDepth = 64;

// Whether the text nests deeper. Brackets in strings and comments do not count.
inline bool JsonNestsTooDeep(absl::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '/' && i + 1 < text.size()) {
      const bool block = text[i + 1] == '*';
      i = text.find(block ? "*/" : "\n", i + (block ? 2 : 1));
      if (i == absl::string_view::npos) return false;
      i += block ? 1 : 0;  // to its last character
    } else if (c == '[' || c == '{') {
      if (++depth > kMostJsonDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace ballast

#endif  // BALLAST_BASE_JSON_DEPTH_H_
