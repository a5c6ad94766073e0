#include "placement/trace.h"

#include <catch2/catch.hpp>
#include <limits>

namespace ballast {
namespace {

using Catch::Matchers::Contains;

NamedArray Ids(const char* name, std::vector<int64_t> shape, const std::vector<int64_t>& values,
               NpyType type = NpyType::kU8) {
  return {.name = name, .array = MakeNpyArray(type, std::move(shape), values)};
}

template <typename T>
std::string MessageOf(const absl::StatusOr<T>& result) {
  REQUIRE(result.status().code() == absl::StatusCode::kInvalidArgument);
  return std::string(result.status().message());
}

TEST_CASE("ids are counted in whole steps and the rest is dropped", "[placement][trace]") {
  // Three tokens, two layers, top-2; then four tokens of a second phase.
  const NamedArray phases[] = {
      Ids("a", {3, 2, 2}, {0, 1, 2, 3, 0, 2, 3, 2, 1, 1, 1, 1}),
      Ids("b", {4, 2, 2}, {0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3}, NpyType::kU16)};
  const auto trace = CountSteps(phases, {.step_tokens = 2});
  REQUIRE(trace.ok());
  REQUIRE(trace->num_experts == 4);
  REQUIRE(trace->num_layers == 2);
  REQUIRE(trace->phase_offsets == std::vector<int64_t>{0, 1, 3});
  REQUIRE(trace->dropped_tokens == 1);
  REQUIRE(trace->counts == std::vector<int32_t>{2, 1, 1, 0, 0, 0, 2, 2,  //
                                                2, 2, 0, 0, 2, 2, 0, 0,  //
                                                0, 0, 2, 2, 0, 0, 2, 2});
  REQUIRE(TotalLoad(*trace).load == std::vector<int64_t>{4, 3, 3, 2, 2, 2, 4, 4});
}

TEST_CASE("ids without a top-k dimension are top-1", "[placement][trace]") {
  const NamedArray phase = Ids("a", {2, 3}, {0, 1, 4, 0, 2, 4});
  const auto trace = CountSteps({&phase, 1}, {.step_tokens = 1, .num_experts = 6});
  REQUIRE(trace.ok());
  REQUIRE(trace->num_steps() == 2);
  REQUIRE(trace->layer(1, 1)[2] == 1);
  REQUIRE(trace->layer(1, 2).size() == 6);
}

TEST_CASE("step counts are taken as they are", "[placement][trace]") {
  const NamedArray phase = Ids("a", {2, 1, 3}, {1, 2, 3, 4, 5, 6}, NpyType::kI32);
  const auto trace = CountSteps({&phase, 1}, {.step_tokens = 1024});
  REQUIRE(trace.ok());
  REQUIRE(trace->num_steps() == 2);
  REQUIRE(trace->counts == std::vector<int32_t>{1, 2, 3, 4, 5, 6});
}

TEST_CASE("step counts by kind are kept apart and added up", "[placement][trace]") {
  // Two steps of two kinds, one layer, three experts; the second step has no prefill.
  const NamedArray phase =
      Ids("a", {2, 2, 1, 3}, {1, 2, 3, 4, 5, 7, 0, 0, 0, 1, 0, 1}, NpyType::kI32);
  const auto trace = CountSteps({&phase, 1}, {.step_tokens = 11, .top_k = 2});
  REQUIRE(trace.ok());
  REQUIRE(trace->counts == std::vector<int32_t>{5, 7, 10, 1, 0, 1});
  REQUIRE(trace->tokens_of(0) == 11);
  const StepCounts first = trace->counts_of(0), second = trace->counts_of(1);
  REQUIRE(first.num_tokens == PerKind<int64_t>{3, 8});
  REQUIRE(second.num_tokens == PerKind<int64_t>{0, 1});
  REQUIRE(first.counts[TokenKind::kPrefill][2] == 3);
  REQUIRE(first.counts[TokenKind::kDecode][2] == 7);
  REQUIRE(second.counts[TokenKind::kDecode][0] == 1);
  // Without top-k a step has 10 tokens, and its copies, 6 and 16, say how many are of a kind.
  const auto unknown = CountSteps({&phase, 1}, {.step_tokens = 10});
  REQUIRE(unknown.ok());
  REQUIRE(unknown->counts_of(0).num_tokens == PerKind<int64_t>{3, 7});
  REQUIRE(unknown->counts_of(1).num_tokens == PerKind<int64_t>{0, 10});
  // At least one token to a kind that has copies, and never more than a step has.
  const auto few = CountSteps({&phase, 1}, {.step_tokens = 2});
  REQUIRE(few.ok());
  REQUIRE(few->counts_of(0).num_tokens == PerKind<int64_t>{1, 1});
  // Layers that copy nothing (dense ones) take no tokens away.
  const NamedArray dense = Ids("a", {1, 2, 2, 2}, {0, 0, 3, 1, 0, 0, 8, 0}, NpyType::kI32);
  for (const int32_t top_k : {0, 2}) {
    const auto sparse = CountSteps({&dense, 1}, {.step_tokens = 6, .top_k = top_k});
    REQUIRE(sparse.ok());
    REQUIRE(sparse->counts_of(0).num_tokens == PerKind<int64_t>{2, 4});
    REQUIRE(sparse->tokens_of(0) == 6);
  }
  // What does not tell kinds apart is of one.
  const NamedArray sums = Ids("a", {1, 1, 3}, {1, 2, 3}, NpyType::kI64);
  const auto plain = CountSteps({&sums, 1}, {.step_tokens = 4});
  REQUIRE(plain.ok());
  REQUIRE(plain->counts_of(0).num_tokens == PerKind<int64_t>{4, 0});
  REQUIRE(plain->counts_of(0).counts[TokenKind::kPrefill].size() == 3);
}

TEST_CASE("a bad trace is refused with file and place and value", "[placement][trace][errors]") {
  const auto message = [](const NamedArray& phase, int32_t experts = 4) {
    return MessageOf(CountSteps({&phase, 1}, {.step_tokens = 2, .num_experts = experts}));
  };
  REQUIRE_THAT(message(Ids("t.npy", {3, 1, 1}, {0, 3, 9})),
               Contains("t.npy: token 2 layer 0 has expert 9, allowed: 0 to 3"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 1, 1}, {0})), Contains("1 tokens make no step of 2"));
  REQUIRE_THAT(message(Ids("t.npy", {4}, {0, 0, 0, 0})), Contains("[4] of u8, allowed: [tokens"));
  REQUIRE_THAT(message(Ids("t.npy", {2, 0, 1}, {})), Contains("[2, 0, 1] of u8, allowed"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 1}, {0}, NpyType::kF32)), Contains("f32, allowed: ids"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 1, 4}, {0, -1, 0, 0}, NpyType::kI64)),
               Contains("t.npy: step 0 layer 0 expert 1 has count -1, allowed"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 1, 4}, {1, int64_t{1} << 31, 0, 0}, NpyType::kI64)),
               Contains("has count 2147483648"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 2, 1, 4}, {0, 1, 0, 0, 0, 0, -7, 0}, NpyType::kI32)),
               Contains("t.npy: step 0 decode layer 0 expert 2 has count -7, allowed"));
  // Each fits, the two together do not.
  REQUIRE_THAT(
      message(Ids("t.npy", {1, 2, 1, 4}, {1, 0, 0, 0, 0x7fffffff, 0, 0, 0}, NpyType::kI32)),
      Contains("step 0 decode layer 0 expert 0 has count 2147483647"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 3, 1, 1}, {0, 0, 0}, NpyType::kI32)),
               Contains("t.npy: [1, 3, 1, 1] of i32, allowed: [steps, layers, experts] or "
                        "[steps, 2, layers, experts]"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 2, 1, 1}, {0, 0})), Contains("of u8, allowed: [tokens"));
  const NamedArray shapes[] = {Ids("a.npy", {1, 2, 4}, {1, 1, 1, 1, 1, 1, 1, 1}, NpyType::kI32),
                               Ids("b.npy", {1, 2, 2, 4}, std::vector<int64_t>(16), NpyType::kI32)};
  REQUIRE_THAT(MessageOf(CountSteps(shapes, {.step_tokens = 1})),
               Contains("b.npy: [1, 2, 2, 4] of i32 does not go with a.npy: [1, 2, 4] of i32"));
  REQUIRE_THAT(message(Ids("t.npy", {1, 1, 3}, {0, 1, 0}, NpyType::kI32)),
               Contains("counts of 3 experts, but 4 were asked for"));
  const NamedArray mixed[] = {Ids("a.npy", {2, 1, 1}, {0, 0}),
                              Ids("b.npy", {2, 1, 2}, {0, 0, 0, 0})};
  REQUIRE_THAT(MessageOf(CountSteps(mixed, {.step_tokens = 1})),
               Contains("b.npy: [2, 1, 2] of u8 does not go with a.npy: [2, 1, 1] of u8"));
}

