#include "runtime/frontend.h"

#include <time.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>

#include "tests/support/fake_ranks.h"

namespace ballast {
namespace {

using testing::Eventually;
using testing::FakeRanks;

const FrontendOptions kOptions{
    .max_pending = 8, .request_timeout_ms = 60'000, .context_tokens = 64, .vocab_size = 256};

class Recorder : public TokenSink {
 public:
  void OnEvent(const TokenEvent& event) override {
    const std::lock_guard lock(mutex_);
    after_end_ = after_end_ || finish_ != FinishReason::kNone;
    if (event.token >= 0) tokens_.push_back(event.token);
    finish_ = event.finish;
  }
  FinishReason finish() const {
    const std::lock_guard lock(mutex_);
    return finish_;
  }
  // Waits for the end.
  FinishReason Finish() const {
    Eventually([this] { return finish() != FinishReason::kNone; });
    return finish();
  }
  std::vector<int32_t> tokens() const {
    const std::lock_guard lock(mutex_);
    return tokens_;
  }
  bool after_end() const {
    const std::lock_guard lock(mutex_);
    return after_end_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<int32_t> tokens_;
  FinishReason finish_ = FinishReason::kNone;
  bool after_end_ = false;
};

struct Failure {
  std::atomic<int> calls = 0;
  std::atomic<int> rank = -1;
};

std::unique_ptr<Frontend> Start(FakeRanks& ranks, const FrontendOptions& options = kOptions,
                                Failure* failure = nullptr) {
  auto frontend =
      Frontend::Create(options, ranks.TakeChannels(), [failure](int rank, const absl::Status&) {
        if (failure == nullptr) return;
        failure->rank = rank;
        ++failure->calls;
      });
  REQUIRE(frontend.ok());
  return std::move(*frontend);
}

GenerationRequest Request(int prompt_tokens, int max_tokens) {
  GenerationRequest request;
  request.prompt.assign(static_cast<size_t>(prompt_tokens), 65);
  request.max_tokens = max_tokens;
  return request;
}

TEST_CASE("a request gets its tokens and its end", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 2});
  const auto frontend = Start(ranks);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<Recorder>());
    auto request = Request(3, 5);
    request.sampling.seed = static_cast<uint64_t>(i);
    REQUIRE(frontend->Submit(request, sinks.back()).ok());
  }
  for (int i = 0; i < 6; ++i) {
    const auto& sink = sinks[static_cast<size_t>(i)];
    REQUIRE(sink->Finish() == FinishReason::kLength);
    auto request = Request(3, 5);
    request.sampling.seed = static_cast<uint64_t>(i);
    for (int k = 0; k < 5; ++k) {
      REQUIRE(sink->tokens()[static_cast<size_t>(k)] == FakeRanks::ReplyToken(request, k));
    }
    REQUIRE_FALSE(sink->after_end());
  }
  const FrontendStats stats = frontend->stats();
  REQUIRE(stats.accepted == 6);
  REQUIRE(stats.finished == 6);
  REQUIRE(stats.tokens_generated == 30);
  REQUIRE(stats.pending == 0);
}

TEST_CASE("the rank with the fewest outstanding tokens gets the request", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 3});
  ranks.Hold(true);
  const auto frontend = Start(ranks);
  // work: 20 -> rank 0, 5 -> rank 1, 6 -> rank 2, 4 -> rank 1 (9), 1 -> rank 2 (7), then rank 2.
  const std::vector<std::pair<int, int>> sizes = {{10, 10}, {2, 3}, {3, 3}, {2, 2}, {1, 1}};
  for (const auto& [prompt, max_tokens] : sizes) {
    REQUIRE(frontend->Submit(Request(prompt, max_tokens), std::make_shared<Recorder>()).ok());
  }
  REQUIRE(frontend->Submit(Request(1, 1), std::make_shared<Recorder>()).ok());
  REQUIRE(Eventually([&] { return ranks.running() == 6; }));
  REQUIRE(ranks.heard(0).running == 1);
  REQUIRE(ranks.heard(1).running == 2);
  REQUIRE(ranks.heard(2).running == 3);
}

