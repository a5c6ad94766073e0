#include "runtime/completions_api.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr size_t kMaxStops = 4;
constexpr size_t kMaxShown = 60;  // bytes of a client's value in a message
constexpr double kMaxTimeoutSeconds = 86'400;
constexpr double kMaxTemperature = 2;

constexpr std::array kKnownFields = {
    "model", "prompt", "max_tokens",     "temperature",      "top_p",   "seed",
    "stop",  "stream", "stream_options", "return_token_ids", "timeout", "user"};

// A field that Ballast does not support, and the value with which it may be there.
struct Unsupported {
  const char* field;
  json default_value;
};

const std::vector<Unsupported>& UnsupportedFields() {
  static const std::vector<Unsupported> fields = {{"n", 1},
                                                  {"best_of", 1},
                                                  {"echo", false},
                                                  {"logprobs", nullptr},
                                                  {"suffix", nullptr},
                                                  {"presence_penalty", 0},
                                                  {"frequency_penalty", 0},
                                                  {"logit_bias", json::object()}};
  return fields;
}

// The value as a message can show it.
std::string Show(const json& value) {
  if (value.is_structured()) return value.is_array() ? "an array" : "an object";
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

absl::Status Refuse(const char* field, const json& value, const std::string& allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", Show(value), " is not allowed; it must be ", allowed));
}

// The field, or nullptr where it is absent or null.
const json* Find(const json& body, const char* field) {
  const auto it = body.find(field);
  return it == body.end() || it->is_null() ? nullptr : &*it;
}

absl::Status ReadBool(const json& body, const char* field, bool* out) {
  const json* value = Find(body, field);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_boolean()) return Refuse(field, *value, "true or false");
  *out = value->get<bool>();
  return absl::OkStatus();
}

absl::Status ReadNumber(const json& body, const char* field, const std::string& allowed,
                        bool (*is_allowed)(double), double* out) {
  const json* value = Find(body, field);
  if (value == nullptr) return absl::OkStatus();
  if (!value->is_number() || !is_allowed(value->get<double>())) {
    return Refuse(field, *value, allowed);
  }
  *out = value->get<double>();
  return absl::OkStatus();
}

// The integer, if it is one and fits.
std::optional<int32_t> Int32(const json& value) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > uint64_t{std::numeric_limits<int32_t>::max()}) {
    return std::nullopt;
  }
  const auto number = value.get<int64_t>();
  if (number < std::numeric_limits<int32_t>::min()) return std::nullopt;
  return static_cast<int32_t>(number);
}

absl::StatusOr<json> ParseObject(std::string_view body) {
  try {
    json parsed = json::parse(body);
    if (parsed.is_object()) return parsed;
    return absl::InvalidArgumentError(
        absl::StrCat("body: ", Show(parsed), " is not allowed; it must be a JSON object"));
  } catch (const json::parse_error& error) {
    return absl::InvalidArgumentError(
        absl::StrCat("body: invalid JSON at byte ", error.byte, " of ", body.size()));
  } catch (const json::exception&) {
    return absl::InvalidArgumentError("body: invalid JSON: a number is out of range");
  }
}

