#include "tests/support/fake_ranks.h"

#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace ballast::testing {

FakeRanks::FakeRanks(Options options) : options_(std::move(options)) {
  if (!options_.reply) options_.reply = ReplyToken;
  for (int r = 0; r < options_.num_ranks; ++r) {
    auto pair = ControlChannel::MakePair();
    BALLAST_CHECK(pair.ok());
    leader_ends_.push_back(std::move(pair->first));
    ranks_.push_back(std::make_unique<Rank>());
    ranks_.back()->channel = std::move(pair->second);
  }
  for (auto& rank : ranks_) rank->thread = std::thread([this, &rank] { Run(*rank); });
}

FakeRanks::~FakeRanks() {
  for (auto& rank : ranks_) rank->killed = true;
  for (auto& rank : ranks_) rank->thread.join();
}

std::vector<std::unique_ptr<ControlChannel>> FakeRanks::TakeChannels() {
  return std::move(leader_ends_);
}

void FakeRanks::Kill(int rank) {
  ranks_[static_cast<size_t>(rank)]->killed = true;
}

FakeRanks::Heard FakeRanks::heard(int rank) const {
  const std::lock_guard lock(mutex_);
  return ranks_[static_cast<size_t>(rank)]->heard;
}

int FakeRanks::running() const {
  const std::lock_guard lock(mutex_);
  int running = 0;
  for (const auto& rank : ranks_) running += rank->heard.running;
  return running;
}

int32_t FakeRanks::ReplyToken(const GenerationRequest& request, int index) {
  uint64_t hash = request.sampling.seed;
  for (const int32_t token : request.prompt) hash = RandomBits(hash, static_cast<uint64_t>(token));
  return 'a' + static_cast<int32_t>(RandomBits(hash, static_cast<uint64_t>(index)) % 26);
}

// Takes what the leader says; false when the rank has to end.
bool FakeRanks::Listen(Rank& rank, std::map<uint64_t, GenerationRequest>& active) {
  if (!rank.channel->WaitReadable(static_cast<int>(options_.step.count())).ok()) return false;
  while (true) {
    auto bytes = rank.channel->TryReceive();
    if (!bytes.ok()) return false;
    if (!bytes->has_value()) return true;
    auto frame = ParseLeaderFrame(**bytes);
    BALLAST_CHECK(frame.ok());
    if (const auto* submit = std::get_if<SubmitFrame>(&frame->body)) {
      active.emplace(submit->request.id, submit->request);
    } else if (const auto* cancel = std::get_if<CancelFrame>(&frame->body)) {
      active.erase(cancel->request_id);
    }
    if (const auto* halt = std::get_if<HaltFrame>(&frame->body)) {
      HaltedFrame halted;
      halted.generation = halt->generation;
      rank.channel->Send(Serialize(RankFrame{halted})).IgnoreError();
    }
    const bool stop = std::holds_alternative<StopFrame>(frame->body);
    const std::lock_guard lock(mutex_);
    rank.heard.frames.push_back(std::move(*frame));
    rank.heard.running = static_cast<int>(active.size());
    rank.heard.stopped = stop;
    if (stop) return false;
  }
}

void FakeRanks::Run(Rank& rank) {
  std::map<uint64_t, GenerationRequest> active;
  while (!rank.killed && Listen(rank, active)) {
    if (hold_) continue;
    EventsFrame events;
    for (auto it = active.begin(); it != active.end();) {
      GenerationRequest& request = it->second;
      TokenEvent event{request.id,
                       options_.reply(request, static_cast<int>(request.generated.size())),
                       FinishReason::kNone, static_cast<int32_t>(request.generated.size())};
      if (event.token < 0) event.finish = FinishReason::kStop;
      request.generated.push_back(event.token);
      if (event.token >= 0 &&
          static_cast<int32_t>(request.generated.size()) >= request.max_tokens) {
        event.finish = FinishReason::kLength;
      }
      events.events.push_back(event);
      it = event.finish == FinishReason::kNone ? std::next(it) : active.erase(it);
    }
    if (events.events.empty()) continue;
    {
      const std::lock_guard lock(mutex_);
      rank.heard.running = static_cast<int>(active.size());
    }
    const auto running = static_cast<int32_t>(active.size());
    if (!rank.channel->Send(Serialize(RankFrame{events})).ok() ||
        !rank.channel->Send(Serialize(RankFrame{RankStatusFrame{running, 0, 0}})).ok()) {
      break;
    }
    std::this_thread::sleep_for(options_.step);
  }
  const std::lock_guard lock(mutex_);
  rank.channel.reset();
}

bool Eventually(const std::function<bool()>& condition, std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace ballast::testing