TEST_CASE("every rank hears each number once and in order", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 3});
  const auto frontend = Start(ranks);
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        const auto id = frontend->Submit(Request(1, 2), std::make_shared<Recorder>());
        if (id.ok() && i % 3 == 0) frontend->Cancel(*id);
        if (i % 5 == 0) frontend->BroadcastPlan({std::byte{1}}).IgnoreError();
      }
    });
  }
  for (auto& caller : callers) caller.join();
  frontend->DrainAndStop(10'000);
  REQUIRE(Eventually([&] { return ranks.heard(2).stopped && ranks.heard(1).stopped; }));
  REQUIRE(Eventually([&] { return ranks.heard(0).stopped; }));
  const size_t count = ranks.heard(0).frames.size();
  for (int r = 0; r < 3; ++r) {
    const auto frames = ranks.heard(r).frames;
    REQUIRE(frames.size() == count);
    for (size_t i = 0; i < count; ++i) REQUIRE(frames[i].wake_seq == i + 1);
  }
  // One rank is told what the others only wake for; a plan and the end are for all.
  for (size_t i = 0; i < count; ++i) {
    int wakes = 0, plans = 0, stops = 0;
    for (int r = 0; r < 3; ++r) {
      const LeaderFrame frame = ranks.heard(r).frames[i];
      wakes += std::holds_alternative<WakeFrame>(frame.body);
      plans += std::holds_alternative<PlanFrame>(frame.body);
      stops += std::holds_alternative<StopFrame>(frame.body);
    }
    REQUIRE((wakes == 2 || plans == 3 || stops == 3));
  }
}

TEST_CASE("a cancelled request ends at once and its rank is told", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 1});
  ranks.Hold(true);
  const auto frontend = Start(ranks);
  const auto sink = std::make_shared<Recorder>();
  const auto id = frontend->Submit(Request(1, 50), sink);
  REQUIRE(id.ok());
  REQUIRE(Eventually([&] { return ranks.running() == 1; }));
  frontend->Cancel(*id + 1);
  frontend->Cancel(*id);
  REQUIRE(sink->Finish() == FinishReason::kCancelled);
  REQUIRE(Eventually([&] { return ranks.running() == 0; }));
  frontend->Cancel(*id);
  const auto stopped = std::make_shared<Recorder>();
  const auto second = frontend->Submit(Request(1, 50), stopped);
  REQUIRE(second.ok());
  frontend->Cancel(*second, FinishReason::kStop);
  REQUIRE(stopped->Finish() == FinishReason::kStop);
  REQUIRE(frontend->stats().cancelled == 1);
  REQUIRE(frontend->stats().finished == 1);
}

TEST_CASE("a deadline ends a request", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 2});
  ranks.Hold(true);
  const auto frontend = Start(ranks);
  const auto patient = std::make_shared<Recorder>();
  const auto hasty = std::make_shared<Recorder>();
  REQUIRE(frontend->Submit(Request(1, 5), patient).ok());
  REQUIRE(frontend->Submit(Request(1, 5), hasty, 20).ok());
  REQUIRE(hasty->Finish() == FinishReason::kDeadline);
  REQUIRE(patient->finish() == FinishReason::kNone);
  REQUIRE(Eventually([&] { return ranks.running() == 1; }));
  REQUIRE(frontend->stats().deadline == 1);
  ranks.Hold(false);
  REQUIRE(patient->Finish() == FinishReason::kLength);
}

TEST_CASE("a full queue refuses and takes again when there is room", "[runtime][unit][errors]") {
  FakeRanks ranks({.num_ranks = 1});
  ranks.Hold(true);
  const auto frontend = Start(ranks);
  for (int i = 0; i < kOptions.max_pending; ++i) {
    REQUIRE(frontend->Submit(Request(1, 1), std::make_shared<Recorder>()).ok());
  }
  const auto refused = frontend->Submit(Request(1, 1), std::make_shared<Recorder>());
  REQUIRE(refused.status().code() == absl::StatusCode::kResourceExhausted);
  REQUIRE(frontend->stats().rejected == 1);
  ranks.Hold(false);
  REQUIRE(Eventually([&] { return frontend->stats().pending == 0; }));
  REQUIRE(frontend->Submit(Request(1, 1), std::make_shared<Recorder>()).ok());
}

