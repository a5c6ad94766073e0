// A request for text and what comes back of it: plain values that the server, the front end and the
// engine share.
#ifndef BALLAST_RUNTIME_GENERATION_H_
#define BALLAST_RUNTIME_GENERATION_H_

#include <cstdint>
#include <vector>

namespace ballast {

struct SamplingParams {
  double temperature = 1.0;  // 0: the most probable token, ties to the lowest id
  double top_p = 1.0;        // in (0, 1]
  uint64_t seed = 0;         // with the position, the only source of randomness
};

struct GenerationRequest {
  uint64_t id = 0;                  // unique while the server lives; given by the front end
  std::vector<int32_t> prompt;      // at least one token
  std::vector<int32_t> generated;   // sent to the client before (a resumed sequence)
  int32_t max_tokens = 16;          // counted from the end of the prompt, `generated` included
  SamplingParams sampling;
};

enum class FinishReason : uint8_t {
  kNone,       // not finished
  kStop,       // the model's end-of-text token (not delivered), or a stop string (front end)
  kLength,     // max_tokens, or the context is full
  kCancelled,  // on request, or the client went away
  kDeadline,   // the request's deadline passed
  kFailed,     // the server could not go on
};

// One step of one request. `token` is -1 when only the end is reported.
struct TokenEvent {
  uint64_t request_id = 0;
  int32_t token = -1;
  FinishReason finish = FinishReason::kNone;
  int32_t index = 0;  // of the token among those generated
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_GENERATION_H_
