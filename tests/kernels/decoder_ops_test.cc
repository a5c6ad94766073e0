#include "kernels/decoder_ops.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/random.h"
#include "kernels/vector_math.h"

namespace ballast {
namespace {

std::vector<float> RandomValues(size_t count, uint64_t seed, double spread = 1.0) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& x : values) x = static_cast<float>(spread * (2 * random.Uniform() - 1));
  return values;
}

// Distance in units in the last place of `want`.
double Ulps(float got, double want) {
  const float near = static_cast<float>(want);
  const float next = std::nextafter(std::abs(near), std::numeric_limits<float>::infinity());
  return std::abs(double{got} - want) / (double{next} - std::abs(double{near}));
}

TEST_CASE("Exp is within two ulp", "[kernels][property]") {
  double worst = 0;
  Random random(1);
  for (int i = 0; i < 300'000; ++i) {
    const float x = static_cast<float>(174 * random.Uniform() - 87);
    worst = std::max(worst, Ulps(cpu::Exp(x), std::exp(double{x})));
  }
  for (float x : {0.0f, -0.0f, 1.0f, -1.0f, 0x1.0p-30f, 86.99f, -86.99f}) {
    worst = std::max(worst, Ulps(cpu::Exp(x), std::exp(double{x})));
  }
  CAPTURE(worst);
  REQUIRE(worst <= 2.0);
}

TEST_CASE("Exp ends where floats end", "[kernels][unit]") {
  const float inf = std::numeric_limits<float>::infinity();
  for (float x : {-88.0f, -104.0f, -1e30f, -inf}) REQUIRE(cpu::Exp(x) == 0.0f);
  for (float x : {89.0f, 1e30f, inf}) REQUIRE(cpu::Exp(x) == cpu::Exp(88.5f));
  REQUIRE(cpu::Exp(88.5f) > 2.5e38f);
  REQUIRE(std::isnan(cpu::Exp(std::nanf(""))));
  REQUIRE(cpu::Sigmoid(inf) == 1.0f);
  REQUIRE(cpu::Sigmoid(0.0f) == 0.5f);
  REQUIRE(cpu::Sigmoid(-inf) < 1e-38f);
}

TEST_CASE("bfloat16 rounds to nearest with ties to even and keeps NaN", "[base][unit]") {
  REQUIRE(ToBFloat16(1.0f).bits == 0x3f80);
  REQUIRE(ToBFloat16(1.0f + 0x1.0p-8f).bits == 0x3f80);
  REQUIRE(ToBFloat16(1.0f + 0x1.8p-7f).bits == 0x3f82);
  REQUIRE(ToBFloat16(1.0f + 0x1.02p-8f).bits == 0x3f81);
  REQUIRE(std::isnan(ToFloat(ToBFloat16(std::nanf("")))));
  REQUIRE(std::isinf(ToFloat(ToBFloat16(std::numeric_limits<float>::max()))));
}

TEST_CASE("rms norm agrees with fp64 in both outputs", "[kernels][property]") {
  for (int width : {1, 16, 33, 128}) {
    const size_t w = static_cast<size_t>(width);
    const auto x = RandomValues(5 * w, 2, 3.0), weight = RandomValues(w, 3);
    std::vector<float> y(5 * w), same(5 * w);
    std::vector<BFloat16> rounded(5 * w);
    REQUIRE(cpu::RmsNorm({.num_rows = 5,
                          .width = width,
                          .x = x.data(),
                          .weight = weight.data(),
                          .eps = 1e-5f,
                          .y_f32 = y.data(),
                          .act_type = DType::kBF16,
                          .y_act = rounded.data()},
                         nullptr)
                .ok());
    REQUIRE(cpu::RmsNorm({.num_rows = 5,
                          .width = width,
                          .x = x.data(),
                          .weight = weight.data(),
                          .eps = 1e-5f,
                          .y_act = same.data()},
                         nullptr)
                .ok());
    REQUIRE(y == same);
    for (size_t t = 0; t < 5; ++t) {
      double squares = 0;
      for (size_t i = 0; i < w; ++i) squares += double{x[t * w + i]} * x[t * w + i];
      const double factor = 1 / std::sqrt(squares / width + 1e-5);
      for (size_t i = 0; i < w; ++i) {
        REQUIRE(y[t * w + i] == Approx(x[t * w + i] * factor * weight[i]).epsilon(2e-6));
        REQUIRE(rounded[t * w + i].bits == ToBFloat16(y[t * w + i]).bits);
      }
    }
  }
}

