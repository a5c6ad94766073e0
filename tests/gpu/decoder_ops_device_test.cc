#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "base/random.h"
#include "kernels/decoder_ops.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;

std::vector<float> RandomValues(size_t count, Random* random, double spread = 1.0) {
  std::vector<float> values(count);
  for (float& x : values) x = static_cast<float>(spread * (2 * random->Uniform() - 1));
  return values;
}

using Bytes = std::vector<uint8_t>;
Bytes Poison(size_t count) {
  return Bytes(count, 0xa5);
}

int32_t RandomCount(Random* random, int32_t most) {
  return static_cast<int32_t>(random->Below(static_cast<uint32_t>(most) + 1));
}

// The bits, so that -0 counts; NaNs are all the same one.
std::vector<uint32_t> Bits(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (float x : values) bits.push_back(std::isnan(x) ? 0x7fc00000u : std::bit_cast<uint32_t>(x));
  return bits;
}

TEST_CASE("embeddings, biases and branches on the device are the CPU's", "[device][ops]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 1);
    for (const int32_t rows : {RandomCount(&random, 20), 0}) {
      const int32_t width = 1 + RandomCount(&random, 70), vocab = 11;
      const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(width);
      std::vector<int32_t> token(static_cast<size_t>(rows));
      for (int32_t& t : token) t = RandomCount(&random, vocab - 1);
      const auto table = RandomValues(static_cast<size_t>(vocab * width), &random);
      const auto bias = RandomValues(static_cast<size_t>(width), &random);
      const auto branch = RandomValues(count, &random);
      std::vector<float> y(count);
      const DeviceArray<int32_t> d_token(token);
      const DeviceArray<float> d_table(table), d_bias(bias), d_branch(branch), d_y(count);

      EmbedArgs embed = {rows, width, token.data(), table.data(), y.data()};
      REQUIRE(cpu::Embed(embed, nullptr).ok());
      embed.token = d_token.data(), embed.table = d_table.data(), embed.y = d_y.data();
      REQUIRE(cuda::Embed(embed, nullptr).ok());
      REQUIRE(Bits(d_y.Read()) == Bits(y));

      REQUIRE(cpu::AddBias({rows, width, bias.data(), y.data()}, nullptr).ok());
      REQUIRE(cuda::AddBias({rows, width, d_bias.data(), d_y.data()}, nullptr).ok());
      REQUIRE(Bits(d_y.Read()) == Bits(y));

      REQUIRE(cpu::Add({rows, width, branch.data(), y.data()}, nullptr).ok());
      REQUIRE(cuda::Add({rows, width, d_branch.data(), d_y.data()}, nullptr).ok());
      REQUIRE(Bits(d_y.Read()) == Bits(y));
    }
  });
}

TEST_CASE("rms norm on the device gives the bits of the CPU", "[device][ops]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 2);
    const int32_t rows = round % 5 == 0 ? 0 : RandomCount(&random, 9);
    const int32_t heads = 1 + RandomCount(&random, 3), width = 1 + RandomCount(&random, 70);
    const int32_t stride = heads * width + RandomCount(&random, 5), tall = rows + 3;
    const size_t size = static_cast<size_t>(tall) * static_cast<size_t>(stride);
    const DType type = random.Below(2) == 0 ? DType::kF32 : DType::kBF16;
    const auto x = RandomValues(size, &random, 3.0), weight = RandomValues(width, &random);
    std::vector<int32_t> row(static_cast<size_t>(rows));
    for (int32_t& r : row) r = RandomCount(&random, tall - 1);
    const bool gathers = random.Below(2) == 0;
    CAPTURE(round, rows, heads, width, stride, gathers);

    const DeviceArray<float> d_x(x), d_weight(weight), d_f32(size);
    DeviceArray<uint8_t> d_act(size * SizeOf(type));
    const DeviceArray<int32_t> d_row(row);
    std::vector<float> f32(size, std::bit_cast<float>(0xa5a5a5a5u));
    Bytes act = Poison(size * SizeOf(type));
    const RmsNormArgs args = {.num_rows = rows,
                              .num_heads = heads,
                              .width = width,
                              .stride = stride,
                              .x = x.data(),
                              .row = gathers ? row.data() : nullptr,
                              .weight = weight.data(),
                              .eps = 1e-5f,
                              .y_f32 = f32.data(),
                              .act_type = type,
                              .y_act = act.data()};
    REQUIRE(cpu::RmsNorm(args, nullptr).ok());
    RmsNormArgs device = args;
    device.x = d_x.data(), device.weight = d_weight.data();
    device.row = gathers ? d_row.data() : nullptr;
    device.y_f32 = d_f32.data(), device.y_act = d_act.data();
    REQUIRE(cuda::RmsNorm(device, nullptr).ok());
    REQUIRE(Bits(d_f32.Read()) == Bits(f32));  // also that nothing else was written
    REQUIRE(d_act.Read() == act);

    if (gathers) return;
    device.y_f32 = d_x.data();  // in place, and nothing rounded
    device.y_act = nullptr;
    d_act.Fill(0x11);
    REQUIRE(cuda::RmsNorm(device, nullptr).ok());
    const auto got = d_x.Read();
    for (size_t i = 0; i < size; ++i) {
      const bool written = static_cast<int32_t>(i) / stride < rows &&
                           static_cast<int32_t>(i) % stride < heads * width;
      REQUIRE(got[i] == (written ? f32[i] : x[i]));
    }
    REQUIRE(d_act.Read() == Bytes(act.size(), 0x11));
  });
}

