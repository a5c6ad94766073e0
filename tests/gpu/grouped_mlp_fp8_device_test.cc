#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/random.h"
#include "kernels/e4m3.h"
#include "kernels/grouped_mlp_fp8.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/random_groups.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;
using testing::Group;
using testing::GroupTables;
using testing::kPoison;
using testing::RandomGroups;

size_t Blocks(int32_t n) {
  return static_cast<size_t>((n + kScaleBlock - 1) / kScaleBlock);
}

struct Matrix {
  size_t columns = 0;
  std::vector<uint8_t> values;
  std::vector<float> scales;

  Fp8Matrix view() const { return {values.data(), scales.data()}; }
  double at(size_t r, size_t c) const {
    const size_t across = (columns + kScaleBlock - 1) / kScaleBlock;
    return double{FromE4M3(values[r * columns + c])} *
           scales[r / kScaleBlock * across + c / kScaleBlock];
  }
};

// Quantised random numbers whose size differs from block to block, and from matrix to matrix.
Matrix RandomMatrix(int32_t rows, int32_t columns, Random* random) {
  const size_t first = random->Below(4);
  Matrix m;
  m.columns = static_cast<size_t>(columns);
  std::vector<float> w(static_cast<size_t>(rows) * m.columns);
  for (size_t i = 0; i < w.size(); ++i) {
    const size_t block = i / m.columns / kScaleBlock * 3 + i % m.columns / kScaleBlock;
    const double size = (1 + static_cast<double>((first + block) % 4)) / std::sqrt(columns);
    w[i] = static_cast<float>((2 * random->Uniform() - 1) * size);
  }
  m.values.resize(w.size());
  m.scales.resize(Blocks(rows) * Blocks(columns));
  QuantiseMatrix(w.data(), rows, columns, m.values.data(), m.scales.data());
  return m;
}

struct Expert {
  Matrix gate, up, down;
};

struct Problem {
  Fp8ExpertShape shape;
  int32_t num_rows = 0;
  std::vector<Group> groups;
  std::vector<Expert> experts;  // by block
  std::vector<BFloat16> x;
};

Problem MakeProblem(const Fp8ExpertShape& shape, int32_t most_rows, Random* random) {
  Problem p;
  p.shape = shape;
  p.groups = RandomGroups(most_rows, 2, random, &p.num_rows);
  for (int b = 0; b < 2; ++b) {
    p.experts.push_back({RandomMatrix(shape.inter, shape.hidden, random),
                         RandomMatrix(shape.inter, shape.hidden, random),
                         RandomMatrix(shape.hidden, shape.inter, random)});
  }
  p.x.resize(static_cast<size_t>(p.num_rows) * static_cast<size_t>(shape.hidden));
  for (BFloat16& value : p.x) value = ToBFloat16(static_cast<float>(4 * random->Uniform() - 2));
  return p;
}

ExpertGroups GroupsOf(const Problem& p) {
  ExpertGroups groups = {.num_groups = static_cast<int32_t>(p.groups.size()),
                         .num_rows = p.num_rows};
  for (const Group& g : p.groups) groups.max_rows += g.rows;
  return groups;
}

struct Rows {
  std::vector<uint8_t> values;
  std::vector<float> scales;
};

// The rows as kernels see them: quantised, and what that stands for.
Rows QuantiseOnCpu(const Problem& p, const std::vector<BFloat16>& x, int32_t width) {
  Rows rows = {std::vector<uint8_t>(x.size(), kPoison),
               std::vector<float>(Blocks(width) * static_cast<size_t>(p.num_rows))};
  std::memset(rows.scales.data(), kPoison, rows.scales.size() * sizeof(float));
  const GroupTables tables(p.groups);
  ExpertGroups groups = GroupsOf(p);
  groups.begin = tables.begin.data();
  groups.rows = tables.rows.data();
  REQUIRE(
      cpu::QuantiseRows({groups, width, x.data(), rows.values.data(), rows.scales.data()}, nullptr)
          .ok());
  return rows;
}
std::vector<double> Dequantised(const Problem& p, const Rows& rows, int32_t width, int32_t row) {
  std::vector<double> x(static_cast<size_t>(width));
  for (size_t c = 0; c < x.size(); ++c) {
    x[c] =
        double{FromE4M3(rows.values[static_cast<size_t>(row) * x.size() + c])} *
        rows.scales[c / kScaleBlock * static_cast<size_t>(p.num_rows) + static_cast<size_t>(row)];
  }
  return x;
}

