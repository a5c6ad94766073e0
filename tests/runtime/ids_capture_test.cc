#include "runtime/ids_capture.h"

#include <catch2/catch.hpp>

#include "base/npy.h"
#include "base/random.h"
#include "monitor/trace_recorder.h"
#include "tests/support/cluster.h"
#include "tests/support/dumped.h"
#include "tests/support/fake_ranks.h"
#include "tests/support/run_ranks.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::Dumped;
using What = TraceRecorder::What;

TEST_CASE("two ranks capture one recording in order of step rank and row", "[runtime][unit]") {
  const int32_t experts = GENERATE(200, 40'000);  // ids of one byte, of two
  constexpr int32_t kLayers = 3, kTopK = 2;
  TraceRecorder recorder(
      {.num_ranks = 2, .num_layers = kLayers, .num_experts = experts, .top_k = kTopK});
  const int32_t id_bytes = TraceRecorder::IdBytes(experts);
  IdsCapture captures[] = {{0, kLayers, kTopK, id_bytes}, {1, kLayers, kTopK, id_bytes}};
  REQUIRE(recorder.Start(What::kCounts, 1 << 20).ok());  // so that ids are recording 2
  REQUIRE(recorder.Stop().ok());
  REQUIRE(recorder.Start(What::kIds, 1 << 20).ok());
  Random random(5);
  std::vector<int64_t> expected;
  const std::vector<int32_t> steps[] = {{2, 1}, {0, 3}, {0, 0}, {4, 0}};
  for (const std::vector<int32_t>& rank_tokens : steps) {
    for (int32_t rank : {0, 1}) {
      IdsCapture& capture = captures[rank];
      capture.Begin(recorder.ids_recording(), rank_tokens);
      REQUIRE(capture.active());
      const size_t before = expected.size();
      expected.resize(before + static_cast<size_t>(rank_tokens[rank] * kLayers * kTopK));
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        std::vector<int32_t> ids(static_cast<size_t>(rank_tokens[rank] * kTopK));
        for (size_t i = 0; i < ids.size(); ++i) {
          ids[i] = static_cast<int32_t>(random.Below(static_cast<uint32_t>(experts)));
          expected[before + (i / kTopK * kLayers + layer) * kTopK + i % kTopK] = ids[i];
        }
        capture.TakeLayer(ids);
      }
      const auto& f = std::get<RoutingFrame>(capture.frame().body);
      recorder.AddIds(rank, {f.recording, f.step_begin, f.step_end, f.first, f.ids});
    }
  }
  REQUIRE_FALSE(recorder.state().gap);
  REQUIRE(Dumped(recorder) == MakeNpyArray(id_bytes == 1 ? NpyType::kU8 : NpyType::kU16,
                                           {10, kLayers, kTopK}, expected));
  captures[0].Begin(0, steps[0]);
  REQUIRE_FALSE(captures[0].active());
}

// [layers * experts] copies, of counts of both kinds or of ids.
std::vector<int64_t> Histogram(const NpyArray& array, int32_t layers, int32_t experts) {
  std::vector<int64_t> copies(static_cast<size_t>(layers * experts));
  const int64_t size = array.num_elements(), width = array.shape.back();
  for (int64_t i = 0; i < size; ++i) {
    const int64_t value = array.IntegerAt(i), layer = i / width % layers;
    if (array.type == NpyType::kI32) {
      copies[static_cast<size_t>(layer * experts + i % width)] += value;
    } else {
      ++copies[static_cast<size_t>(layer * experts + value)];
    }
  }
  return copies;
}

TEST_CASE("a server records the ids that it counts and answers the same", "[runtime][cluster]") {
  testing::TempFolder folder;
  const testing::TinyModel model{};
  testing::WriteCheckpoint(folder.path(), model);
  const int32_t layers = model.num_layers - model.num_dense_layers;
  const auto requests = testing::RandomRequests(12, model.vocab, /*longest_prompt=*/100,
                                                /*max_tokens=*/16, 1.0, /*seed=*/3);
  const auto plain = testing::Cluster::Start({.model = folder.path()});
  REQUIRE(plain.ok());
  const auto replies = (*plain)->Generate(requests);
  REQUIRE(replies.ok());
  int64_t tokens = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& reply = (*replies)[i];
    tokens += static_cast<int64_t>(requests[i].prompt.size() + reply.tokens.size()) -
              (reply.finish == FinishReason::kLength ? 1 : 0);
  }
  std::vector<int64_t> counted;
  for (const int ranks : {1, 3}) {
    for (const What what : {What::kCounts, What::kIds}) {
      CAPTURE(ranks, static_cast<int>(what));
      TraceRecorder recorder({.num_ranks = ranks,
                              .num_layers = layers,
                              .num_experts = model.num_experts,
                              .top_k = model.top_k});
      REQUIRE(recorder.Start(what, 1 << 20).ok());
      auto cluster = testing::Cluster::Start({.model = folder.path(),
                                              .num_ranks = ranks,
                                              .rebalance_every = 20,
                                              .recorder = &recorder});
      REQUIRE(cluster.ok());
      const auto recorded = (*cluster)->Generate(requests);
      REQUIRE(recorded.ok());
      REQUIRE(*recorded == *replies);
      // The last step reaches the recorder a moment after its tokens.
      REQUIRE(testing::Eventually([&] { return recorder.state().tokens == tokens; }));
      const std::vector<int64_t> copies = Histogram(Dumped(recorder), layers, model.num_experts);
      if (counted.empty()) counted = copies;
      REQUIRE(copies == counted);
      REQUIRE(testing::FirstError((*cluster)->Stop()) == "");
      REQUIRE_FALSE(recorder.state().gap);
    }
  }
}

}  // namespace
}  // namespace ballast
