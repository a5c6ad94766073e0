#include "runtime/scheduler.h"

#include <catch2/catch.hpp>
#include <map>
#include <set>

#include "base/random.h"

namespace ballast {
namespace {

constexpr int32_t kVocab = 10, kEos = 9;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.num_layers = 1;
  config.num_kv_heads = 1;
  config.head_dim = 2;
  return config;
}

struct Fixture {
  explicit Fixture(int32_t blocks, Scheduler::Options options)
      : cache(SmallConfig(), DType::kF32, blocks * KvCache::BlockBytes(SmallConfig(), DType::kF32)),
        scheduler(Complete(options), &cache) {}
  static Scheduler::Options Complete(Scheduler::Options options) {
    options.context_tokens = 300;
    options.eos_tokens = {kEos};
    options.vocab_size = kVocab;
    return options;
  }
  // One step in which every sequence draws `token`.
  const Batch& Step(int32_t token = 1) {
    const Batch& batch = scheduler.BuildBatch();
    std::vector<float> logits(batch.logit_rows.size() * kVocab, 0.0f);
    for (size_t i = 0; i < batch.logit_rows.size(); ++i) logits[i * kVocab + token] = 5.0f;
    const std::vector<int32_t> greedy(batch.greedy_rows.size(), token);
    last = batch;
    scheduler.Finish({logits, greedy}, &events);
    return last;
  }
  KvCache cache;
  Scheduler scheduler;
  std::vector<TokenEvent> events;
  Batch last;
};

GenerationRequest Request(uint64_t id, size_t prompt, int32_t max_tokens) {
  GenerationRequest request{.id = id, .prompt = std::vector<int32_t>(prompt, 3), .generated = {},
                            .max_tokens = max_tokens, .sampling = {}};
  request.sampling.temperature = 0;
  return request;
}

TEST_CASE("prompts run in chunks and decode goes first", "[runtime][scheduler]") {
  Fixture f(20, {.max_seqs = 4, .max_batch_tokens = 10, .prefill_chunk = 8});
  f.scheduler.Add(Request(1, 3, 4), &f.events);
  REQUIRE(f.Step().token.size() == 3);
  f.scheduler.Add(Request(2, 20, 2), &f.events);
  f.scheduler.Add(Request(3, 5, 2), &f.events);
  f.Step();
  // One token of the first, a chunk of the second, what is left of the budget for the third.
  REQUIRE(f.last.position == std::vector<int32_t>{3, 0, 1, 2, 3, 4, 5, 6, 7, 0});
  REQUIRE(f.last.num_prefill == 9);
  REQUIRE(f.last.greedy_rows == std::vector<int32_t>{0});
  REQUIRE(f.last.logit_rows.empty());
  f.Step();
  REQUIRE(f.last.position == std::vector<int32_t>{4, 8, 9, 10, 11, 12, 13, 14, 15, 1});
  REQUIRE(f.events.back().request_id == 1);
}

// Each in its list, and each gets its own back.
TEST_CASE("greedy and drawn tokens come from where they belong", "[runtime][scheduler]") {
  Fixture f(20, {.max_seqs = 4});
  for (uint64_t id = 1; id <= 4; ++id) {
    f.scheduler.Add(Request(id, id, 3), &f.events);
    if (id % 2 == 0) continue;
    f.scheduler.Cancel(id, &f.events);
    GenerationRequest drawn = Request(id, id, 3);
    drawn.sampling = {.temperature = 0.01, .seed = id};
    f.scheduler.Add(drawn, &f.events);
  }
  f.events.clear();
  const Batch batch = f.scheduler.BuildBatch();
  REQUIRE(batch.greedy_rows.size() == 2);
  REQUIRE(batch.logit_rows.size() == 2);
  // A row's token says where it stands in the batch.
  std::vector<float> logits(2 * kVocab, 0.0f);
  for (size_t i = 0; i < 2; ++i) logits[i * kVocab + 1 + i] = 50.0f;
  const std::vector<int32_t> greedy = {5, 6};
  f.scheduler.Finish({logits, greedy}, &f.events);
  std::map<uint64_t, int32_t> token;
  for (const TokenEvent& event : f.events) token[event.request_id] = event.token;
  REQUIRE(token == std::map<uint64_t, int32_t>{{1, 1}, {2, 5}, {3, 2}, {4, 6}});
}

TEST_CASE("every request gets all of its tokens once and all blocks come back",
          "[runtime][scheduler][property]") {
  Random random(3);
  for (int round = 0; round < 30; ++round) {
    Fixture f(6, {.max_seqs = 1 + static_cast<int32_t>(random.Below(5)),
                  .max_batch_tokens = 1 + static_cast<int32_t>(random.Below(40)),
                  .prefill_chunk = 1 + static_cast<int32_t>(random.Below(20))});
    const int32_t all_blocks = f.cache.free_blocks();
    std::map<uint64_t, int32_t> wanted, got;
    std::set<uint64_t> ended;
    for (uint64_t id = 1; id <= 12; ++id) {
      wanted[id] = 1 + static_cast<int32_t>(random.Below(70));
      f.scheduler.Add(Request(id, 1 + random.Below(90), wanted[id]), &f.events);
    }
    for (int step = 0; step < 5000 && ended.size() < wanted.size(); ++step) {
      const Batch& batch = f.Step();
      REQUIRE(batch.num_tokens() > 0);
      std::set<std::pair<int32_t, int32_t>> cells;
      for (int32_t t = 0; t < batch.num_tokens(); ++t) {
        const int32_t at = batch.table_offset[t] + batch.position[t] / kKvBlockTokens;
        cells.insert({batch.block_table[at], batch.position[t] % kKvBlockTokens});
      }
      // No two tokens share a place in the cache.
      REQUIRE(cells.size() == static_cast<size_t>(batch.num_tokens()));
      for (const TokenEvent& event : f.events) {
        REQUIRE(ended.count(event.request_id) == 0);
        got[event.request_id] += event.token >= 0;
        if (event.finish != FinishReason::kNone) ended.insert(event.request_id);
      }
      f.events.clear();
    }
    REQUIRE(got == wanted);
    REQUIRE(f.cache.free_blocks() == all_blocks);
    REQUIRE(f.scheduler.num_running() + f.scheduler.num_waiting() == 0);
  }
}

TEST_CASE("a sequence waits until all it may need is free", "[runtime][scheduler]") {
  Fixture f(2, {.max_seqs = 4});
  f.scheduler.Add(Request(1, 60, 40), &f.events);  // two blocks
  f.scheduler.Add(Request(2, 3, 2), &f.events);
  f.Step();
  REQUIRE(f.scheduler.num_running() == 1);
  REQUIRE(f.scheduler.num_waiting() == 1);
  f.scheduler.Cancel(1, &f.events);
  REQUIRE(f.events.back().finish == FinishReason::kCancelled);
  f.Step();
  REQUIRE(f.scheduler.num_running() == 1);
  REQUIRE(f.scheduler.num_waiting() == 0);
}

TEST_CASE("requests that can never fit fail at once", "[runtime][scheduler][errors]") {
  Fixture f(2, {});
  GenerationRequest known = Request(6, 5, 3);
  known.generated = {1, 1, 1};
  GenerationRequest empty = Request(7, 1, 3);
  empty.prompt.clear();
  GenerationRequest outside = Request(8, 5, 3);
  outside.generated = {kVocab};
  GenerationRequest negative = Request(9, 5, 3);
  negative.prompt[2] = -1;
  for (const GenerationRequest& bad :
       {Request(1, 300, 1), Request(2, 120, 20), Request(3, 3, 0), Request(4, 3, -5), known, empty,
        outside, negative}) {
    CAPTURE(bad.id);
    f.scheduler.Add(bad, &f.events);
    REQUIRE(f.events.size() == 1);
    REQUIRE(f.events[0].request_id == bad.id);
    REQUIRE(f.events[0].finish == FinishReason::kFailed);
    f.events.clear();
  }
  REQUIRE(f.scheduler.num_waiting() == 0);
}

TEST_CASE("the end token ends a text and is not delivered", "[runtime][scheduler]") {
  Fixture f(4, {});
  f.scheduler.Add(Request(1, 2, 8), &f.events);
  f.Step(4);
  f.Step(kEos);
  REQUIRE(f.events.size() == 2);
  REQUIRE(f.events[0].token == 4);
  REQUIRE(f.events[1].token == -1);
  REQUIRE(f.events[1].finish == FinishReason::kStop);
  REQUIRE(f.cache.free_blocks() == 4);
}

TEST_CASE("cancelling reaches waiting and running requests and no others",
          "[runtime][scheduler]") {
  Fixture f(4, {.max_seqs = 1});
  f.scheduler.Add(Request(1, 2, 8), &f.events);
  f.scheduler.Add(Request(2, 2, 8), &f.events);
  f.Step();
  f.events.clear();
  f.scheduler.Cancel(77, &f.events);
  REQUIRE(f.events.empty());
  f.scheduler.Cancel(2, &f.events);
  f.scheduler.Cancel(1, &f.events);
  REQUIRE(f.events.size() == 2);
  REQUIRE(f.scheduler.num_running() + f.scheduler.num_waiting() == 0);
  REQUIRE(f.cache.free_blocks() == 4);
}

}  // namespace
}  // namespace ballast