struct Result {
  std::vector<BFloat16> activated, y;
};

std::vector<BFloat16> AsBf16(const std::vector<uint16_t>& bits) {
  std::vector<BFloat16> values;
  for (uint16_t b : bits) values.push_back(BFloat16{b});
  return values;
}
std::vector<uint16_t> Bits(const std::vector<BFloat16>& values) {
  std::vector<uint16_t> bits;
  for (BFloat16 v : values) bits.push_back(v.bits);
  return bits;
}

Result RunOnDevice(const Problem& p, GroupSize size) {
  const size_t block_bytes = p.shape.packed_bytes() + 32;
  std::vector<std::byte> packed(p.experts.size() * block_bytes, std::byte{kPoison});
  for (size_t b = 0; b < p.experts.size(); ++b) {
    const Expert& e = p.experts[b];
    REQUIRE(PackFp8Expert(p.shape, e.gate.view(), e.up.view(), e.down.view(),
                          packed.data() + b * block_bytes)
                .ok());
  }
  const auto rows = static_cast<size_t>(p.num_rows);
  const int32_t widest = std::max(p.shape.hidden, p.shape.inter);
  const DeviceArray<std::byte> arena(packed);
  const DeviceArray<uint16_t> x(Bits(p.x)), y(p.x.size());
  const DeviceArray<uint16_t> activated(rows * static_cast<size_t>(p.shape.inter));
  const DeviceArray<uint8_t> values(rows * static_cast<size_t>(widest));
  const DeviceArray<float> scales(rows * Blocks(widest));
  const GroupTables tables(p.groups);
  const DeviceArray<int32_t> begin(tables.begin), in_group(tables.rows), block(tables.block);
  ExpertGroups groups = GroupsOf(p);
  groups.size = size;
  groups.begin = begin.data();
  groups.rows = in_group.data();
  groups.block = block.data();
  groups.arena = arena.data();
  groups.block_bytes = block_bytes;
  groups.num_blocks = static_cast<int32_t>(p.experts.size());
  const absl::Status status = cuda::GroupedMlpFp8(
      {p.shape, groups, x.data(), activated.data(), values.data(), scales.data(), y.data()},
      nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  return {AsBf16(activated.Read()), AsBf16(y.Read())};
}

// Adds up squares of what differs, and of what is expected.
struct Norm {
  double error = 0, all = 0;
  void Add(BFloat16 value, double expected) {
    const double d = ToFloat(value) - expected;
    error += d * d;
    all += expected * expected;
  }
  bool IsBelow(double bound) const { return std::sqrt(error) <= bound * std::sqrt(all); }
};

// Each product against fp64, from the numbers that its operands stand for. Rows outside of groups
// hold their poison.
void RequireClose(const Problem& p, const Result& result, double bound) {
  const auto hidden = static_cast<size_t>(p.shape.hidden);
  const auto inter = static_cast<size_t>(p.shape.inter);
  const Rows x = QuantiseOnCpu(p, p.x, p.shape.hidden);
  const Rows h = QuantiseOnCpu(p, result.activated, p.shape.inter);
  std::vector<bool> used(static_cast<size_t>(p.num_rows), false);
  Norm first, second;
  for (const Group& g : p.groups) {
    const Expert& e = p.experts[static_cast<size_t>(g.block)];
    for (int32_t row = g.begin; row < g.begin + g.rows; ++row) {
      const auto at = static_cast<size_t>(row);
      used[at] = true;
      const std::vector<double> from = Dequantised(p, x, p.shape.hidden, row);
      for (size_t i = 0; i < inter; ++i) {
        double gate = 0, up = 0;
        for (size_t k = 0; k < hidden; ++k) {
          gate += from[k] * e.gate.at(i, k);
          up += from[k] * e.up.at(i, k);
        }
        first.Add(result.activated[at * inter + i], gate / (1 + std::exp(-gate)) * up);
      }
      const std::vector<double> middle = Dequantised(p, h, p.shape.inter, row);
      for (size_t i = 0; i < hidden; ++i) {
        double sum = 0;
        for (size_t k = 0; k < inter; ++k) sum += middle[k] * e.down.at(i, k);
        second.Add(result.y[at * hidden + i], sum);
      }
    }
  }
  CAPTURE(first.error, first.all, second.error, second.all);
  REQUIRE(first.IsBelow(bound));  // a NaN is not
  REQUIRE(second.IsBelow(bound));
  for (size_t i = 0; i < result.y.size(); ++i) {
    if (!used[i / hidden]) REQUIRE(result.y[i].bits == (kPoison << 8 | kPoison));
  }
}

TEST_CASE("rows are quantised on the device to the bits of the CPU", "[device][fp8]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 41);
    Problem p;
    const int32_t width = 16 + 16 * static_cast<int32_t>(random.Below(20));
    p.groups = RandomGroups(20, 1, &random, &p.num_rows);
    p.x.resize(static_cast<size_t>(p.num_rows) * static_cast<size_t>(width));
    for (BFloat16& value : p.x) {
      value = ToBFloat16(static_cast<float>(
          std::ldexp(2 * random.Uniform() - 1, static_cast<int>(random.Below(12)) - 9)));
      if (random.Below(2000) == 0) value = ToBFloat16(std::nanf(""));
    }
    if (round % 4 == 0) std::memset(p.x.data(), 0, p.x.size() * sizeof(BFloat16));
    CAPTURE(round, width, p.num_rows);
    const Rows expected = QuantiseOnCpu(p, p.x, width);
    const GroupTables tables(p.groups);
    const DeviceArray<int32_t> begin(tables.begin), rows(tables.rows);
    const DeviceArray<uint16_t> x(Bits(p.x));
    const DeviceArray<uint8_t> values(expected.values.size());
    const DeviceArray<float> scales(expected.scales.size());
    ExpertGroups groups = GroupsOf(p);
    groups.begin = begin.data();
    groups.rows = rows.data();
    REQUIRE(
        cuda::QuantiseRows({groups, width, x.data(), values.data(), scales.data()}, nullptr).ok());
    REQUIRE(values.Read() == expected.values);
    const std::vector<float> read = scales.Read();
    REQUIRE(std::memcmp(read.data(), expected.scales.data(), read.size() * sizeof(float)) == 0);
  });
}

