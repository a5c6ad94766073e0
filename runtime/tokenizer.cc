#include "runtime/tokenizer.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/status.h"

namespace ballast {
namespace {

constexpr int32_t kDocumentStart = 0;
constexpr char kReplacement[] = "\xef\xbf\xbd";  // U+FFFD

}  // namespace

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& model_dir) {
  const std::string path = model_dir + "/tokenizer_config.json";
  std::ifstream file(path);
  if (!file) return None();
  const auto config = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  }
  const auto name = config.find("tokenizer_class");
  return name != config.end() && *name == "ByteLevelTokenizer" ? ByteLevel() : None();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text) const {
  if (!reads_text_) {
    return absl::InvalidArgumentError(
        "prompt: Ballast has no tokenizer for this model; send an array of token ids instead of "
        "text");
  }
  std::vector<int32_t> tokens;
  tokens.reserve(text.size() + 1);
  tokens.push_back(kDocumentStart);
  for (const char c : text) tokens.push_back(static_cast<uint8_t>(c));
  return tokens;
}

std::string Detokenizer::Add(int32_t token) {
  std::string out;
  if (!reads_text_) return out;
  if (token >= 0 && token <= 0xff) {
    AddByte(static_cast<uint8_t>(token), out);
  } else {
    EndInvalid(out);
    out += kReplacement;
  }
  return out;
}

std::string Detokenizer::Flush() {
  std::string out;
  EndInvalid(out);
  return out;
}

// What is held back will never be a character.
void Detokenizer::EndInvalid(std::string& out) {
  if (!held_.empty()) out += kReplacement;
  held_.clear();
  missing_ = 0;
  lower_ = 0x80;
  upper_ = 0xbf;
}

void Detokenizer::AddByte(uint8_t byte, std::string& out) {
  if (missing_ > 0 && (byte < lower_ || byte > upper_)) EndInvalid(out);
  if (missing_ > 0) {
    lower_ = 0x80;
    upper_ = 0xbf;
    held_ += static_cast<char>(byte);
    if (--missing_ == 0) {
      out += held_;
      held_.clear();
    }
    return;
  }
  if (byte < 0x80) {
    out += static_cast<char>(byte);
    return;
  }
  if (byte < 0xc2 || byte > 0xf4) {
    out += kReplacement;
    return;
  }
  // The second byte's range excludes overlong forms, surrogates and what is beyond U+10FFFF.
  missing_ = byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
  if (byte == 0xe0) lower_ = 0xa0;
  if (byte == 0xed) upper_ = 0x9f;
  if (byte == 0xf0) lower_ = 0x90;
  if (byte == 0xf4) upper_ = 0x8f;
  held_ = static_cast<char>(byte);
}

}  // namespace ballast
