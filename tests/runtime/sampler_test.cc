#include "runtime/sampler.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

namespace ballast {
namespace {

TEST_CASE("temperature 0 takes the largest logit and the lower id of equals",
          "[runtime][sampler]") {
  Sampler sampler;
  REQUIRE(sampler.Sample(std::vector<float>{1, 3, 2, 3}, {.temperature = 0}, 5) == 1);
  REQUIRE(sampler.Sample(std::vector<float>{-1, -1}, {.temperature = 0}, 5) == 0);
}

TEST_CASE("samples follow the softmax of the temperature", "[runtime][sampler]") {
  Sampler sampler;
  const std::vector<float> logits = {0.5f, -1.0f, 2.0f, 0.0f, 2.0f};
  for (double temperature : {0.5, 1.0, 3.0}) {
    constexpr int kDraws = 40'000;
    std::vector<int> count(logits.size());
    for (int i = 0; i < kDraws; ++i) {
      ++count[sampler.Sample(logits, {.temperature = temperature, .top_p = 1.0, .seed = 3}, i)];
    }
    double total = 0;
    for (float x : logits) total += std::exp(x / temperature);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(logits[i] / temperature) / total;
      const double deviation = std::sqrt(p * (1 - p) * kDraws);
      CAPTURE(temperature, i, count[i], p);
      REQUIRE(std::abs(count[i] - p * kDraws) < 5 * deviation);
    }
  }
}

TEST_CASE("top_p keeps the fewest tokens that reach it", "[runtime][sampler]") {
  Sampler sampler;
  // Probabilities 0.4, 0.3, 0.2, 0.1 under ids 2, 0, 3, 1.
  std::vector<float> logits;
  for (double p : {0.3, 0.1, 0.4, 0.2}) logits.push_back(static_cast<float>(std::log(p)));
  const auto drawn = [&](double top_p) {
    std::set<int32_t> ids;
    for (int i = 0; i < 3000; ++i) {
      ids.insert(sampler.Sample(logits, {.temperature = 1, .top_p = top_p, .seed = 9}, i));
    }
    return ids;
  };
  REQUIRE(drawn(0.01) == std::set<int32_t>{2});
  REQUIRE(drawn(0.39) == std::set<int32_t>{2});
  REQUIRE(drawn(0.5) == std::set<int32_t>{0, 2});
  REQUIRE(drawn(0.75) == std::set<int32_t>{0, 2, 3});
  REQUIRE(drawn(1.0) == std::set<int32_t>{0, 1, 2, 3});
  // Of equal tokens the lower ids are kept.
  const std::vector<float> equal(4, 0.0f);
  logits = equal;
  REQUIRE(drawn(0.45) == std::set<int32_t>{0, 1});
}

TEST_CASE("a draw depends on seed and position and not on earlier draws", "[runtime][sampler]") {
  Sampler used, fresh;
  std::vector<float> logits(50);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7) * 0.3f;
  int same_seed = 0, same_position = 0;
  for (int64_t position = 0; position < 300; ++position) {
    const int32_t token = used.Sample(logits, {.seed = 1}, position);
    REQUIRE(token == fresh.Sample(logits, {.seed = 1}, position));
    fresh = Sampler();
    same_seed += token == used.Sample(logits, {.seed = 1}, position + 1);
    same_position += token == used.Sample(logits, {.seed = 2}, position);
  }
  REQUIRE(same_seed < 40);
  REQUIRE(same_position < 40);
}

}  // namespace
}  // namespace ballast
