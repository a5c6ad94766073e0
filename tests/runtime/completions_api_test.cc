#include "runtime/completions_api.h"

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "base/random.h"

namespace ballast {
namespace {

using nlohmann::json;

absl::StatusOr<CompletionRequest> Parse(std::string_view body) {
  return ParseCompletionRequest(body, Tokenizer::ByteLevel(), "demo", 99);
}

// The message of the refusal.
std::string Refusal(std::string_view body) {
  const auto parsed = Parse(body);
  REQUIRE_FALSE(parsed.ok());
  return std::string(parsed.status().message());
}

TEST_CASE("a short request has the defaults", "[runtime][unit]") {
  const auto request = Parse(R"({"prompt":"Hi"})");
  REQUIRE(request.ok());
  REQUIRE(request->generation.prompt == std::vector<int32_t>{0, 72, 105});
  REQUIRE(request->generation.max_tokens == 16);
  REQUIRE(request->generation.sampling.temperature == 1.0);
  REQUIRE(request->generation.sampling.top_p == 1.0);
  REQUIRE(request->generation.sampling.seed == 99);
  REQUIRE(request->stop.empty());
  REQUIRE_FALSE(request->stream);
  REQUIRE_FALSE(request->return_token_ids);
  REQUIRE(request->timeout_ms == 0);
}

TEST_CASE("every field is read", "[runtime][unit]") {
  const auto request = Parse(R"({"model":"demo","prompt":[0,5,255],"max_tokens":3,
    "temperature":0,"top_p":0.5,"seed":-1,"stop":["a","bc"],"stream":true,"return_token_ids":true,
    "stream_options":{"include_usage":true},"timeout":1.5,"user":"me","n":1,"best_of":1,
    "echo":false,"logprobs":null,"suffix":null,"presence_penalty":0.0,"frequency_penalty":0,
    "logit_bias":{}})");
  REQUIRE(request.ok());
  REQUIRE(request->generation.prompt == std::vector<int32_t>{0, 5, 255});
  REQUIRE(request->generation.max_tokens == 3);
  REQUIRE(request->generation.sampling.temperature == 0);
  REQUIRE(request->generation.sampling.top_p == 0.5);
  REQUIRE(request->generation.sampling.seed == ~uint64_t{0});
  REQUIRE(request->stop == std::vector<std::string>{"a", "bc"});
  REQUIRE(request->stream);
  REQUIRE(request->return_token_ids);
  REQUIRE(request->timeout_ms == 1500);
}

TEST_CASE("the forms of a prompt", "[runtime][unit]") {
  REQUIRE(Parse(R"({"prompt":["Hi"]})")->generation.prompt == std::vector<int32_t>{0, 72, 105});
  REQUIRE(Parse(R"({"prompt":[[7,8]]})")->generation.prompt == std::vector<int32_t>{7, 8});
  REQUIRE(Parse(R"({"prompt":""})")->generation.prompt == std::vector<int32_t>{0});
  REQUIRE(Parse(R"({"prompt":"\u00e9\ud83d\ude00"})")->generation.prompt.size() == 7);
  REQUIRE(Parse(R"({"prompt":[]})")->generation.prompt.empty());  // the front end refuses it
  REQUIRE(Refusal(R"({"prompt":["a","b"]})").find("prompt: 2 prompts") == 0);
  REQUIRE(Refusal(R"({"prompt":[[1],[2]]})").find("prompt: 2 prompts") == 0);
  REQUIRE(Refusal(R"({"prompt":[1,"x"]})").find("prompt: \"x\" at index 1") == 0);
  REQUIRE(Refusal(R"({"prompt":[1,2.5]})").find("prompt: 2.5 at index 1") == 0);
  REQUIRE(Refusal(R"({"prompt":[-1]})").find("prompt: -1 at index 0") == 0);
  REQUIRE(Refusal(R"({"prompt":[18446744073709551615]})").find("prompt: ") == 0);
  REQUIRE(Refusal(R"({"prompt":[[["a"]]]})").find("prompt: an array at index 0") == 0);
  REQUIRE(Refusal(R"({"prompt":7})").find("prompt: 7") == 0);
  REQUIRE(Refusal(R"({})").find("prompt: it is missing") == 0);
  const auto refused = ParseCompletionRequest(R"({"prompt":"x"})", Tokenizer::None(), "demo", 1);
  REQUIRE(std::string(refused.status().message()).find("token ids") != std::string::npos);
  REQUIRE(ParseCompletionRequest(R"({"prompt":[1]})", Tokenizer::None(), "demo", 1).ok());
}

TEST_CASE("what is wrong is named with what is allowed", "[runtime][unit][errors]") {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {R"("max_tokens":0)", "max_tokens: 0 is not allowed; it must be an integer of at least 1"},
      {R"("max_tokens":1.5)", "max_tokens: 1.5 is"},
      {R"("max_tokens":"7")", "max_tokens: \"7\" is"},
      {R"("max_tokens":4294967296)", "max_tokens: 4294967296 is"},
      {R"("temperature":2.1)", "temperature: 2.1 is not allowed; it must be a number from 0 to 2"},
      {R"("temperature":-1)", "temperature: -1 is"},
      {R"("temperature":true)", "temperature: true is"},
      {R"("top_p":0)", "top_p: 0 is"},
      {R"("top_p":1.01)", "top_p: 1.01 is"},
      {R"("seed":1.0)", "seed: 1.0 is"},
      {R"("stop":"")", "stop: \"\" is"},
      {R"("stop":["a","b","c","d","e"])", "stop: an array is"},
      {R"("stop":[1])", "stop: an array is"},
      {R"("stream":1)", "stream: 1 is not allowed; it must be true or false"},
      {R"("stream_options":{"x":true})", "stream_options: an object is"},
      {R"("return_token_ids":"yes")", "return_token_ids: \"yes\" is"},
      {R"("timeout":0)", "timeout: 0 is"},
      {R"("user":5)", "user: 5 is"},
      {R"("model":5)", "model: 5 is"},
      {R"("n":2)", "n: 2 is not allowed; it must be 1 or absent"},
      {R"("best_of":3)", "best_of: 3 is"},
      {R"("echo":true)", "echo: true is"},
      {R"("logprobs":0)", "logprobs: 0 is"},
      {R"("suffix":"x")", "suffix: \"x\" is"},
      {R"("presence_penalty":0.5)", "presence_penalty: 0.5 is"},
      {R"("logit_bias":{"5":1})", "logit_bias: an object is"},
      {R"("max_token":5)", "max_token: unknown field"}};
  for (const auto& [field, message] : cases) {
    CAPTURE(field);
    const std::string refusal = Refusal(std::string(R"({"prompt":"x",)") + field + "}");
    CAPTURE(refusal);
    REQUIRE(refusal.find(message) == 0);
  }
  const auto other = Parse(R"({"prompt":"x","model":"gpt"})");
  REQUIRE(other.status().code() == absl::StatusCode::kNotFound);
}