TEST_CASE("loads are read from arrays and text alike", "[placement][trace]") {
  const NamedArray array = Ids("a", {2, 3}, {1, 2, 3, 4, 5, 6}, NpyType::kF64);
  const auto from_array = LoadFromArray(array);
  const auto from_text = LoadFromCsv("b", "e0,e1,e2\n1,2,3\r\n\n 4, 5 ,6\n");
  REQUIRE(from_array.ok());
  REQUIRE(from_text.ok());
  REQUIRE(from_array->load == std::vector<int64_t>{1, 2, 3, 4, 5, 6});
  REQUIRE(from_text->load == from_array->load);
  REQUIRE(LoadToCsv(*from_text) == "1,2,3\n4,5,6\n");
  // Fractions keep their ratios.
  const auto shares = LoadFromCsv("b", "0.25,0.75\n");
  REQUIRE(shares.ok());
  REQUIRE(shares->load == std::vector<int64_t>{int64_t{1} << 38, 3 * (int64_t{1} << 38)});
}

TEST_CASE("a bad load is refused with file and place and value", "[placement][trace][errors]") {
  const auto message = [](const std::string& text) {
    return MessageOf(LoadFromCsv("l.csv", text));
  };
  REQUIRE_THAT(message("1,2\n3,nan\n"), Contains("l.csv: layer 1 expert 1 has load nan, allowed"));
  REQUIRE_THAT(message("1,-2\n"), Contains("layer 0 expert 1 has load -2"));
  REQUIRE_THAT(message("1,inf\n"), Contains("has load inf"));
  REQUIRE_THAT(message("1,2\n1\n"), Contains("line 2 has 1 numbers; the first has 2"));
  REQUIRE_THAT(message("1,x\n"), Contains("line 1 field 2 is 'x', allowed: a number"));
  REQUIRE_THAT(message("1,,2\n"), Contains("line 1 field 2 is ''"));
  REQUIRE_THAT(message("\n"), Contains("no numbers"));
  REQUIRE_THAT(MessageOf(LoadFromArray(Ids("l.npy", {1, 1, 1}, {0}))), Contains("shape [1, 1, 1]"));
  REQUIRE_THAT(MessageOf(LoadFromArray(Ids("l.npy", {0, 4}, {}))), Contains("shape [0, 4]"));
  REQUIRE_THAT(MessageOf(LoadFromArray(Ids("l.npy", {1, 2}, {5, -5}, NpyType::kI64))),
               Contains("l.npy: layer 0 expert 1 has load -5"));
}

TEST_CASE("counts say how many tokens made them where top-k is known", "[placement][trace]") {
  const NpyArray counts = MakeNpyArray(NpyType::kI32, {2, 1, 3},
                                       std::vector<int64_t>{4, 0, 2, 1, 1, 2});
  const std::vector<NamedArray> phases = {{.name = "c.npy", .array = counts}};
  const auto known = CountSteps(phases, {.step_tokens = 7, .top_k = 2});
  REQUIRE(known.ok());
  REQUIRE(known->tokens_of(0) == 3);
  REQUIRE(known->tokens_of(1) == 2);
  const auto unknown = CountSteps(phases, {.step_tokens = 7});
  REQUIRE(unknown.ok());
  REQUIRE(unknown->tokens_of(1) == 7);
}

}  // namespace
}  // namespace ballast