TEST_CASE("a request that cannot be is refused by field", "[runtime][unit][errors]") {
  FakeRanks ranks({.num_ranks = 1});
  const auto frontend = Start(ranks);
  const auto refusal = [&](const std::function<void(GenerationRequest&)>& change) {
    auto request = Request(2, 2);
    change(request);
    const auto id = frontend->Submit(request, std::make_shared<Recorder>());
    REQUIRE(id.status().code() == absl::StatusCode::kInvalidArgument);
    const std::string message(id.status().message());
    return message.substr(0, message.find(':'));
  };
  REQUIRE(refusal([](auto& r) { r.prompt.clear(); }) == "prompt");
  REQUIRE(refusal([](auto& r) { r.prompt.resize(64); }) == "prompt");
  REQUIRE(refusal([](auto& r) { r.prompt[1] = 256; }) == "prompt");
  REQUIRE(refusal([](auto& r) { r.prompt[1] = -1; }) == "prompt");
  REQUIRE(refusal([](auto& r) { r.max_tokens = 0; }) == "max_tokens");
  REQUIRE(refusal([](auto& r) { r.sampling.temperature = -0.5; }) == "temperature");
  REQUIRE(refusal([](auto& r) {
            r.sampling.temperature = std::numeric_limits<double>::quiet_NaN();
          }) == "temperature");
  REQUIRE(refusal([](auto& r) { r.sampling.top_p = 0; }) == "top_p");
  REQUIRE(refusal([](auto& r) { r.sampling.top_p = 1.5; }) == "top_p");
}

TEST_CASE("a drain finishes what runs and then stops the ranks", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 2, .step = std::chrono::milliseconds(5)});
  Failure failure;
  const auto frontend = Start(ranks, kOptions, &failure);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int i = 0; i < 4; ++i) {
    sinks.push_back(std::make_shared<Recorder>());
    REQUIRE(frontend->Submit(Request(1, 10), sinks.back()).ok());
  }
  REQUIRE(frontend->accepting());
  frontend->DrainAndStop(10'000);
  for (const auto& sink : sinks) {
    REQUIRE(sink->finish() == FinishReason::kLength);
    REQUIRE(sink->tokens().size() == 10);
  }
  REQUIRE_FALSE(frontend->accepting());
  REQUIRE(frontend->Submit(Request(1, 1), sinks[0]).status().code() ==
          absl::StatusCode::kUnavailable);
  REQUIRE(Eventually([&] { return ranks.heard(0).stopped && ranks.heard(1).stopped; }));
  frontend->DrainAndStop(10);
  REQUIRE(failure.calls == 0);
}

TEST_CASE("a drain that takes too long cancels the rest", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 1});
  ranks.Hold(true);
  const auto frontend = Start(ranks);
  const auto sink = std::make_shared<Recorder>();
  REQUIRE(frontend->Submit(Request(1, 10), sink).ok());
  frontend->DrainAndStop(30);
  REQUIRE(sink->finish() == FinishReason::kCancelled);
  REQUIRE(Eventually([&] { return ranks.heard(0).stopped; }));
}

TEST_CASE("a broken channel fails every request and is reported once", "[runtime][unit][errors]") {
  FakeRanks ranks({.num_ranks = 3});
  ranks.Hold(true);
  Failure failure;
  const auto frontend = Start(ranks, kOptions, &failure);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<Recorder>());
    REQUIRE(frontend->Submit(Request(1, 10), sinks.back()).ok());
  }
  ranks.Kill(1);
  for (const auto& sink : sinks) REQUIRE(sink->Finish() == FinishReason::kFailed);
  REQUIRE(Eventually([&] { return failure.calls == 1; }));
  REQUIRE(failure.rank == 1);
  REQUIRE(frontend->Submit(Request(1, 1), sinks[0]).status().code() ==
          absl::StatusCode::kUnavailable);
  REQUIRE_FALSE(frontend->accepting());
  frontend->DrainAndStop(1'000);
  REQUIRE(Eventually([&] { return ranks.heard(0).stopped && ranks.heard(2).stopped; }));
  REQUIRE(failure.calls == 1);
}

FrontendOptions Surviving() {
  FrontendOptions options = kOptions;
  options.survive_losses = true;
  return options;
}