TEST_CASE("invalid JSON is refused with its position", "[runtime][unit][errors]") {
  REQUIRE(Refusal(R"({"prompt":"x",})") == "body: invalid JSON at byte 15 of 15");
  REQUIRE(Refusal("") == "body: invalid JSON at byte 1 of 0");
  REQUIRE(Refusal("[]").find("body: an array is not allowed") == 0);
  REQUIRE(Refusal(R"({"prompt":"x","top_p":1e999})").find("body: invalid JSON") == 0);
  REQUIRE(Refusal("{\"prompt\":\"\xff\"}").find("body: invalid JSON at byte 12") == 0);
  REQUIRE(Refusal(std::string(1'000'000, '[')).find("body: invalid JSON") == 0);
  std::string deep = R"({"prompt":)" + std::string(200'000, '[') + std::string(200'000, ']') + "}";
  REQUIRE(Refusal(deep).find("prompt: ") == 0);
}

TEST_CASE("mutated bodies are read or refused", "[runtime][unit][errors]") {
  const std::string good =
      R"({"model":"demo","prompt":[0,5,255],"max_tokens":3,"temperature":0.5,"stop":["a","b"]})";
  Random random(11);
  for (int round = 0; round < 20'000; ++round) {
    std::string bad = good;
    for (uint32_t edit = 0; edit <= random.Below(3); ++edit) {
      bad[random.Below(static_cast<uint32_t>(bad.size()))] =
          random.Below(2) == 0 ? static_cast<char>(random.Below(256))
                               : good[random.Below(static_cast<uint32_t>(good.size()))];
    }
    const auto parsed = Parse(bad);
    if (!parsed.ok()) REQUIRE(json::accept(ErrorJson(parsed.status())));
  }
}

// The text shown after each token, separated by '|'.
std::string Shown(const std::string& bytes, std::vector<std::string> stop) {
  CompletionText text(Tokenizer::ByteLevel(), std::move(stop));
  std::string out;
  for (const char c : bytes) {
    out += text.Add(static_cast<uint8_t>(c));
    if (text.stopped()) return out + "#";
    out += "|";
  }
  out += text.Finish();
  return text.stopped() ? out + "#" : out;
}

TEST_CASE("text is cut before a stop string", "[runtime][unit]") {
  REQUIRE(Shown("abc", {}) == "a|b|c|");
  REQUIRE(Shown("abcd", {"c"}) == "a|b|#");
  REQUIRE(Shown("abcd", {"bc"}) == "a||#");
  REQUIRE(Shown("abxbc", {"bc"}) == "a||bx||#");
  REQUIRE(Shown("ab", {"bc"}) == "a||b");               // it might have become one
  REQUIRE(Shown("aab", {"ab"}) == "|a|#");              // the stop string overlaps itself
  REQUIRE(Shown("xabcd", {"abcd", "bc"}) == "x|||a#");  // the first to be complete
  REQUIRE(Shown("xabc", {"bc", "abc"}) == "x|||#");     // of two at one place, the longer
  REQUIRE(Shown("\xe6\x97\xa5\xe6\x9c\xac", {"\xe6\x9c\xac"}) == "||\xe6\x97\xa5|||#");
  REQUIRE(Shown("\xe6\x97", {"\xef\xbf\xbd"}) == "||#");  // found in what the end flushes
}

TEST_CASE("an answer has OpenAI's form", "[runtime][unit][golden]") {
  const CompletionHeader header{"cmpl-1", "demo", 1'700'000'000};
  const CompletionUsage usage{3, 2};
  REQUIRE(CompletionJson(header, {"hi", {104, 105}, FinishReason::kLength}, true, &usage) ==
          R"({"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"demo",)"
          R"("choices":[{"index":0,"text":"hi","logprobs":null,"finish_reason":"length",)"
          R"("token_ids":[104,105]}],)"
          R"("usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}})");
  REQUIRE(CompletionJson(header, {"hi", {}, FinishReason::kNone}, false, nullptr) ==
          R"({"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"demo",)"
          R"("choices":[{"index":0,"text":"hi","logprobs":null,"finish_reason":null}]})");
  REQUIRE(SseEvent("[DONE]") == "data: [DONE]\n\n");
}

TEST_CASE("an error has OpenAI's form", "[runtime][unit][golden]") {
  REQUIRE(ErrorJson(absl::InvalidArgumentError("top_p: 2 is not allowed")) ==
          R"({"error":{"message":"top_p: 2 is not allowed","type":"invalid_request_error",)"
          R"("param":"top_p","code":null}})");
  REQUIRE(json::parse(ErrorJson(absl::UnavailableError("x: y")))["error"]["param"].is_null());
  REQUIRE(HttpStatusOf(absl::ResourceExhaustedError("")) == 429);
  REQUIRE(HttpStatusOf(absl::DeadlineExceededError("")) == 504);
  REQUIRE(HttpStatusOf(absl::UnavailableError("")) == 503);
  REQUIRE(HttpStatusOf(absl::NotFoundError("")) == 404);
}

}  // namespace
}  // namespace ballast
