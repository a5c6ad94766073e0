#include "monitor/trace_recorder.h"

#include <catch2/catch.hpp>
#include <numeric>

#include "base/npy.h"
#include "tests/support/dumped.h"

namespace ballast {
namespace {

using testing::Dumped;
using What = TraceRecorder::What;
using Catch::Matchers::Contains;

constexpr TraceRecorder::Shape kShape = {
    .num_ranks = 2, .num_layers = 2, .num_experts = 3, .top_k = 2};
constexpr int64_t kStepBytes = 2 * 2 * 3 * 4;
constexpr int64_t kTokenBytes = 2 * 2;

std::vector<int32_t> StepCounts(int32_t first) {
  std::vector<int32_t> counts(12);  // six of prefill, six of decode
  std::iota(counts.begin(), counts.end(), first);
  return counts;
}

// The part of a rank: `tokens` tokens from number `first` on, each id the number of its token.
void Add(TraceRecorder& recorder, int32_t rank, int64_t begin, int64_t end, int64_t first,
         int64_t tokens, uint32_t recording = 1) {
  std::vector<std::byte> ids;
  for (int64_t i = 0; i < tokens * kTokenBytes; ++i) {
    ids.push_back(static_cast<std::byte>(first + i / kTokenBytes));
  }
  recorder.AddIds(
      rank,
      {.recording = recording, .step_begin = begin, .step_end = end, .first = first, .ids = ids});
}

TEST_CASE("recorded counts come out step by step", "[monitor][unit]") {
  TraceRecorder recorder(kShape);
  recorder.AddStep(StepCounts(100));  // nobody asked for it
  REQUIRE(recorder.Start(What::kCounts, 10 * kStepBytes).ok());
  recorder.AddStep(StepCounts(1));
  REQUIRE(Dumped(recorder).shape == std::vector<int64_t>{1, 2, 2, 3});
  // Of the first layer: 1 + 2 + 3 and 7 + 8 + 9 copies, two of a token.
  REQUIRE(recorder.state().tokens == 15);
  recorder.AddStep(StepCounts(20));
  REQUIRE(recorder.Stop().ok());
  recorder.AddStep(StepCounts(100));
  std::vector<int64_t> expected(24);
  std::iota(expected.begin(), expected.begin() + 12, 1);
  std::iota(expected.begin() + 12, expected.end(), 20);
  REQUIRE(Dumped(recorder) == MakeNpyArray(NpyType::kI32, {2, 2, 2, 3}, expected));
  // A new recording begins empty.
  REQUIRE(recorder.Start(What::kCounts, kStepBytes).ok());
  REQUIRE_FALSE(recorder.Dump().ok());
}

TEST_CASE("a full recording keeps what it has and takes no more", "[monitor][unit]") {
  TraceRecorder recorder(kShape);
  // One byte short of three steps.
  REQUIRE(recorder.Start(What::kCounts, 3 * kStepBytes - 1).ok());
  for (int32_t step = 0; step < 2; ++step) recorder.AddStep(StepCounts(step));
  REQUIRE_FALSE(recorder.state().full);
  for (int32_t step = 2; step < 9; ++step) recorder.AddStep(StepCounts(step));
  REQUIRE(recorder.state().full);
  REQUIRE(recorder.state().length == 2);
  REQUIRE(recorder.state().bytes == 2 * kStepBytes);
  std::vector<int64_t> expected(24);
  std::iota(expected.begin(), expected.begin() + 12, 0);
  std::iota(expected.begin() + 12, expected.end(), 1);
  REQUIRE(Dumped(recorder) == MakeNpyArray(NpyType::kI32, {2, 2, 2, 3}, expected));
  REQUIRE(recorder.Stop().ok());
  REQUIRE(recorder.Start(What::kCounts, kStepBytes).ok());
  REQUIRE_FALSE(recorder.state().full);
}

TEST_CASE("a recording is started once and stopped once", "[monitor][unit][errors]") {
  TraceRecorder recorder(kShape);
  REQUIRE_THAT(std::string(recorder.Stop().message()), Contains("start one first"));
  REQUIRE_THAT(std::string(recorder.Dump().status().message()), Contains("start a recording"));
  REQUIRE_THAT(std::string(recorder.Start(What::kCounts, kStepBytes - 1).message()),
               Contains("max_bytes: 47, allowed: 48 (one step of this model) to 1073741824"));
  REQUIRE(absl::IsInvalidArgument(recorder.Start(What::kIds, kTokenBytes - 1)));
  REQUIRE(absl::IsInvalidArgument(recorder.Start(What::kCounts, TraceRecorder::kMostBytes + 1)));
  REQUIRE(recorder.Start(What::kCounts, kStepBytes).ok());
  REQUIRE_THAT(std::string(recorder.Start(What::kIds, kStepBytes).message()),
               Contains("stop it first"));
  REQUIRE_THAT(std::string(recorder.Dump().status().message()), Contains("send requests first"));
  REQUIRE(recorder.Stop().ok());
  REQUIRE(absl::IsFailedPrecondition(recorder.Stop()));
}

TEST_CASE("ids stand by step then rank whenever their parts arrive", "[monitor][unit]") {
  TraceRecorder recorder(kShape);
  REQUIRE(recorder.ids_recording() == 0);
  REQUIRE(recorder.Start(What::kIds, 100 * kTokenBytes).ok());
  REQUIRE(recorder.ids_recording() == 1);
  // Rank 1 is two steps ahead: tokens 2, then 5 and 6, then none.
  Add(recorder, 1, 0, 3, 2, 1);
  Add(recorder, 1, 3, 7, 5, 2);
  Add(recorder, 1, 7, 9, 9, 0);
  REQUIRE(recorder.state().length == 0);
  Add(recorder, 0, 0, 3, 0, 2);
  REQUIRE(recorder.state().length == 3);
  Add(recorder, 0, 3, 7, 3, 2);
  Add(recorder, 0, 7, 9, 7, 2);
  Add(recorder, 0, 9, 9, 9, 0, /*recording=*/7);  // of another recording
  std::vector<int64_t> expected;
  for (int64_t i = 0; i < 9 * kTokenBytes; ++i) expected.push_back(i / kTokenBytes);
  REQUIRE(Dumped(recorder) == MakeNpyArray(NpyType::kU8, {9, 2, 2}, expected));
  REQUIRE_FALSE(recorder.state().gap);
}

TEST_CASE("ids beyond the memory end the recording at a whole step", "[monitor][unit]") {
  TraceRecorder recorder(kShape);
  REQUIRE(recorder.Start(What::kIds, 6 * kTokenBytes).ok());
  Add(recorder, 0, 0, 4, 0, 2);
  Add(recorder, 0, 4, 8, 4, 2);  // does not fit
  REQUIRE(recorder.state().full);
  REQUIRE(recorder.ids_recording() == 0);
  Add(recorder, 1, 0, 4, 2, 2);  // still owed, and fits
  Add(recorder, 1, 4, 8, 6, 2);
  Add(recorder, 0, 8, 9, 8, 1);
  REQUIRE(recorder.state().length == 4);
  REQUIRE_FALSE(recorder.state().gap);
}

TEST_CASE("a part that is missing or malformed ends the recording before it", "[monitor][unit]") {
  TraceRecorder recorder(kShape);
  REQUIRE(recorder.Start(What::kIds, 100 * kTokenBytes).ok());
  Add(recorder, 0, 0, 2, 0, 2);
  Add(recorder, 1, 0, 2, 2, 0);
  SECTION("a step is missing") {
    Add(recorder, 0, 4, 6, 4, 2);
  }
  SECTION("more tokens than the step has") {
    Add(recorder, 0, 2, 4, 2, 3);
  }
  SECTION("before the step") {
    Add(recorder, 0, 2, 4, 1, 1);
  }
  SECTION("half a token") {
    const std::vector<std::byte> ids(kTokenBytes / 2);
    recorder.AddIds(0, {.recording = 1, .step_begin = 2, .step_end = 4, .first = 2, .ids = ids});
  }
  REQUIRE(recorder.state().gap);
  REQUIRE(recorder.ids_recording() == 0);
  Add(recorder, 0, 2, 4, 2, 2);
  Add(recorder, 1, 2, 4, 4, 0);
  REQUIRE(recorder.state().length == 2);
}

TEST_CASE("many experts need ids of two bytes", "[monitor][unit]") {
  TraceRecorder recorder({.num_ranks = 1, .num_layers = 1, .num_experts = 257, .top_k = 1});
  REQUIRE(recorder.Start(What::kIds, 16).ok());
  const std::vector<std::byte> ids = {std::byte{0x00}, std::byte{0x01}};
  recorder.AddIds(0, {.recording = 1, .step_begin = 0, .step_end = 1, .first = 0, .ids = ids});
  REQUIRE(Dumped(recorder) == MakeNpyArray(NpyType::kU16, {1, 1, 1}, std::vector<int64_t>{256}));
}

}  // namespace
}  // namespace ballast
