#ifndef BALLAST_TESTS_SUPPORT_FAKE_RANKS_H_
#define BALLAST_TESTS_SUPPORT_FAKE_RANKS_H_

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/control_channel.h"
#include "runtime/control_frames.h"

namespace ballast::testing {

// Ranks without a model, at the other ends of a front end's channels: one thread each, that gives
// every running request one token per step. The tokens are a function of the request alone.
class FakeRanks {
 public:
  struct Options {
    int num_ranks = 1;
    std::chrono::milliseconds step{1};
    // The `index`th generated token; -1: the model ends the text. Default: ReplyToken.
    std::function<int32_t(const GenerationRequest& request, int index)> reply = {};
  };
  // What one rank was told.
  struct Heard {
    std::vector<LeaderFrame> frames;  // in order
    int running = 0;                  // sequences that are alive now
    bool stopped = false;             // got a StopFrame
  };

  explicit FakeRanks(Options options);
  ~FakeRanks();

  // The leader's ends, by rank; once.
  std::vector<std::unique_ptr<ControlChannel>> TakeChannels();
  // While held, no rank generates anything; cancellations still work.
  void Hold(bool hold) { hold_ = hold; }
  // The rank dies: its end is closed.
  void Kill(int rank);
  Heard heard(int rank) const;
  int running() const;  // over all ranks

  // A lower-case letter that depends on the prompt, the seed and the index.
  static int32_t ReplyToken(const GenerationRequest& request, int index);

 private:
  struct Rank {
    std::unique_ptr<ControlChannel> channel;
    std::atomic<bool> killed = false;
    Heard heard;  // guarded by mutex_
    std::thread thread;
  };
  void Run(Rank& rank);
  bool Listen(Rank& rank, std::map<uint64_t, GenerationRequest>& active);

  Options options_;
  mutable std::mutex mutex_;
  std::atomic<bool> hold_ = false;
  std::vector<std::unique_ptr<ControlChannel>> leader_ends_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

// Waits until `condition` holds, at most `timeout`; whether it came to hold.
bool Eventually(const std::function<bool()>& condition,
                std::chrono::milliseconds timeout = std::chrono::milliseconds(10'000));

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_FAKE_RANKS_H_
