#include "kernels/grouped_mlp.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/random.h"
#include "kernels/gated_mlp.h"

namespace ballast {
namespace {

std::vector<float> RandomFloats(size_t count, Random* random) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(2 * random->Uniform() - 1);
  return values;
}

AlignedBuffer Rounded(const std::vector<float>& values, DType type) {
  AlignedBuffer buffer(values.size() * SizeOf(type));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == DType::kF32) {
      buffer.as<float>()[i] = values[i];
    } else {
      buffer.as<BFloat16>()[i] = ToBFloat16(values[i]);
    }
  }
  return buffer;
}

TEST_CASE("a packed expert alternates eight rows of gate and up and ends with down",
          "[kernels][grouped_mlp]") {
  const ExpertShape shape = {.hidden = 8, .inter = 16, .dtype = DType::kF32};
  REQUIRE(shape.down_offset() == 1024);
  REQUIRE(shape.packed_bytes() == 1536);
  std::vector<float> gate(128), up(128), down(128);
  for (size_t i = 0; i < 128; ++i) {
    gate[i] = static_cast<float>(i);
    up[i] = static_cast<float>(1000 + i);
    down[i] = static_cast<float>(2000 + i);
  }
  AlignedBuffer packed(shape.packed_bytes());
  REQUIRE(PackExpert(shape, gate.data(), up.data(), down.data(), DType::kF32, packed.data()).ok());
  const float* at = packed.as<float>();
  REQUIRE(at[0] == 0);              // row 0 of gate
  REQUIRE(at[7 * 8 + 3] == 59);     // row 7
  REQUIRE(at[8 * 8] == 1000);       // row 0 of up
  REQUIRE(at[16 * 8] == 64);        // row 8 of gate
  REQUIRE(at[31 * 8 + 7] == 1127);  // row 15 of up
  REQUIRE(at[256] == 2000);
  REQUIRE(at[383] == 2127);
}

TEST_CASE("the grouped mlp gives the bits of one mlp per expert", "[kernels][grouped_mlp]") {
  Random random(3);
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const ExpertShape shape = {.hidden = 40, .inter = 24, .dtype = type};
    const size_t matrix = 40 * 24;
    constexpr int32_t kRows = 12;
    const size_t block_bytes = shape.packed_bytes();
    AlignedBuffer arena(2 * block_bytes);
    const AlignedBuffer x = Rounded(RandomFloats(kRows * 40, &random), type);
    const int32_t begin[] = {0, 0, 5}, rows[] = {5, 0, 7}, block[] = {1, 0, 0};
    AlignedBuffer activated(kRows * 24 * SizeOf(type)), y(kRows * 40 * SizeOf(type));
    std::vector<float> expected(16 * 40), all;
    auto mlp = GatedMlp::Create(PlainKernels(), 40, 24, type);
    REQUIRE(mlp.ok());
    for (const int g : {0, 2}) {
      const std::vector<float> gate = RandomFloats(matrix, &random);
      const std::vector<float> up = RandomFloats(matrix, &random);
      const std::vector<float> down = RandomFloats(matrix, &random);
      std::byte* to = arena.data() + static_cast<size_t>(block[g]) * block_bytes;
      REQUIRE(PackExpert(shape, gate.data(), up.data(), down.data(), DType::kF32, to).ok());
      AlignedBuffer packed((*mlp)->packed_bytes()), padded(16 * 40 * SizeOf(type));
      REQUIRE((*mlp)->Pack(gate.data(), up.data(), down.data(), DType::kF32, packed.data()).ok());
      std::memcpy(padded.data(), x.data() + static_cast<size_t>(begin[g]) * 40 * SizeOf(type),
                  static_cast<size_t>(rows[g]) * 40 * SizeOf(type));
      REQUIRE((*mlp)->Run(padded.data(), rows[g], packed.data(), expected.data(), nullptr).ok());
      all.insert(all.end(), expected.begin(), expected.begin() + rows[g] * 40);
    }
    REQUIRE(cpu::GroupedMlp({.shape = shape,
                             .groups = {.num_groups = 3,
                                        .num_rows = kRows,
                                        .max_rows = kRows,
                                        .begin = begin,
                                        .rows = rows,
                                        .block = block,
                                        .arena = arena.data(),
                                        .block_bytes = block_bytes,
                                        .num_blocks = 2},
                             .x = x.data(),
                             .activated = activated.data(),
                             .y = y.data()},
                            nullptr)
                .ok());
    const AlignedBuffer rounded = Rounded(all, type);
    REQUIRE(std::memcmp(y.data(), rounded.data(), y.size()) == 0);
  }
}

}  // namespace
}  // namespace ballast
