// The bodies of `POST /v1/completions`, in the form that OpenAI's clients know.
#ifndef BALLAST_RUNTIME_COMPLETIONS_API_H_
#define BALLAST_RUNTIME_COMPLETIONS_API_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/generation.h"
#include "runtime/tokenizer.h"

namespace ballast {

// What a client asks for.
struct CompletionRequest {
  GenerationRequest generation;
  std::vector<std::string> stop;  // at most 4, none empty
  bool stream = false;
  bool return_token_ids = false;
  int64_t timeout_ms = 0;  // 0: the server's default
};

// Reads and checks a body. `drawn_seed` is the seed where the request names none.
//
// Fields: model, prompt (text, token ids, or an array of one of these), max_tokens, temperature,
// top_p, seed, stop, stream, stream_options.include_usage (the last chunk has the usage in any
// case), return_token_ids, timeout (seconds); user is ignored. Fields of OpenAI's that Ballast does
// not support may be there with their default value.
// ERRORS kInvalidArgument, "field: what is wrong and what is allowed" ("body: ..." where it is no
//        JSON object, with the position); kNotFound, "model: ...": another model is asked for
absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body,
                                                         const Tokenizer& tokenizer,
                                                         const std::string& model_name,
                                                         uint64_t drawn_seed);

// Turns the tokens of one request into the text a client may see: cut before the first stop string,
// and never showing what may still become one. The result does not depend on how many tokens arrive
// at a time.
class CompletionText {
 public:
  CompletionText(const Tokenizer& tokenizer, std::vector<std::string> stop);

  // The text that can be shown after `token`. REQUIRES !stopped()
  std::string Add(int32_t token);
  // What was held back, when the tokens have ended. REQUIRES !stopped()
  std::string Finish();
  // A stop string was found; there is no more text.
  bool stopped() const { return stopped_; }

 private:
  std::string Show(std::string text, bool last);

  Detokenizer detokenizer_;
  std::vector<std::string> stop_;
  std::string held_;  // may be the beginning of a stop string
  bool stopped_ = false;
};

// What all chunks of one answer share.
struct CompletionHeader {
  std::string id;
  std::string model;
  int64_t created = 0;  // unix seconds
};

// A piece of an answer, or all of it.
struct CompletionPart {
  std::string text;
  std::vector<int32_t> token_ids;
  FinishReason finish = FinishReason::kNone;  // kNone, kStop or kLength
};

struct CompletionUsage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
};

// The JSON object of an answer or of one chunk. `usage` nullptr: none (all chunks but the last).
std::string CompletionJson(const CompletionHeader& header, const CompletionPart& part,
                           bool with_token_ids, const CompletionUsage* usage);

// `{"error":{"message","type","param","code"}}`. The parameter is the part of the message before
// the first ": " where the status is kInvalidArgument or kNotFound.
std::string ErrorJson(const absl::Status& status);

// The HTTP status code that belongs to a status.
int HttpStatusOf(const absl::Status& status);

// One server-sent event.
std::string SseEvent(std::string_view data);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_COMPLETIONS_API_H_