absl::Status CheckFieldNames(const json& body) {
  for (const auto& item : body.items()) {
    const std::string& field = item.key();
    const auto is_named = [&](const char* name) { return field == name; };
    if (std::any_of(kKnownFields.begin(), kKnownFields.end(), is_named)) continue;
    const auto& unsupported = UnsupportedFields();
    const auto it = std::find_if(unsupported.begin(), unsupported.end(),
                                 [&](const Unsupported& u) { return field == u.field; });
    if (it == unsupported.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(field.substr(0, kMaxShown), ": unknown field"));
    }
    if (!item.value().is_null() && item.value() != it->default_value) {
      return Refuse(it->field, item.value(),
                    absl::StrCat(it->default_value.dump(),
                                 " or absent: Ballast does not support "
                                 "this field"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ReadTokenIds(const json& ids) {
  std::vector<int32_t> tokens;
  tokens.reserve(ids.size());
  for (const json& id : ids) {
    const std::optional<int32_t> token = Int32(id);
    if (!token.has_value() || *token < 0) {
      return absl::InvalidArgumentError(absl::StrCat("prompt: ", Show(id), " at index ",
                                                     tokens.size(),
                                                     " is not allowed; it must be a token id"));
    }
    tokens.push_back(*token);
  }
  return tokens;
}

absl::StatusOr<std::vector<int32_t>> ReadPrompt(const json& body, const Tokenizer& tokenizer) {
  const json* prompt = Find(body, "prompt");
  if (prompt == nullptr) {
    return absl::InvalidArgumentError("prompt: it is missing; text or an array of token ids");
  }
  const bool is_batch = prompt->is_array() && !prompt->empty() &&
                        (prompt->front().is_string() || prompt->front().is_array());
  if (is_batch) {
    if (prompt->size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("prompt: ", prompt->size(), " prompts in one request; only one is allowed"));
    }
    prompt = &prompt->front();
  }
  if (prompt->is_string()) return tokenizer.Encode(prompt->get_ref<const std::string&>());
  if (prompt->is_array()) return ReadTokenIds(*prompt);
  return Refuse("prompt", *prompt, "text or an array of token ids");
}

absl::Status ReadStop(const json& body, std::vector<std::string>* out) {
  constexpr char kAllowed[] = "text or an array of at most 4 texts, none of them empty";
  const json* stop = Find(body, "stop");
  if (stop == nullptr) return absl::OkStatus();
  const auto is_text = [](const json& value) {
    return value.is_string() && !value.get_ref<const std::string&>().empty();
  };
  if (is_text(*stop)) {
    out->push_back(stop->get<std::string>());
    return absl::OkStatus();
  }
  if (!stop->is_array()) return Refuse("stop", *stop, kAllowed);
  const auto wrong = std::find_if_not(stop->begin(), stop->end(), is_text);
  if (wrong != stop->end() || stop->size() > kMaxStops) {
    const std::string what = wrong != stop->end() ? absl::StrCat("that has ", Show(*wrong))
                                                  : absl::StrCat("of ", stop->size());
    return absl::InvalidArgumentError(
        absl::StrCat("stop: an array is given ", what, "; it must be ", kAllowed));
  }
  for (const json& text : *stop) out->push_back(text.get<std::string>());
  return absl::OkStatus();
}

absl::Status ReadSampling(const json& body, uint64_t drawn_seed, SamplingParams* out) {
  BALLAST_RETURN_IF_ERROR(ReadNumber(
      body, "temperature", "a number from 0 to 2",
      [](double t) { return t >= 0 && t <= kMaxTemperature; }, &out->temperature));
  BALLAST_RETURN_IF_ERROR(ReadNumber(
      body, "top_p", "a number above 0 and at most 1", [](double p) { return p > 0 && p <= 1; },
      &out->top_p));
  out->seed = drawn_seed;
  if (const json* seed = Find(body, "seed")) {
    if (!seed->is_number_integer()) return Refuse("seed", *seed, "a 64-bit integer");
    out->seed = seed->is_number_unsigned() ? seed->get<uint64_t>()
                                           : static_cast<uint64_t>(seed->get<int64_t>());
  }
  return absl::OkStatus();
}

// The fields that change nothing: their types, and the name of the model.
absl::Status CheckNeutralFields(const json& body, const std::string& model_name) {
  if (const json* model = Find(body, "model")) {
    if (!model->is_string()) return Refuse("model", *model, "the name of the model");
    if (*model != model_name) {
      return absl::NotFoundError(absl::StrCat(
          "model: ", Show(*model), " is not served here; this server has \"", model_name, "\""));
    }
  }
  if (const json* user = Find(body, "user")) {
    if (!user->is_string()) return Refuse("user", *user, "text");
  }
  if (const json* options = Find(body, "stream_options")) {
    constexpr char kAllowed[] = "an object with include_usage (true or false) at most";
    if (!options->is_object()) return Refuse("stream_options", *options, kAllowed);
    for (const auto& item : options->items()) {
      if (item.key() != "include_usage" || !item.value().is_boolean()) {
        return Refuse("stream_options", *options, kAllowed);
      }
    }
  }
  return absl::OkStatus();
}

const char* NameOf(FinishReason reason) {
  return reason == FinishReason::kLength ? "length" : "stop";
}

std::string Dump(const ordered_json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

}  // namespace

absl::StatusOr<CompletionRequest> ParseCompletionRequest(std::string_view body,
                                                         const Tokenizer& tokenizer,
                                                         const std::string& model_name,
                                                         uint64_t drawn_seed) {
  BALLAST_ASSIGN_OR_RETURN(const json parsed, ParseObject(body));
  BALLAST_RETURN_IF_ERROR(CheckFieldNames(parsed));
  BALLAST_RETURN_IF_ERROR(CheckNeutralFields(parsed, model_name));
  CompletionRequest request;
  BALLAST_ASSIGN_OR_RETURN(request.generation.prompt, ReadPrompt(parsed, tokenizer));
  if (const json* max_tokens = Find(parsed, "max_tokens")) {
    const std::optional<int32_t> number = Int32(*max_tokens);
    if (!number.has_value() || *number < 1) {
      return Refuse("max_tokens", *max_tokens, "an integer of at least 1");
    }
    request.generation.max_tokens = *number;
  }
  BALLAST_RETURN_IF_ERROR(ReadSampling(parsed, drawn_seed, &request.generation.sampling));
  BALLAST_RETURN_IF_ERROR(ReadStop(parsed, &request.stop));
  BALLAST_RETURN_IF_ERROR(ReadBool(parsed, "stream", &request.stream));
  BALLAST_RETURN_IF_ERROR(ReadBool(parsed, "return_token_ids", &request.return_token_ids));
  double timeout_seconds = 0;
  BALLAST_RETURN_IF_ERROR(ReadNumber(
      parsed, "timeout", "a number of seconds from 0.001 to 86400",
      [](double seconds) { return seconds >= 0.001 && seconds <= kMaxTimeoutSeconds; },
      &timeout_seconds));
  request.timeout_ms = static_cast<int64_t>(timeout_seconds * 1000 + 0.5);
  return request;
}

// ---- text --------------------------------------------------------------------------------------

CompletionText::CompletionText(const Tokenizer& tokenizer, std::vector<std::string> stop)
    : detokenizer_(tokenizer), stop_(std::move(stop)) {}

std::string CompletionText::Add(int32_t token) {
  BALLAST_CHECK(!stopped_);
  return Show(detokenizer_.Add(token), /*last=*/false);
}

std::string CompletionText::Finish() {
  BALLAST_CHECK(!stopped_);
  return Show(detokenizer_.Flush(), /*last=*/true);
}

std::string CompletionText::Show(std::string text, bool last) {
  held_ += text;
  // The stop string that is complete first decides; of those, the longest one.
  size_t cut = std::string::npos, cut_end = std::string::npos;
  for (const std::string& stop : stop_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    const size_t end = at + stop.size();
    if (end < cut_end || (end == cut_end && at < cut)) {
      cut = at;
      cut_end = end;
    }
  }
  if (cut != std::string::npos) {
    stopped_ = true;
    return held_.substr(0, cut);
  }
  size_t hold = 0;  // the longest end of held_ that begins a stop string
  for (const std::string& stop : stop_) {
    const std::string_view all(held_);
    for (size_t n = std::min(stop.size() - 1, all.size()); !last && n > hold; --n) {
      if (all.ends_with(std::string_view(stop).substr(0, n))) hold = n;
    }
  }
  std::string shown = held_.substr(0, held_.size() - hold);
  held_.erase(0, held_.size() - hold);
  return shown;
}

// ---- answers -----------------------------------------------------------------------------------

std::string CompletionJson(const CompletionHeader& header, const CompletionPart& part,
                           bool with_token_ids, const CompletionUsage* usage) {
  ordered_json choice = {{"index", 0}, {"text", part.text}, {"logprobs", nullptr}};
  choice["finish_reason"] = part.finish == FinishReason::kNone ? ordered_json(nullptr)
                                                               : ordered_json(NameOf(part.finish));
  if (with_token_ids) choice["token_ids"] = part.token_ids;
  ordered_json answer = {{"id", header.id},
                         {"object", "text_completion"},
                         {"created", header.created},
                         {"model", header.model},
                         {"choices", ordered_json::array({std::move(choice)})}};
  if (usage != nullptr) {
    answer["usage"] = {{"prompt_tokens", usage->prompt_tokens},
                       {"completion_tokens", usage->completion_tokens},
                       {"total_tokens", usage->prompt_tokens + usage->completion_tokens}};
  }
  return Dump(answer);
}

std::string ErrorJson(const absl::Status& status) {
  const std::string message(status.message());
  ordered_json param = nullptr, code = nullptr;
  const char* type = "server_error";
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      code = "model_not_found";
      [[fallthrough]];
    case absl::StatusCode::kInvalidArgument:
      type = "invalid_request_error";
      if (const size_t colon = message.find(": "); colon != std::string::npos) {
        param = message.substr(0, colon);
      }
      break;
    case absl::StatusCode::kFailedPrecondition:
      type = "invalid_request_error";
      code = "wrong_state";
      break;
    case absl::StatusCode::kResourceExhausted:
      type = "rate_limit_error";
      code = "queue_full";
      break;
    case absl::StatusCode::kDeadlineExceeded:
      type = "timeout_error";
      code = "deadline_exceeded";
      break;
    default:
      break;
  }
  return Dump(
      {{"error", {{"message", message}, {"type", type}, {"param", param}, {"code", code}}}});
}

int HttpStatusOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
      return 400;
    case absl::StatusCode::kPermissionDenied:
      return 403;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kFailedPrecondition:
      return 409;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string SseEvent(std::string_view data) {
  return std::string("data: ").append(data).append("\n\n");
}

}  // namespace ballast
