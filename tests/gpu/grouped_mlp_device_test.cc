#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/random.h"
#include "kernels/grouped_mlp.h"
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
using Bytes = std::vector<std::byte>;

// Inputs, and everything that the CPU makes of them.
struct Problem {
  ExpertShape shape;
  int32_t num_rows;
  std::vector<Group> groups;
  size_t block_bytes;
  AlignedBuffer arena, x;
};

float Element(DType type, const std::byte* from, size_t i) {
  return type == DType::kF32 ? reinterpret_cast<const float*>(from)[i]
                             : ToFloat(reinterpret_cast<const BFloat16*>(from)[i]);
}

void FillRandom(DType type, double scale, Random* random, std::byte* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const float value = static_cast<float>((2 * random->Uniform() - 1) * scale);
    if (type == DType::kF32) {
      reinterpret_cast<float*>(to)[i] = value;
    } else {
      reinterpret_cast<BFloat16*>(to)[i] = ToBFloat16(value);
    }
  }
}

// Experts in all blocks of an arena, with noise between them; x is noise where no group is.
Problem MakeProblem(const ExpertShape& shape, int32_t num_rows, std::vector<Group> groups,
                    int32_t num_blocks, Random* random) {
  const size_t block_bytes = shape.packed_bytes() + 48;
  Problem p = {shape, num_rows, std::move(groups), block_bytes, {}, {}};
  p.arena = AlignedBuffer(block_bytes * static_cast<size_t>(num_blocks));
  const size_t matrix = static_cast<size_t>(shape.hidden) * static_cast<size_t>(shape.inter);
  for (int32_t b = 0; b < num_blocks; ++b) {
    std::vector<float> part[3];
    for (std::vector<float>& m : part) {
      m.resize(matrix);
      const double scale =
          1.7 / std::sqrt(static_cast<double>(&m == &part[2] ? shape.inter : shape.hidden));
      FillRandom(DType::kF32, scale, random, reinterpret_cast<std::byte*>(m.data()), matrix);
    }
    std::byte* block = p.arena.data() + static_cast<size_t>(b) * block_bytes;
    std::memset(block, kPoison, block_bytes);
    AlignedBuffer packed(shape.packed_bytes());
    REQUIRE(PackExpert(shape, part[0].data(), part[1].data(), part[2].data(), DType::kF32,
                       packed.data())
                .ok());
    std::memcpy(block, packed.data(), packed.size());
  }
  const size_t width = static_cast<size_t>(shape.hidden);
  p.x = AlignedBuffer(static_cast<size_t>(num_rows) * width * SizeOf(shape.dtype));
  std::memset(p.x.data(), 0xff, p.x.size());  // NaN
  for (const Group& g : p.groups) {
    FillRandom(shape.dtype, 2.0, random,
               p.x.data() + static_cast<size_t>(g.begin) * width * SizeOf(shape.dtype),
               static_cast<size_t>(g.rows) * width);
  }
  return p;
}

struct Result {
  Bytes activated, y;
  bool operator==(const Result&) const = default;
};

GroupedMlpArgs ArgsOf(const Problem& p) {
  GroupedMlpArgs args = {.shape = p.shape,
                         .groups = {.num_groups = static_cast<int32_t>(p.groups.size()),
                                    .num_rows = p.num_rows,
                                    .block_bytes = p.block_bytes}};
  args.groups.num_blocks = static_cast<int32_t>(p.arena.size() / p.block_bytes);
  for (const Group& g : p.groups) args.groups.max_rows += g.rows;
  return args;
}

size_t BytesOf(const Problem& p, int32_t width) {
  return static_cast<size_t>(p.num_rows) * static_cast<size_t>(width) * SizeOf(p.shape.dtype);
}

Result RunOnCpu(const Problem& p) {
  Result result = {Bytes(BytesOf(p, p.shape.inter), std::byte{kPoison}),
                   Bytes(BytesOf(p, p.shape.hidden), std::byte{kPoison})};
  const GroupTables tables(p.groups);
  GroupedMlpArgs args = ArgsOf(p);
  args.x = p.x.data();
  args.groups.arena = p.arena.data();
  args.groups.begin = tables.begin.data();
  args.groups.rows = tables.rows.data();
  args.groups.block = tables.block.data();
  args.activated = result.activated.data();
  args.y = result.y.data();
  REQUIRE(cpu::GroupedMlp(args, nullptr).ok());
  return result;
}

