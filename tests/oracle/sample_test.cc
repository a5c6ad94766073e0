// The stored logits were written by compare.py --write-sample from the `transformers`
// implementation in fp32, on the demo model.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>

#include "tests/support/single_rank_model.h"

namespace ballast {
namespace {

struct Sample {
  std::vector<int32_t> tokens;
  int32_t vocab = 0, length = 0, every = 0;
  std::vector<float> logits;  // of every `every`-th position
};

Sample ReadSample() {
  std::ifstream in(BALLAST_SOURCE_DIR "/tests/oracle/logits.bin", std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  int32_t head[4] = {};
  REQUIRE(bytes.size() > sizeof head);
  std::memcpy(head, bytes.data(), sizeof head);
  Sample sample;
  sample.vocab = head[1];
  sample.length = head[2];
  sample.every = head[3];
  for (int32_t i = 0; i < head[0]; ++i) {
    sample.tokens.push_back(static_cast<unsigned char>(bytes[sizeof head + i]));
  }
  sample.logits.resize((bytes.size() - sizeof head - head[0]) / sizeof(float));
  std::memcpy(sample.logits.data(), bytes.data() + sizeof head + head[0],
              sample.logits.size() * sizeof(float));
  return sample;
}

void CheckAgainstSample(DType dtype, const KernelSet& kernels, float bound) {
  const Sample sample = ReadSample();
  auto model =
      testing::SingleRankModel::Load(BALLAST_SOURCE_DIR "/deploy/demo/model", dtype, kernels);
  REQUIRE(model.ok());
  size_t row = 0, compared = 0;
  float largest = 0;
  for (size_t begin = 0; begin < sample.tokens.size(); begin += sample.length) {
    const auto logits =
        (*model)->Logits(std::span(sample.tokens).subspan(begin, sample.length), 96);
    REQUIRE(logits.ok());
    for (size_t i = begin; i < begin + sample.length; ++i) {
      if (i % sample.every != 0) continue;
      for (int32_t v = 0; v < sample.vocab; ++v) {
        largest = std::max(largest, std::abs((*logits)[(i - begin) * sample.vocab + v] -
                                             sample.logits[row * sample.vocab + v]));
        ++compared;
      }
      ++row;
    }
  }
  CHECK(compared == sample.logits.size());
  CHECK(compared > 10'000);
  CHECK(largest < bound);
}

TEST_CASE("fp32 logits of the demo model are those of the reference implementation",
          "[oracle][golden]") {
  CheckAgainstSample(DType::kF32, PlainKernels(), 1e-3f);
  CheckAgainstSample(DType::kF32, DefaultCpuKernels(), 1e-3f);
}

// bf16 rounds every activation to 8 bits; with oneDNN's products 0.32 was seen.
TEST_CASE("bf16 logits of the demo model stay near the reference implementation",
          "[oracle][golden]") {
  CheckAgainstSample(DType::kBF16, PlainKernels(), 1.0f);
}

}  // namespace
}  // namespace ballast