TEST_CASE("rms norm takes heads out of rows, and rows by their number", "[kernels][unit]") {
  const int heads = 3, width = 20, stride = 90, rows = 4;  // 30 floats of a row are another's
  const auto x = RandomValues(rows * stride, 8, 3.0), weight = RandomValues(width, 9);
  const std::vector<int32_t> row = {2, 0, 2};
  auto y = RandomValues(rows * stride, 10);
  const auto before = y;
  auto in_place = x;
  RmsNormArgs args = {.num_rows = 3,
                      .num_heads = heads,
                      .width = width,
                      .stride = stride,
                      .x = x.data(),
                      .row = row.data(),
                      .weight = weight.data(),
                      .eps = 1e-5f,
                      .y_f32 = y.data()};
  REQUIRE(cpu::RmsNorm(args, nullptr).ok());
  args.num_rows = rows;
  args.row = nullptr;
  args.x = args.y_f32 = in_place.data();
  REQUIRE(cpu::RmsNorm(args, nullptr).ok());
  for (int t = 0; t < rows; ++t) {
    for (int c = 0; c < stride; ++c) {
      const int at = t * stride + c, from = t < 3 ? row[t] : t;
      if (c >= heads * width || t == 3) REQUIRE(y[at] == before[at]);
      if (c >= heads * width) REQUIRE(in_place[at] == x[at]);
      if (c >= heads * width || c % width != 0) continue;
      std::vector<float> alone(width);  // one head, as a row of its own
      REQUIRE(cpu::RmsNorm({.num_rows = 1,
                            .width = width,
                            .x = &x[from * stride + c],
                            .weight = weight.data(),
                            .eps = 1e-5f,
                            .y_f32 = alone.data()},
                           nullptr)
                  .ok());
      for (int i = 0; i < width; ++i) {
        if (t < 3) REQUIRE(y[at + i] == alone[i]);
        if (from == t) REQUIRE(in_place[at + i] == alone[i]);
      }
    }
  }
}

TEST_CASE("embeddings are copied, branches and biases added", "[kernels][unit]") {
  const std::vector<float> table = {1, 2, 3, 10, 20, 30, 100, 200, 300}, bias = {0.5f, 0, -1};
  const std::vector<int32_t> token = {2, 0, 2};
  std::vector<float> y(12, 7);  // the last row is not the batch's
  const auto embed = [&](int rows) {
    return cpu::Embed(
        {.num_rows = rows, .width = 3, .token = token.data(), .table = table.data(), .y = y.data()},
        nullptr);
  };
  REQUIRE(embed(0).ok());
  REQUIRE(y == std::vector<float>(12, 7));
  REQUIRE(embed(3).ok());
  REQUIRE(y == std::vector<float>{100, 200, 300, 1, 2, 3, 100, 200, 300, 7, 7, 7});
  REQUIRE(
      cpu::AddBias({.num_rows = 3, .width = 3, .bias = bias.data(), .y = y.data()}, nullptr).ok());
  REQUIRE(y == std::vector<float>{100.5f, 200, 299, 1.5f, 2, 2, 100.5f, 200, 299, 7, 7, 7});
  REQUIRE(cpu::Add({.num_rows = 2, .width = 3, .x = table.data(), .y = y.data()}, nullptr).ok());
  REQUIRE(y == std::vector<float>{101.5f, 202, 302, 11.5f, 22, 32, 100.5f, 200, 299, 7, 7, 7});
}

