#include <cmath>
#include <cstring>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/random.h"
#include "kernels/grouped_mlp.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;
using Bytes = std::vector<std::byte>;

constexpr int kPoison = 0xa5;  // what a DeviceArray begins with

struct Group {
  int32_t begin, rows, block;
};

// Inputs, and everything that the CPU makes of them.
struct Problem {
  ExpertShape shape;
  int32_t num_rows;
  std::vector<Group> groups;
  size_t block_bytes;
  AlignedBuffer arena, x;
};

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

struct Tables {
  std::vector<int32_t> begin, rows, block;
  explicit Tables(const Problem& p) {
    for (const Group& g : p.groups) {
      begin.push_back(g.begin);
      rows.push_back(g.rows);
      block.push_back(g.block);
    }
  }
};

GroupedMlpArgs ArgsOf(const Problem& p) {
  GroupedMlpArgs args = {.shape = p.shape,
                         .num_groups = static_cast<int32_t>(p.groups.size()),
                         .num_rows = p.num_rows,
                         .block_bytes = p.block_bytes,
                         .num_blocks = static_cast<int32_t>(p.arena.size() / p.block_bytes)};
  for (const Group& g : p.groups) args.max_rows += g.rows;
  return args;
}

size_t BytesOf(const Problem& p, int32_t width) {
  return static_cast<size_t>(p.num_rows) * static_cast<size_t>(width) * SizeOf(p.shape.dtype);
}

Result RunOnCpu(const Problem& p) {
  Result result = {Bytes(BytesOf(p, p.shape.inter), std::byte{kPoison}),
                   Bytes(BytesOf(p, p.shape.hidden), std::byte{kPoison})};
  const Tables tables(p);
  GroupedMlpArgs args = ArgsOf(p);
  args.x = p.x.data();
  args.arena = p.arena.data();
  args.group_begin = tables.begin.data();
  args.group_rows = tables.rows.data();
  args.block_of_group = tables.block.data();
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
  const Tables tables(p);
  const DeviceArray<int32_t> begin(tables.begin), rows(tables.rows), block(tables.block);
  GroupedMlpArgs args = ArgsOf(p);
  args.path = path;
  args.group_size = size;
  args.x = x.data();
  args.arena = arena.data();
  args.group_begin = begin.data();
  args.group_rows = rows.data();
  args.block_of_group = block.data();
  args.activated = activated.data();
  args.y = y.data();
  const absl::Status status = cuda::GroupedMlp(args, nullptr);
  INFO(status.message());
  REQUIRE(status.ok());
  return {activated.Read(), y.Read()};
}

// Groups one after the other, some of them empty; the last rows belong to none.
std::vector<Group> RandomGroups(int32_t most_rows, int32_t num_blocks, Random* random,
                                int32_t* num_rows) {
  std::vector<Group> groups;
  int32_t begin = 0;
  const uint32_t count = 1 + random->Below(9);
  for (uint32_t g = 0; g < count; ++g) {
    int32_t rows = static_cast<int32_t>(random->Below(static_cast<uint32_t>(most_rows) + 1));
    if (random->Below(3) == 0) rows = static_cast<int32_t>(random->Below(2));
    const auto block = static_cast<int32_t>(random->Below(static_cast<uint32_t>(num_blocks)));
    groups.push_back({begin, rows, block});
    begin += rows + static_cast<int32_t>(random->Below(4));
  }
  *num_rows = begin + 3;
  return groups;
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

}  // namespace
}  // namespace ballast