Result RunOnDevice(const Problem& p, MlpPath path, GroupSize size) {
  const DeviceArray<std::byte> x(Bytes(p.x.bytes().begin(), p.x.bytes().end()));
  const DeviceArray<std::byte> arena(Bytes(p.arena.bytes().begin(), p.arena.bytes().end()));
  const DeviceArray<std::byte> activated(BytesOf(p, p.shape.inter));
  const DeviceArray<std::byte> y(BytesOf(p, p.shape.hidden));
  const GroupTables tables(p.groups);
  const DeviceArray<int32_t> begin(tables.begin), rows(tables.rows), block(tables.block);
  GroupedMlpArgs args = ArgsOf(p);
  args.path = path;
  args.groups.size = size;
  args.x = x.data();
  args.groups.arena = arena.data();
  args.groups.begin = begin.data();
  args.groups.rows = rows.data();
  args.groups.block = block.data();
  args.activated = activated.data();
  args.y = y.data();
  const absl::Status status = cuda::GroupedMlp(args, nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  return {activated.Read(), y.Read()};
}

TEST_CASE("the grouped mlp on plain units gives the bits of the CPU", "[device][grouped_mlp]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 5);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const ExpertShape shape = {.hidden = 8 + 8 * static_cast<int32_t>(random.Below(12)),
                                 .inter = 8 + 8 * static_cast<int32_t>(random.Below(6)),
                                 .dtype = dtype};
      int32_t num_rows = 0;
      std::vector<Group> groups = RandomGroups(40, 3, &random, &num_rows);
      CAPTURE(round, shape.hidden, shape.inter, num_rows, groups.size());
      const Problem p = MakeProblem(shape, num_rows, std::move(groups), 3, &random);
      const Result result = RunOnDevice(p, MlpPath::kPlain, GroupSize::kLarge);
      const Result expected = RunOnCpu(p);
      REQUIRE(result.activated == expected.activated);
      REQUIRE(result.y == expected.y);
    }
  });
}

// In fp64, without rounding between the products: what y should be.
std::vector<double> ReferenceRow(const Problem& p, const Group& g, int32_t row) {
  const size_t hidden = static_cast<size_t>(p.shape.hidden);
  const size_t inter = static_cast<size_t>(p.shape.inter);
  const std::byte* block = p.arena.data() + static_cast<size_t>(g.block) * p.block_bytes;
  const std::byte* down = block + p.shape.down_offset();
  const DType dtype = p.shape.dtype;
  std::vector<double> activated(inter), y(hidden);
  for (size_t i = 0; i < inter; ++i) {
    double gate = 0, up = 0;
    for (size_t k = 0; k < hidden; ++k) {
      const size_t packed = i / 8 * 16 + i % 8;
      const double x = Element(dtype, p.x.data(), static_cast<size_t>(row) * hidden + k);
      gate += x * Element(dtype, block, packed * hidden + k);
      up += x * Element(dtype, block, (packed + 8) * hidden + k);
    }
    activated[i] = gate / (1 + std::exp(-gate)) * up;
  }
  for (size_t i = 0; i < hidden; ++i) {
    for (size_t k = 0; k < inter; ++k) y[i] += activated[k] * Element(dtype, down, i * inter + k);
  }
  return y;
}

// What a row has in a result, as bytes.
Bytes RowOf(const Bytes& y, const Problem& p, int32_t row) {
  const size_t bytes = static_cast<size_t>(p.shape.hidden) * SizeOf(p.shape.dtype);
  const auto begin = y.begin() + static_cast<ptrdiff_t>(bytes * static_cast<size_t>(row));
  return {begin, begin + static_cast<ptrdiff_t>(bytes)};
}

// Rows in groups are close to the reference by the norm of all; the others hold their poison.
void RequireClose(const Problem& p, const Result& result, double bound) {
  std::vector<bool> used(static_cast<size_t>(p.num_rows), false);
  double error = 0, norm = 0;
  for (const Group& g : p.groups) {
    for (int32_t row = g.begin; row < g.begin + g.rows; ++row) {
      used[static_cast<size_t>(row)] = true;
      const std::vector<double> expected = ReferenceRow(p, g, row);
      const Bytes y = RowOf(result.y, p, row);
      for (size_t i = 0; i < expected.size(); ++i) {
        const double d = Element(p.shape.dtype, y.data(), i) - expected[i];
        error += d * d;
        norm += expected[i] * expected[i];
      }
    }
  }
  CAPTURE(error, norm);
  REQUIRE(std::sqrt(error) <= bound * std::sqrt(norm));  // a NaN is not
  const Bytes poison(static_cast<size_t>(p.shape.hidden) * SizeOf(p.shape.dtype),
                     std::byte{kPoison});
  for (int32_t row = 0; row < p.num_rows; ++row) {
    if (!used[static_cast<size_t>(row)]) REQUIRE(RowOf(result.y, p, row) == poison);
  }
}

TEST_CASE("the grouped mlp on tensor cores is as close as bf16 can be", "[device][grouped_mlp]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 11);
    const ExpertShape shape = {.hidden = 8 + 8 * static_cast<int32_t>(random.Below(48)),
                               .inter = 8 + 8 * static_cast<int32_t>(random.Below(20)),
                               .dtype = DType::kBF16};
    int32_t num_rows = 0;
    std::vector<Group> groups = RandomGroups(round % 3 == 0 ? 150 : 20, 3, &random, &num_rows);
    CAPTURE(round, shape.hidden, shape.inter, num_rows, groups.size());
    const Problem p = MakeProblem(shape, num_rows, std::move(groups), 3, &random);
    const Result large = RunOnDevice(p, MlpPath::kTensor, GroupSize::kLarge);
    RequireClose(p, large, 1e-2);
    REQUIRE(RunOnDevice(p, MlpPath::kBest, GroupSize::kSmall) == large);
  });
}