TEST_CASE("requests of a lost rank go on at the others and get every token once",
          "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 3});
  Failure failure;
  const auto frontend = Start(ranks, Surviving(), &failure);
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int i = 0; i < 6; ++i) {
    sinks.push_back(std::make_shared<Recorder>());
    auto request = Request(3, 50);
    request.sampling.seed = static_cast<uint64_t>(i);
    REQUIRE(frontend->Submit(request, sinks.back()).ok());
  }
  REQUIRE(Eventually([&] { return sinks[1]->tokens().size() > 5; }));
  ranks.Kill(1);
  for (int i = 0; i < 6; ++i) {
    const auto& sink = sinks[static_cast<size_t>(i)];
    REQUIRE(sink->Finish() == FinishReason::kLength);
    auto request = Request(3, 50);
    request.sampling.seed = static_cast<uint64_t>(i);
    const std::vector<int32_t> tokens = sink->tokens();
    REQUIRE(tokens.size() == 50);
    for (int k = 0; k < 50; ++k) REQUIRE(tokens[k] == FakeRanks::ReplyToken(request, k));
    REQUIRE_FALSE(sink->after_end());
  }
  REQUIRE(frontend->stats().moved == 2);
  REQUIRE(frontend->accepting());
  REQUIRE(failure.calls == 0);
  // The next loss leaves rank 0 alone; its own loss is the end.
  ranks.Kill(2);
  const auto last = std::make_shared<Recorder>();
  REQUIRE(Eventually([&] { return frontend->rank_states()[2] == Frontend::RankState::kLost; }));
  REQUIRE(frontend->Submit(Request(1, 5), last).ok());
  REQUIRE(last->Finish() == FinishReason::kLength);
  ranks.Kill(0);
  REQUIRE(Eventually([&] { return failure.calls == 1; }));
  REQUIRE(failure.rank == 0);
}

TEST_CASE("a rank that is silent for too long is lost", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 2, .step = std::chrono::milliseconds(20)});
  FrontendOptions options = Surviving();
  options.silence_ms = 3000;
  const auto frontend = Start(ranks, options);
  std::this_thread::sleep_for(std::chrono::milliseconds(3500));
  // They have not begun to speak.
  using State = Frontend::RankState;
  REQUIRE(frontend->rank_states() == std::vector<State>{State::kServes, State::kServes});
  const auto first = std::make_shared<Recorder>(), second = std::make_shared<Recorder>();
  REQUIRE(frontend->Submit(Request(1, 250), first).ok());  // keeps rank 0 busy for five seconds
  REQUIRE(frontend->Submit(Request(1, 2), second).ok());
  REQUIRE(second->Finish() == FinishReason::kLength);
  REQUIRE(Eventually([&] { return frontend->rank_states()[1] == State::kLost; }));
  REQUIRE(first->Finish() == FinishReason::kLength);
  REQUIRE(first->tokens().size() == 250);
}

// Channels whose ranks are the test itself.
struct Ends {
  explicit Ends(int num_ranks) {
    for (int r = 0; r < num_ranks; ++r) {
      auto pair = ControlChannel::MakePair();
      REQUIRE(pair.ok());
      leader.push_back(std::move(pair->first));
      ranks.push_back(std::move(pair->second));
    }
  }
  bool Say(int rank, const RankFrame& frame) {
    return ranks[static_cast<size_t>(rank)]->Send(Serialize(frame)).ok();
  }
  // The next frame from the leader.
  LeaderFrame Hear(int rank) {
    std::optional<LeaderFrame> heard;
    REQUIRE(Eventually([&] {
      auto bytes = ranks[static_cast<size_t>(rank)]->TryReceive();
      if (bytes.ok() && bytes->has_value()) heard = *ParseLeaderFrame(**bytes);
      return heard.has_value();
    }));
    return *heard;
  }
  std::vector<std::unique_ptr<ControlChannel>> leader, ranks;
};

// A process that is stopped for a while (SIGSTOP, a paused machine) has heard nobody: that is not
// the fault of the others.
TEST_CASE("nobody is lost for the time in which the front end itself was away", "[runtime][unit]") {
  constexpr int kRanks = 3;
  Ends ends(kRanks);
  FrontendOptions options = Surviving();
  options.silence_ms = 1000;
  std::atomic<int> lost = 0;
  std::atomic<bool> back = false;
  options.on_lost = [&](int, const absl::Status&) { ++lost; };
  options.on_verified = [&](int, const VerifiedFrame&) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2500));
    back = true;
  };
  Failure failure;
  auto frontend = Frontend::Create(options, std::move(ends.leader),
                                   [&](int, const absl::Status&) { ++failure.calls; });
  REQUIRE(frontend.ok());
  for (int r = 0; r < kRanks; ++r) REQUIRE(ends.Say(r, {RankStatusFrame{}}));
  std::this_thread::sleep_for(std::chrono::milliseconds(200));  // they are heard
  REQUIRE(ends.Say(1, {VerifiedFrame{}}));
  REQUIRE(Eventually([&] { return back.load(); }));
  // Nothing of rank 0 at all, and nothing of the others for less than the limit.
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(lost == 0);
  CHECK(failure.calls == 0);
  using State = Frontend::RankState;
  CHECK((*frontend)->rank_states() == std::vector<State>(kRanks, State::kServes));
  // Silence after that is silence, but for rank 0, which is where the front end is.
  REQUIRE(Eventually([&] { return (*frontend)->rank_states()[2] == State::kLost; }));
  CHECK(lost >= 1);
  CHECK(failure.calls == 0);
  CHECK((*frontend)->rank_states()[0] == State::kServes);
}