TEST_CASE("silu times up on the device gives the bits of the CPU", "[device][ops]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 3);
    const int32_t rows = round % 5 == 0 ? 0 : RandomCount(&random, 6);
    const int32_t width = 8 + RandomCount(&random, 60);
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(width);
    auto gate_up = RandomValues(2 * count, &random, 100.0);
    for (float odd : {inf, -inf, nan, -0.0f}) {
      if (count > 0) gate_up[random.Below(static_cast<uint32_t>(gate_up.size()))] = odd;
    }
    const DeviceArray<float> d_in(gate_up), d_f32(count);
    const DeviceArray<uint16_t> d_bf16(count);
    std::vector<float> f32(count);
    std::vector<uint16_t> bf16(count);
    REQUIRE(cpu::SiluMul({rows, width, gate_up.data(), DType::kF32, f32.data()}, nullptr).ok());
    REQUIRE(cpu::SiluMul({rows, width, gate_up.data(), DType::kBF16, bf16.data()}, nullptr).ok());
    REQUIRE(cuda::SiluMul({rows, width, d_in.data(), DType::kF32, d_f32.data()}, nullptr).ok());
    REQUIRE(cuda::SiluMul({rows, width, d_in.data(), DType::kBF16, d_bf16.data()}, nullptr).ok());
    REQUIRE(Bits(d_f32.Read()) == Bits(f32));
    const auto got = d_bf16.Read();
    for (size_t i = 0; i < count; ++i) {
      REQUIRE((got[i] == bf16[i] || (std::isnan(ToFloat(BFloat16{got[i]})) && std::isnan(f32[i]))));
    }
  });
}

TEST_CASE("the device finds the CPU's largest of a row", "[device][ops]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 8);
    const int32_t rows = round % 5 == 0 ? 0 : RandomCount(&random, 4);
    const int32_t width = 1 + RandomCount(&random, round % 2 == 0 ? 5 : 2500);
    auto x = RandomValues(static_cast<size_t>(rows) * static_cast<size_t>(width), &random, 4.0);
    const double odd = round % 3 == 0 ? 0.5 : 0.01;
    for (float& value : x) {
      value = std::round(value);  // so that ties are common, and zeros of both signs
      const float odds[] = {nan, -inf, round % 4 == 0 ? inf : nan};
      if (random.Uniform() < odd) value = odds[random.Below(3)];
    }
    CAPTURE(round, rows, width);
    std::vector<int32_t> id(static_cast<size_t>(rows));
    const DeviceArray<float> d_x(x);
    const DeviceArray<int32_t> d_id(id.size());
    REQUIRE(cpu::Argmax({rows, width, x.data(), id.data()}, nullptr).ok());
    REQUIRE(cuda::Argmax({rows, width, d_x.data(), d_id.data()}, nullptr).ok());
    REQUIRE(d_id.Read() == id);
  });
}

TEST_CASE("rotary on the device gives the bits of the CPU", "[device][ops]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 4);
    const int32_t rows = round % 5 == 0 ? 0 : RandomCount(&random, 6), context = 9;
    const int32_t heads = 1 + RandomCount(&random, 3), head_dim = 2 + 2 * RandomCount(&random, 12);
    const int32_t rotary_dim = 2 * RandomCount(&random, head_dim / 2);
    const int32_t stride = heads * head_dim + RandomCount(&random, 7);
    CAPTURE(round, rows, heads, head_dim, rotary_dim, stride);
    auto x = RandomValues(static_cast<size_t>(rows * stride), &random);
    const auto cos = RandomValues(static_cast<size_t>(context * rotary_dim / 2), &random);
    const auto sin = RandomValues(cos.size(), &random);
    std::vector<int32_t> position(static_cast<size_t>(rows));
    for (int32_t& p : position) p = RandomCount(&random, context - 1);
    const DeviceArray<float> d_x(x), d_cos(cos), d_sin(sin);
    const DeviceArray<int32_t> d_position(position);
    RotaryArgs args = {rows,     heads,           head_dim,   rotary_dim, stride,
                       x.data(), position.data(), cos.data(), sin.data()};
    REQUIRE(cpu::Rotary(args, nullptr).ok());
    args.x = d_x.data(), args.position = d_position.data();
    args.cos = d_cos.data(), args.sin = d_sin.data();
    REQUIRE(cuda::Rotary(args, nullptr).ok());
    REQUIRE(Bits(d_x.Read()) == Bits(x));
  });
}

}  // namespace
}  // namespace ballast