TEST_CASE("many groups of the grouped mlp may each have a room of its own",
          "[device][grouped_mlp]") {
  testing::ForEachSchedule([&](int round) {
    if (round % 5 != 0) return;  // so that every kind of schedule comes
    Random random(static_cast<uint64_t>(round) + 61);
    constexpr int32_t kRoom = 4;
    std::vector<Group> groups;  // more than a warp counts at once
    for (int32_t g = 0; g < 70; ++g) {
      const int32_t rows = static_cast<int32_t>(random.Below(kRoom + 1));
      groups.push_back({g * kRoom, random.Below(2) == 0 ? rows : 0, g % 3});
    }
    CAPTURE(round);
    const ExpertShape shape = {.hidden = 24, .inter = 8, .dtype = DType::kBF16};
    const Problem p = MakeProblem(shape, 70 * kRoom, std::move(groups), 3, &random);
    REQUIRE(RunOnDevice(p, MlpPath::kPlain, GroupSize::kSmall) == RunOnCpu(p));
    RequireClose(p, RunOnDevice(p, MlpPath::kTensor, GroupSize::kSmall), 1e-2);
  });
}

TEST_CASE("a row of the grouped mlp has the same bits in any company", "[device][grouped_mlp]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 31);
    const MlpPath path = round % 3 == 0 ? MlpPath::kPlain : MlpPath::kTensor;
    const ExpertShape shape = {.hidden = 72, .inter = 40, .dtype = DType::kBF16};
    // Two groups; then the same rows elsewhere, the experts in other blocks, other rows beside.
    const Problem p = MakeProblem(shape, 70, {{0, 66, 0}, {66, 2, 1}}, 3, &random);
    Problem q = MakeProblem(shape, 90, {{3, 2, 2}, {5, 0, 0}, {9, 77, 1}}, 3, &random);
    const auto block = [](const Problem& of, int32_t b) {
      return const_cast<std::byte*>(of.arena.data()) + static_cast<size_t>(b) * of.block_bytes;
    };
    std::memcpy(block(q, 1), block(p, 0), p.block_bytes);
    std::memcpy(block(q, 2), block(p, 1), p.block_bytes);
    const size_t row_bytes = static_cast<size_t>(shape.hidden) * 2;
    const auto row = [&](const Problem& of, int32_t r) {
      return const_cast<std::byte*>(of.x.data()) + row_bytes * static_cast<size_t>(r);
    };
    const std::pair<int32_t, int32_t> moved[] = {{0, 85}, {17, 9}, {65, 40}, {66, 4}, {67, 3}};
    for (const auto& [from, to] : moved) std::memcpy(row(q, to), row(p, from), row_bytes);
    const Result a = RunOnDevice(p, path, GroupSize::kLarge);
    const GroupSize size = round / 4 % 2 == 0 ? GroupSize::kLarge : GroupSize::kSmall;
    const Result b = RunOnDevice(q, path, size);
    for (const auto& [from, to] : moved) {
      CAPTURE(round, from, to);
      REQUIRE(RowOf(a.y, p, from) == RowOf(b.y, q, to));
    }
  });
}

TEST_CASE("a grouped mlp that cannot be is refused before it is launched",
          "[device][grouped_mlp]") {
  Random random(1);
  const Problem p = MakeProblem({.hidden = 8, .inter = 8, .dtype = DType::kF32}, 1, {}, 1, &random);
  const GroupedMlpArgs good = ArgsOf(p);
  REQUIRE(cuda::GroupedMlp(good, nullptr).ok());  // of no groups
  const auto message = [&](auto&& spoil) {
    GroupedMlpArgs args = good;
    spoil(args);
    return std::string(cuda::GroupedMlp(args, nullptr).message());
  };
  REQUIRE(message([](auto& a) { a.shape.hidden = 12; }) ==
          "grouped mlp: hidden is 12, allowed: positive multiples of 8");
  REQUIRE(message([](auto& a) { a.shape.inter = 0; }) ==
          "grouped mlp: inter is 0, allowed: positive multiples of 8");
  REQUIRE(message([](auto& a) { a.groups.num_groups = 1025; }) ==
          "grouped mlp: 1025 groups, allowed: 0 to 1024");
  REQUIRE(message([](auto& a) { a.groups.max_rows = 2; }) ==
          "grouped mlp: max_rows is 2 of 1 rows, allowed: 0 to all");
  REQUIRE(
      message([](auto& a) { a.groups.block_bytes = 752; }) ==
      "grouped mlp: 1 blocks of 752 bytes, allowed: 1 or more, of a multiple of 16 from 768 up");
  REQUIRE(message([](auto& a) { a.x = reinterpret_cast<const void*>(8); }) ==
          "grouped mlp: x is not aligned to 16 bytes");
  GroupedMlpArgs tensor = good;
  tensor.path = MlpPath::kTensor;
  tensor.groups.num_groups = 1;
  REQUIRE(absl::IsUnimplemented(cuda::GroupedMlp(tensor, nullptr)));
}

}  // namespace
}  // namespace ballast