// It may have stood still for longer than a step's deadline.
TEST_CASE("a rank that waited for rank 0 in vain begins anew with it", "[runtime][unit]") {
  Ends ends(2);
  Failure failure;
  auto frontend = Frontend::Create(Surviving(), std::move(ends.leader),
                                   [&](int, const absl::Status&) { ++failure.calls; });
  REQUIRE(frontend.ok());
  REQUIRE(ends.Say(1, {TroubleFrame{.generation = 0, .missing = {0}}}));
  for (int r = 0; r < 2; ++r) {
    const LeaderFrame heard = ends.Hear(r);
    REQUIRE(std::holds_alternative<HaltFrame>(heard.body));
    CHECK(std::get<HaltFrame>(heard.body).generation == 1);
  }
  CHECK(failure.calls == 0);
}

// Rank 3 is kept waiting by the same rank as the others, and runs out of patience first.
TEST_CASE("the rank that all wait for is lost and no other", "[runtime][unit]") {
  Ends ends(4);
  FrontendOptions options = Surviving();
  options.group.trouble_grace_ns = 400'000'000;
  std::mutex mutex;
  std::vector<std::string> lost;
  options.on_lost = [&](int rank, const absl::Status& why) {
    const std::lock_guard lock(mutex);
    lost.push_back(absl::StrCat(rank, ": ", std::string(why.message())));
  };
  auto frontend = Frontend::Create(options, std::move(ends.leader), {});
  REQUIRE(frontend.ok());
  REQUIRE(ends.Say(3, {TroubleFrame{.generation = 0, .missing = {0, 1, 2}}}));
  for (const int r : {0, 1}) {
    REQUIRE(ends.Say(r, {TroubleFrame{.generation = 0, .missing = {2}}}));
  }
  for (const int r : {0, 1, 3}) CHECK(std::holds_alternative<HaltFrame>(ends.Hear(r).body));
  const std::lock_guard lock(mutex);
  CHECK(lost == std::vector<std::string>{"2: ranks 0, 1, 3 waited for it in vain"});
}

// Rank 0 has ended and reports no more; rank 2 is gone.
TEST_CASE("a rank in trouble over the stop is dismissed", "[runtime][unit]") {
  Ends ends(3);
  auto frontend = Frontend::Create(Surviving(), std::move(ends.leader), {});
  REQUIRE(frontend.ok());
  (*frontend)->DrainAndStop(0);
  REQUIRE(std::get<StopFrame>(ends.Hear(1).body).complete);
  REQUIRE(ends.Say(1, {TroubleFrame{.generation = 0, .missing = {2}}}));
  // No orderly end of MPI, which would wait for rank 2; and no group to meet in.
  REQUIRE_FALSE(std::get<StopFrame>(ends.Hear(1).body).complete);
  CHECK(std::get<ResumeFrame>(ends.Hear(1).body).members.empty());
}

TEST_CASE("a front end with nothing to do rests", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 2, .step = std::chrono::milliseconds(50)});
  const auto frontend = Start(ranks);
  const auto recorder = std::make_shared<Recorder>();
  REQUIRE(frontend->Submit(Request(3, 2), recorder).ok());
  REQUIRE(recorder->Finish() == FinishReason::kLength);
  const auto cpu_ns = [] {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1'000'000'000 + now.tv_nsec;
  };
  const int64_t before = cpu_ns();
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  // A thread that never sleeps takes all of it.
  CHECK(cpu_ns() - before < 100'000'000);
}

TEST_CASE("destruction ends what is pending", "[runtime][unit]") {
  FakeRanks ranks({.num_ranks = 1});
  ranks.Hold(true);
  const auto sink = std::make_shared<Recorder>();
  {
    const auto frontend = Start(ranks);
    REQUIRE(frontend->Submit(Request(1, 10), sink).ok());
  }
  REQUIRE(sink->finish() == FinishReason::kCancelled);
}

}  // namespace
}  // namespace ballast