TEST_CASE("the grouped mlp in e4m3 is as close as its result can be", "[device][fp8]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 53);
    // Up to three scales along either size.
    const Fp8ExpertShape shape = {.hidden = 16 + 16 * static_cast<int32_t>(random.Below(20)),
                                  .inter = 16 + 16 * static_cast<int32_t>(random.Below(20))};
    const Problem p = MakeProblem(shape, round % 5 == 0 ? 140 : 9, &random);
    CAPTURE(round, shape.hidden, shape.inter, p.num_rows);
    const Result large = RunOnDevice(p, GroupSize::kLarge);
    RequireClose(p, large, 1e-2);
    const Result small = RunOnDevice(p, GroupSize::kSmall);
    REQUIRE(Bits(small.activated) == Bits(large.activated));
    REQUIRE(Bits(small.y) == Bits(large.y));
  });
}

TEST_CASE("a shape that e4m3 cannot have is refused", "[device][fp8]") {
  Fp8MlpArgs args;
  args.shape = {.hidden = 24, .inter = 16};
  REQUIRE(cuda::GroupedMlpFp8(args, nullptr).message() ==
          "grouped mlp fp8: hidden is 24, allowed: positive multiples of 16");
  args.shape = {.hidden = 16, .inter = 0};
  REQUIRE(cuda::GroupedMlpFp8(args, nullptr).message() ==
          "grouped mlp fp8: inter is 0, allowed: positive multiples of 16");
  args.shape = {.hidden = 16, .inter = 16};
  args.groups.num_blocks = 1;
  args.groups.block_bytes = 768;
  REQUIRE(
      cuda::GroupedMlpFp8(args, nullptr).message() ==
      "grouped mlp: 1 blocks of 768 bytes, allowed: 1 or more, of a multiple of 16 from 784 up");
}

}  // namespace
}  // namespace ballast
