#include "runtime/tokenizer.h"

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "base/random.h"

namespace ballast {
namespace {

// The text of `bytes`, and what came out after each one, separated by '|'.
std::string Pieces(std::string_view bytes) {
  Detokenizer detokenizer(Tokenizer::ByteLevel());
  std::string out;
  for (const char c : bytes) out += detokenizer.Add(static_cast<uint8_t>(c)) + "|";
  return out + detokenizer.Flush();
}

std::string Text(std::string_view bytes) {
  Detokenizer detokenizer(Tokenizer::ByteLevel());
  std::string out;
  for (const char c : bytes) out += detokenizer.Add(static_cast<uint8_t>(c));
  return out + detokenizer.Flush();
}

TEST_CASE("text becomes the document start and its bytes", "[runtime][unit]") {
  const Tokenizer tokenizer = Tokenizer::ByteLevel();
  REQUIRE(*tokenizer.Encode("") == std::vector<int32_t>{0});
  REQUIRE(*tokenizer.Encode("A\xc3\xa9") == std::vector<int32_t>{0, 65, 0xc3, 0xa9});
  const auto refused = Tokenizer::None().Encode("A");
  REQUIRE(refused.status().code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(refused.status().message()).starts_with("prompt: "));
}

TEST_CASE("the model folder says which tokenizer", "[runtime][unit]") {
  const auto dir = std::filesystem::temp_directory_path() / "ballast-tokenizer-test";
  std::filesystem::create_directories(dir);
  const auto path = dir / "tokenizer_config.json";
  std::filesystem::remove(path);
  REQUIRE_FALSE(Tokenizer::Load(dir)->reads_text());
  std::ofstream(path) << R"({"tokenizer_class":"LlamaTokenizer"})";
  REQUIRE_FALSE(Tokenizer::Load(dir)->reads_text());
  std::ofstream(path) << R"({"tokenizer_class":"ByteLevelTokenizer"})";
  REQUIRE(Tokenizer::Load(dir)->reads_text());
  std::ofstream(path) << "{";
  REQUIRE(Tokenizer::Load(dir).status().code() == absl::StatusCode::kInvalidArgument);
  std::filesystem::remove_all(dir);
}

TEST_CASE("characters come out when they are complete", "[runtime][unit]") {
  REQUIRE(Pieces("ab") == "a|b|");
  REQUIRE(Pieces("\xc3\xa9") == "|\xc3\xa9|");
  REQUIRE(Pieces("\xe6\x97\xa5x") == "||\xe6\x97\xa5|x|");
  REQUIRE(Pieces("\xf0\x9f\x98\x80") == "|||\xf0\x9f\x98\x80|");
}

TEST_CASE("each maximal invalid run is one replacement character", "[runtime][unit]") {
  const std::string r = "\xef\xbf\xbd";
  REQUIRE(Text("\x80") == r);
  REQUIRE(Text("\xff\xfe") == r + r);
  REQUIRE(Text("\xc0\xaf") == r + r);                    // overlong
  REQUIRE(Text("\xe0\x80\xaf") == r + r + r);            // overlong
  REQUIRE(Text("\xed\xa0\x80") == r + r + r);            // a surrogate
  REQUIRE(Text("\xf4\x90\x80\x80") == r + r + r + r);    // beyond U+10FFFF
  REQUIRE(Text("\xf0\x9f\x98") == r);                    // unfinished at the end
  REQUIRE(Text("\xf0\x9f\x98z") == r + "z");             // unfinished before a letter
  REQUIRE(Text("\xe6\x97\xe6\x97\xa5") == r + "\xe6\x97\xa5");
  REQUIRE(Text("\xe6\x97\xff") == r + r);
  // The example of Unicode 15, table 3-11.
  REQUIRE(Text("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41") == r + r + r + r + "A");
}

TEST_CASE("ids that are no bytes are invalid", "[runtime][unit]") {
  const std::string r = "\xef\xbf\xbd";
  Detokenizer detokenizer(Tokenizer::ByteLevel());
  REQUIRE(detokenizer.Add(0xe6) == "");
  REQUIRE(detokenizer.Add(256) == r + r);
  REQUIRE(detokenizer.Add(-1) == r);
  REQUIRE(detokenizer.Add('a') == "a");
  Detokenizer none(Tokenizer::None());
  REQUIRE(none.Add('a') + none.Flush() == "");
}

// A decoder by the definition: at each place the longest prefix of a character.
std::string Reference(std::string_view bytes) {
  std::string out;
  for (size_t i = 0; i < bytes.size();) {
    size_t best = 0;
    bool complete = false;
    for (size_t n = 1; n <= 4 && i + n <= bytes.size() && !complete; ++n) {
      uint32_t code = 0;
      const auto lead = static_cast<uint8_t>(bytes[i]);
      const int length = lead < 0x80 ? 1 : (lead >> 5) == 6 ? 2 : (lead >> 4) == 14 ? 3
                         : (lead >> 3) == 30 ? 4 : 0;
      if (length == 0 || static_cast<int>(n) > length) break;
      code = length == 1 ? lead : lead & (0xffu >> (length + 1));
      bool tails = true;
      for (size_t k = 1; k < n; ++k) {
        const auto tail = static_cast<uint8_t>(bytes[i + k]);
        tails = tails && (tail & 0xc0) == 0x80;
        code = code << 6 | (tail & 0x3fu);
      }
      if (!tails) break;
      const int open = 6 * (length - static_cast<int>(n));
      const uint32_t low = code << open, high = low + ((1u << open) - 1);
      // Some character must begin like this.
      const uint32_t least = length == 1   ? 0u
                             : length == 2 ? 0x80u
                             : length == 3 ? 0x800u
                                           : 0x10000u;
      const bool possible = high >= least && low <= 0x10ffff && !(low >= 0xd800 && high <= 0xdfff);
      if (!possible) break;
      best = n;
      complete = static_cast<int>(n) == length;
    }
    out += complete ? std::string(bytes.substr(i, best)) : "\xef\xbf\xbd";
    i += std::max<size_t>(best, 1);
  }
  return out;
}

TEST_CASE("random bytes decode as the definition says", "[runtime][unit][property]") {
  Random random(7);
  const std::string alphabet =
      "aZ\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xdf\xe0\xe6\xed\xef\xf0\xf4\xf5\xff";
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes;
    for (uint32_t n = random.Below(12); n > 0; --n) {
      bytes += alphabet[random.Below(static_cast<uint32_t>(alphabet.size()))];
    }
    REQUIRE(Text(bytes) == Reference(bytes));
  }
}

}  // namespace
}  // namespace ballast