TEST_CASE("the largest of a row is found, the first of several", "[kernels][unit]") {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  const std::vector<float> x = {1,    3,    2, 3,  //
                                -inf, -inf, 0, -0.0f, nan, nan, -inf, -1, nan, -1, inf, inf};
  std::vector<int32_t> id(5, -7);
  REQUIRE(cpu::Argmax({.num_rows = 4, .width = 4, .x = x.data(), .id = id.data()}, nullptr).ok());
  // A NaN at 0 is not less than anything, so it stays.
  REQUIRE(id == std::vector<int32_t>{1, 2, 0, 0, -7});
}

TEST_CASE("silu times up agrees with fp64", "[kernels][property]") {
  const auto in = RandomValues(2 * 2 * 37, 4, 20.0);
  std::vector<float> y(2 * 37);
  REQUIRE(cpu::SiluMul({.num_rows = 2,
                        .width = 37,
                        .gate_up = in.data(),
                        .act_type = DType::kF32,
                        .y = y.data()},
                       nullptr)
              .ok());
  for (size_t t = 0; t < 2; ++t) {
    for (size_t i = 0; i < 37; ++i) {
      const double gate = in[t * 74 + i], up = in[t * 74 + 37 + i];
      REQUIRE(y[t * 37 + i] == Approx(gate / (1 + std::exp(-gate)) * up).epsilon(2e-6));
    }
  }
}

TEST_CASE("rotary turns halves by the angle of the position", "[kernels][property]") {
  const int heads = 2, head_dim = 12, rotary_dim = 8, half = 4, stride = 30;
  std::vector<float> cos, sin;
  for (int position = 0; position < 6; ++position) {
    for (int i = 0; i < half; ++i) {
      cos.push_back(static_cast<float>(std::cos(position * (i + 1) * 0.3)));
      sin.push_back(static_cast<float>(std::sin(position * (i + 1) * 0.3)));
    }
  }
  const std::vector<int32_t> position = {5, 0, 3};
  const auto before = RandomValues(3 * stride, 5);
  auto x = before;
  REQUIRE(cpu::Rotary({.num_rows = 3,
                       .num_heads = heads,
                       .head_dim = head_dim,
                       .rotary_dim = rotary_dim,
                       .stride = stride,
                       .x = x.data(),
                       .position = position.data(),
                       .cos = cos.data(),
                       .sin = sin.data()},
                      nullptr)
              .ok());
  for (int t = 0; t < 3; ++t) {
    for (int c = 0; c < stride; ++c) {
      const int at = t * stride + c, i = c % head_dim;
      if (c >= heads * head_dim || i >= rotary_dim) {
        REQUIRE(x[at] == before[at]);
        continue;
      }
      const double angle = position[t] * (i % half + 1) * 0.3;
      const double other = i < half ? -before[at + half] : before[at - half];
      REQUIRE(x[at] == Approx(before[at] * std::cos(angle) + other * std::sin(angle)).margin(1e-6));
    }
  }
}

// One sequence's queries, keys and values, and a cache in which its blocks stand in some order.
struct Sequence {
  static constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 20;
  static constexpr int kStride = (kHeads + 2 * kKvHeads) * kHeadDim;

  Sequence(int num_tokens, DType cache_type, std::vector<int32_t> block_ids, int num_blocks)
      : tokens(num_tokens),
        type(cache_type),
        blocks(std::move(block_ids)),
        rows(RandomValues(static_cast<size_t>(num_tokens) * kStride, 6)),
        keys(static_cast<size_t>(num_blocks) * kKvHeads * kKvBlockTokens * kHeadDim),
        values(keys.size()),
        y(static_cast<size_t>(num_tokens) * kHeads * kHeadDim) {}

