#include <limits>
#include <vector>

#include "base/random.h"
#include "kernels/gate.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;

struct Batch {
  GateRule rule;
  int32_t num_tokens, num_prefill;
  std::vector<float> logits, bias;
};

// Logits on a coarse grid, so that ties are common; now and then a NaN or an infinity.
Batch RandomBatch(const GateRule& rule, int32_t num_tokens, Random* random) {
  Batch batch{rule, num_tokens, static_cast<int32_t>(random->Below(num_tokens + 1)), {}, {}};
  batch.logits.resize(static_cast<size_t>(num_tokens) * rule.num_experts);
  const float step = random->Below(2) == 0 ? 0.25f : 1e-6f;
  for (float& x : batch.logits) {
    x = std::round(static_cast<float>(8 * random->Uniform() - 4) / step) * step;
    const uint32_t odd = random->Below(300);
    if (odd == 0) x = std::numeric_limits<float>::quiet_NaN();
    if (odd == 1) x = std::numeric_limits<float>::infinity();
    if (odd == 2) x = -std::numeric_limits<float>::infinity();
    if (odd == 3) x = -0.0f;
  }
  if (random->Below(3) > 0) {
    batch.bias.resize(static_cast<size_t>(rule.num_experts));
    for (float& x : batch.bias) {
      x = std::round(static_cast<float>(2 * random->Uniform() - 1.5) * 16) / 16;
    }
  }
  return batch;
}

// The bits, so that NaN and -0 count.
std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (float x : values) bits.push_back(std::bit_cast<uint32_t>(x));
  return bits;
}

void RequireSame(const Batch& batch, std::span<int32_t> workspace) {
  const size_t copies = static_cast<size_t>(batch.num_tokens) * batch.rule.top_k;
  const size_t tokens = static_cast<size_t>(batch.num_tokens);
  std::vector<int32_t> ids(copies), histogram(2 * static_cast<size_t>(batch.rule.num_experts));
  std::vector<float> weights(copies), margin(tokens), group_margin(tokens);
  GateArgs args = {.rule = batch.rule,
                   .num_tokens = batch.num_tokens,
                   .num_prefill = batch.num_prefill,
                   .logits = batch.logits,
                   .bias = batch.bias,
                   .ids = ids,
                   .weights = weights,
                   .histogram = histogram,
                   .margin = margin,
                   .group_margin = group_margin};
  REQUIRE(cpu::Gate(args, nullptr).ok());

  const DeviceArray<float> logits(batch.logits), bias(batch.bias);
  const DeviceArray<int32_t> device_ids(copies), device_histogram(histogram.size());
  const DeviceArray<float> device_weights(copies), device_margin(tokens), device_group(tokens);
  args.logits = logits.span();
  args.bias = bias.span();
  args.ids = device_ids.span();
  args.weights = device_weights.span();
  args.histogram = device_histogram.span();
  args.margin = device_margin.span();
  args.group_margin = device_group.span();
  args.workspace = workspace;
  const absl::Status status = cuda::Gate(args, nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  REQUIRE(device_ids.Read() == ids);
  REQUIRE(Bits(device_weights.Read()) == Bits(weights));
  REQUIRE(device_histogram.Read() == histogram);
  REQUIRE(Bits(device_margin.Read()) == Bits(margin));
  REQUIRE(Bits(device_group.Read()) == Bits(group_margin));
}

TEST_CASE("the gate on the device gives the bits of the CPU", "[device][gate]") {
  const GateRule rules[] = {
      {.num_experts = 32, .top_k = 4},
      {.num_experts = 256, .top_k = 8, .num_groups = 8, .top_groups = 4, .scale = 2.5f},
      {.num_experts = 90, .top_k = 6, .num_groups = 15, .top_groups = 3, .renormalise = false},
      {.num_experts = 261, .top_k = 32, .scale = 2.5f},
      {.num_experts = 12, .top_k = 2, .num_groups = 12, .top_groups = 5},
      {.num_experts = 64, .top_k = 6, .num_groups = 32, .top_groups = 32},
      {.num_experts = 7, .top_k = 7},
      {.num_experts = 1, .top_k = 1},
      {.num_experts = 2048, .top_k = 3, .num_groups = 4, .top_groups = 2},
  };
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 77);
    for (const GateRule& rule : rules) {
      const DeviceArray<int32_t> workspace(
          std::vector<int32_t>(2 * static_cast<size_t>(rule.num_experts) + 1, 0));
      for (const int32_t tokens : {static_cast<int32_t>(random.Below(40)) + 1, round % 2}) {
        CAPTURE(round, rule.num_experts, tokens);
        RequireSame(RandomBatch(rule, tokens, &random), workspace.span());
      }
      REQUIRE(workspace.Read() == std::vector<int32_t>(workspace.size(), 0));
    }
  });
}

TEST_CASE("a gate whose arrays do not fit is refused before it is launched", "[device][gate]") {
  const DeviceArray<float> logits(32), weights(4);
  const DeviceArray<int32_t> ids(4), histogram(64), workspace(64);  // one too few
  const absl::Status status = cuda::Gate({.rule = {.num_experts = 32, .top_k = 4},
                                          .num_tokens = 1,
                                          .logits = logits.span(),
                                          .bias = {},
                                          .ids = ids.span(),
                                          .weights = weights.span(),
                                          .histogram = histogram.span(),
                                          .workspace = workspace.span()},
                                         nullptr);
  REQUIRE(absl::IsInvalidArgument(status));
}

}  // namespace
}  // namespace ballast
