#ifndef BALLAST_RUNTIME_TOKENIZER_H_
#define BALLAST_RUNTIME_TOKENIZER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

// Text to token ids. Knows one tokenizer: a token is a byte, its id the byte's value, and id 0
// (NUL) both begins and ends a document. Other models are served by token ids alone.
class Tokenizer {
 public:
  // Reads DIR/tokenizer_config.json. A folder without that file, or with another tokenizer_class,
  // gives a tokenizer that cannot read text.
  // ERRORS kInvalidArgument: the file is there and is not a JSON object
  static absl::StatusOr<Tokenizer> Load(const std::string& model_dir);

  static Tokenizer ByteLevel() { return Tokenizer(true); }
  static Tokenizer None() { return Tokenizer(false); }

  bool reads_text() const { return reads_text_; }

  // The id of the beginning of a document, then one id per byte.
  // ERRORS kInvalidArgument, "prompt: ...": the tokenizer cannot read text
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text) const;

 private:
  explicit Tokenizer(bool reads_text) : reads_text_(reads_text) {}
  bool reads_text_;
};

// Token ids to text, token by token. What it returns is valid UTF-8: bytes of an unfinished
// character are held back until the character is complete, and a maximal run of bytes that begins
// like a character and cannot become one gives a U+FFFD.
//
// SOURCE WHATWG Encoding Standard, "UTF-8 decoder"
class Detokenizer {
 public:
  explicit Detokenizer(const Tokenizer& tokenizer) : reads_text_(tokenizer.reads_text()) {}

  // The text that `token` completes; always empty where the tokenizer cannot read text. An id that
  // is no byte counts as an invalid one.
  std::string Add(int32_t token);
  // What is still held back, at the end.
  std::string Flush();

 private:
  void AddByte(uint8_t byte, std::string& out);
  void EndInvalid(std::string& out);

  bool reads_text_;
  std::string held_;      // the bytes of an unfinished character
  int missing_ = 0;       // how many bytes it lacks
  uint8_t lower_ = 0x80;  // the range of its next byte
  uint8_t upper_ = 0xbf;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_TOKENIZER_H_
