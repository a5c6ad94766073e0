#include <algorithm>

#include "tests/fuzz/targets.h"

namespace ballast::fuzz {
namespace {

const std::string kWords[] = {"-1",
                              "0",
                              "255",
                              "256",
                              "65535",
                              "65536",
                              "2147483647",
                              "2147483648",
                              "4294967296",
                              "9223372036854775807",
                              "9223372036854775808",
                              "18446744073709551616",
                              "1e308",
                              "1e999",
                              "-1e-300",
                              "nan",
                              "inf",
                              "0x7",
                              "null",
                              "true",
                              "[]",
                              "{}",
                              "[[",
                              "]]",
                              "{\"a\":",
                              "\"",
                              "'",
                              ",",
                              ",,",
                              ":",
                              "\t",
                              "\t\t",
                              "\n",
                              "\r\n",
                              " ",
                              "(",
                              "), }",
                              "\xff\xfe",
                              std::string(1, '\0'),
                              std::string(300, '7'),
                              std::string(100'000, '[') + std::string(100'000, ']'),
                              std::string(8, '\xff')};

uint32_t Below(Random& random, size_t bound) {
  return random.Below(static_cast<uint32_t>(std::max<size_t>(bound, 1)));
}

// One edit of `text`.
void Edit(const std::string& other, Random& random, std::string* text) {
  const size_t at = Below(random, text->size() + 1);
  const size_t length = std::min<size_t>(text->size() - at, 1 + Below(random, 16));
  switch (random.Below(8)) {
    case 0:
      if (at < text->size()) (*text)[at] = static_cast<char>(random.Below(256));
      break;
    case 1:
      if (at < text->size()) (*text)[at] = static_cast<char>((*text)[at] ^ (1 << random.Below(8)));
      break;
    case 2:
      text->erase(at, length);
      break;
    case 3:
      text->insert(Below(random, text->size() + 1), text->substr(at, length));
      break;
    case 4:
      text->insert(at, kWords[Below(random, std::size(kWords))]);
      break;
    case 5:
      text->replace(at, length, kWords[Below(random, std::size(kWords))]);
      break;
    case 6: {
      const size_t from = Below(random, other.size() + 1);
      text->replace(at, length, other.substr(from, Below(random, 64)));
      break;
    }
    default:
      text->resize(at);
  }
}

}  // namespace

std::string Mutate(const std::string& input, const std::string& other, Random& random) {
  std::string text = input;
  const uint32_t edits = 1 + random.Below(4);
  for (uint32_t i = 0; i < edits; ++i) Edit(other, random, &text);
  return text;
}

}  // namespace ballast::fuzz
