#ifndef BALLAST_RUNTIME_SERVER_STATE_H_
#define BALLAST_RUNTIME_SERVER_STATE_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"
#include "placement/rules.h"

namespace ballast {

// What a server knows that it would have to learn again after a restart: where its experts are, and
// the load of the recent past.
struct ServerState {
  std::string model;     // name of the model
  PlacementRules rules;  // that the placement keeps
  Placement placement;
  int64_t window_tokens = 0;         // tokens in the window
  std::vector<int64_t> window_load;  // [num_layers * E] copies per logical expert in it
};

// {"schema":1,"model":..,"coverage":..,"node_local":..,"window_tokens":..,
//  "window_load":[[per expert],..],"placement":{Placement::ToJson}}
std::string ToJson(const ServerState& state);
// ERRORS kInvalidArgument names the key, its value and what is allowed
absl::StatusOr<ServerState> ParseServerState(const std::string& json);

// Whether a server that would start with `fresh` (of which the load does not matter) can go on from
// `state`.
// ERRORS kFailedPrecondition says what does not fit: the model, its shape, the ranks, their slots
// or
//        nodes, rules that `state` does not keep
absl::Status CheckFits(const ServerState& state, const ServerState& fresh);

// Keeps the state in a file, so that a restart can go on from it: at the start of every period in
// which it changed, and at the end. A failed attempt leaves the file as it was, and is repeated
// with the next period. One thread of its own: a slow disk holds up nobody.
// THREADS made and destroyed by any thread
class StateKeeper {
 public:
  struct Options {
    std::string path;
    int64_t period_ms = 30'000;
    // The state as it is now, or null where there is none to keep. Called from the thread.
    std::function<std::shared_ptr<const ServerState>()> state;
    // Told of each attempt to write.
    std::function<void(const absl::Status&)> on_written;
  };
  explicit StateKeeper(Options options);
  // Writes a last time.
  ~StateKeeper();

 private:
  void Loop();
  void Write();

  const Options options_;
  std::shared_ptr<const ServerState> written_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;  // protected by mutex_
  std::thread thread_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_SERVER_STATE_H_
