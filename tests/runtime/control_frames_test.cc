#include "runtime/control_frames.h"

#include <catch2/catch.hpp>

#include "base/random.h"

namespace ballast {
namespace {

GenerationRequest SampleRequest() {
  GenerationRequest request;
  request.id = 0x0102030405060708;
  request.prompt = {0, 72, 105};
  request.generated = {33};
  request.max_tokens = 9;
  request.sampling = {.temperature = 0.8, .top_p = 0.95, .seed = 1234567890123456789u};
  return request;
}

std::vector<LeaderFrame> LeaderFrames() {
  return {{1, SubmitFrame{SampleRequest()}},
          {2, CancelFrame{7}},
          {3, WakeFrame{}},
          {4, PlanFrame{std::vector<std::byte>(5, std::byte{9})}},
          {5, StopFrame{}},
          {6, HaltFrame{3, true}},
          {7, ResumeFrame{.generation = 3,
                          .members = {{0, 0, 0, 0}, {2, 1, 0, 0}, {3, -1, 9, 1}},
                          .commit_plan_id = 8,
                          .step = 1'000,
                          .epoch = 12,
                          .placement = std::vector<std::byte>(4, std::byte{'x'})}},
          {8, VerifyFrame{9}}};
}

std::vector<RankFrame> RankFrames() {
  return {{EventsFrame{{{1, 65, FinishReason::kNone}, {2, -1, FinishReason::kStop}}}},
          {RankStatusFrame{3, 4, 1'000'000'000'000}},
          {RoutingFrame{2, 100, 108, 103, std::vector<std::byte>(6, std::byte{4})}},
          {HaltedFrame{.generation = 3,
                       .step = 999,
                       .epoch = 11,
                       .staged_plan_id = 8,
                       .placement = std::vector<std::byte>(2, std::byte{'p'}),
                       .staged_placement = std::vector<std::byte>(3, std::byte{'q'})}},
          {TroubleFrame{.generation = 2, .missing = {1, 4}}},
          {VerifiedFrame{.id = 9,
                         .step = 100,
                         .epoch = 3,
                         .fingerprint = 5,
                         .fault = std::vector<std::byte>(4, std::byte{'f'}),
                         .copies = {{0, 1, 2, 3}, {1, 2, 4, 5}}}}};
}

TEST_CASE("leader frames survive the wire", "[runtime][unit]") {
  for (const LeaderFrame& frame : LeaderFrames()) {
    const auto bytes = Serialize(frame);
    const auto parsed = ParseLeaderFrame(bytes);
    REQUIRE(parsed.ok());
    REQUIRE(parsed->wake_seq == frame.wake_seq);
    REQUIRE(parsed->body.index() == frame.body.index());
    REQUIRE(Serialize(*parsed) == bytes);
  }
  const auto bytes = Serialize(LeaderFrames()[0]);
  const auto submit = std::get<SubmitFrame>(ParseLeaderFrame(bytes)->body).request;
  REQUIRE(submit.id == SampleRequest().id);
  REQUIRE(submit.prompt == SampleRequest().prompt);
  REQUIRE(submit.generated == SampleRequest().generated);
  REQUIRE(submit.max_tokens == 9);
  REQUIRE(submit.sampling.temperature == 0.8);
  REQUIRE(submit.sampling.top_p == 0.95);
  REQUIRE(submit.sampling.seed == 1234567890123456789u);
}

TEST_CASE("rank frames survive the wire", "[runtime][unit]") {
  for (const RankFrame& frame : RankFrames()) {
    const auto bytes = Serialize(frame);
    const auto parsed = ParseRankFrame(bytes);
    REQUIRE(parsed.ok());
    REQUIRE(Serialize(*parsed) == bytes);
  }
}

// What parses must be canonical: it serializes to the same bytes. What does not is refused.
template <typename Parse>
void CheckHostile(const std::vector<std::byte>& bytes, Parse parse) {
  const auto parsed = parse(bytes);
  if (parsed.ok()) {
    REQUIRE(Serialize(*parsed) == bytes);
  } else {
    REQUIRE(parsed.status().code() == absl::StatusCode::kInvalidArgument);
  }
}

template <typename Frame, typename Parse>
void Mutate(const std::vector<Frame>& frames, Parse parse) {
  Random random(20260701);
  for (const Frame& frame : frames) {
    const auto good = Serialize(frame);
    for (size_t length = 0; length < good.size(); ++length) {
      const std::vector<std::byte> cut(good.begin(), good.begin() + static_cast<ptrdiff_t>(length));
      REQUIRE_FALSE(parse(cut).ok());
    }
    auto longer = good;
    longer.push_back(std::byte{0});
    REQUIRE_FALSE(parse(longer).ok());
    for (int round = 0; round < 3000; ++round) {
      auto bad = good;
      for (uint32_t edit = 0; edit <= random.Below(4); ++edit) {
        bad[random.Below(static_cast<uint32_t>(bad.size()))] =
            static_cast<std::byte>(random.Below(256));
      }
      if (random.Below(4) == 0) bad.resize(random.Below(64));
      CheckHostile(bad, parse);
    }
  }
}

TEST_CASE("mutated frames parse to themselves or are refused", "[runtime][unit][errors]") {
  Mutate(LeaderFrames(), [](std::span<const std::byte> b) { return ParseLeaderFrame(b); });
  Mutate(RankFrames(), [](std::span<const std::byte> b) { return ParseRankFrame(b); });
}

}  // namespace
}  // namespace ballast