  // Writes and attends tokens [begin, end) in one batch.
  void Run(int begin, int end) {
    std::vector<int32_t> position, offset;
    for (int t = begin; t < end; ++t) position.push_back(t), offset.push_back(1);
    std::vector<int32_t> table = {-1};  // another sequence's entry stands before ours
    table.insert(table.end(), blocks.begin(), blocks.end());
    const KvIndex index{position, offset, table};
    const KvLayerView cache{type, keys.data(), values.data()};
    const float* q = rows.data() + static_cast<size_t>(begin) * kStride;
    REQUIRE(cpu::KvWrite({.num_rows = end - begin,
                          .kv_heads = kKvHeads,
                          .head_dim = kHeadDim,
                          .stride = kStride,
                          .k = q + kHeads * kHeadDim,
                          .v = q + (kHeads + kKvHeads) * kHeadDim,
                          .index = index,
                          .cache = cache},
                         nullptr)
                .ok());
    REQUIRE(cpu::Attention({.num_rows = end - begin,
                            .num_heads = kHeads,
                            .kv_heads = kKvHeads,
                            .head_dim = kHeadDim,
                            .stride = kStride,
                            .q = q,
                            .index = index,
                            .cache = cache,
                            .act_type = DType::kF32,
                            .y = y.data() + static_cast<size_t>(begin) * kHeads * kHeadDim},
                           nullptr)
                .ok());
  }
  float Row(int t, int at) const { return rows[static_cast<size_t>(t) * kStride + at]; }
  float Stored(int t, int at) const {
    return type == DType::kF32 ? Row(t, at) : ToFloat(ToBFloat16(Row(t, at)));
  }

  int tokens;
  DType type;
  std::vector<int32_t> blocks;
  std::vector<float> rows;
  std::vector<float> keys, values;  // room enough for either type
  std::vector<float> y;
};

TEST_CASE("attention agrees with its definition in fp64", "[kernels][property]") {
  for (DType type : {DType::kF32, DType::kBF16}) {
    Sequence s(150, type, {0, 1, 2}, 3);
    s.Run(0, s.tokens);
    double worst = 0;
    for (int t = 0; t < s.tokens; ++t) {
      for (int h = 0; h < Sequence::kHeads; ++h) {
        const int dim = Sequence::kHeadDim, kv = h / 2;
        std::vector<double> p(static_cast<size_t>(t) + 1);
        double largest = -1e300, sum = 0;
        for (int j = 0; j <= t; ++j) {
          double dot = 0;
          for (int d = 0; d < dim; ++d) {
            dot += double{s.Row(t, h * dim + d)} * s.Stored(j, (Sequence::kHeads + kv) * dim + d);
          }
          p[j] = dot / std::sqrt(double{dim});
          largest = std::max(largest, p[j]);
        }
        for (double& x : p) sum += x = std::exp(x - largest);
        for (int d = 0; d < dim; ++d) {
          double want = 0;
          for (int j = 0; j <= t; ++j) {
            want +=
                p[j] / sum * s.Stored(j, (Sequence::kHeads + Sequence::kKvHeads + kv) * dim + d);
          }
          const size_t at = (static_cast<size_t>(t) * Sequence::kHeads + h) * dim + d;
          worst = std::max(worst, std::abs(want - s.y[at]));
        }
      }
    }
    CAPTURE(NameOf(type), worst);
    // Values are at most 1; a few hundred roundings of half an ulp of fp32.
    REQUIRE(worst < 2e-6);
  }
}

TEST_CASE("attention's bits depend neither on chunks nor on where blocks stand",
          "[kernels][property]") {
  for (DType type : {DType::kF32, DType::kBF16}) {
    Sequence whole(150, type, {0, 1, 2}, 3);
    whole.Run(0, 150);
    for (int chunk : {1, 7, 64, 100}) {
      CAPTURE(chunk);
      Sequence cut(150, type, {6, 2, 4}, 8);
      for (int begin = 0; begin < 150; begin += chunk) cut.Run(begin, std::min(150, begin + chunk));
      REQUIRE(cut.y == whole.y);
    }
    // What an earlier sequence left in the blocks is never read.
    Sequence dirty(150, type, {0, 1, 2}, 3);
    for (float& x : dirty.keys) x = std::nanf("");
    for (float& x : dirty.values) x = std::nanf("");
    dirty.Run(0, 150);
    REQUIRE(dirty.y == whole.y);
  }
}

}  // namespace
}  // namespace ballast
