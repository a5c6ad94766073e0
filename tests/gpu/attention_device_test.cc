#include <algorithm>
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
using Bytes = std::vector<uint8_t>;

struct Shape {
  int32_t num_heads, kv_heads, head_dim;
  DType cache, act;
};

// Sequences whose blocks lie anywhere in a cache, and rows of them.
struct Batch {
  Shape shape;
  int32_t num_rows = 0, stride = 0;
  std::vector<int32_t> position, table_offset, block_table;
  std::vector<float> qkv;
  Bytes keys, values;  // all of the cache, filled with numbers

  size_t block_bytes() const {
    return static_cast<size_t>(shape.kv_heads) * kKvBlockTokens *
           static_cast<size_t>(shape.head_dim) * SizeOf(shape.cache);
  }
};

Bytes RandomNumbers(size_t count, DType type, Random* random) {
  Bytes bytes(count * SizeOf(type));
  for (size_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(4 * random->Uniform() - 2);
    if (type == DType::kF32) {
      reinterpret_cast<float*>(bytes.data())[i] = x;
    } else {
      reinterpret_cast<BFloat16*>(bytes.data())[i] = ToBFloat16(x);
    }
  }
  return bytes;
}

// One row at each of the positions, each of a sequence of its own.
Batch RandomBatch(const Shape& shape, const std::vector<int32_t>& positions, Random* random) {
  Batch batch;
  batch.shape = shape;
  batch.num_rows = static_cast<int32_t>(positions.size());
  batch.stride = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim + 3;
  batch.position = positions;
  batch.block_table = {-1};
  for (const int32_t position : positions) {
    batch.table_offset.push_back(static_cast<int32_t>(batch.block_table.size()));
    for (int32_t i = 0; i <= position / kKvBlockTokens; ++i) batch.block_table.push_back(0);
  }
  const size_t blocks = batch.block_table.size();  // one more than is used
  for (size_t i = 1; i < blocks; ++i) {
    const size_t at = random->Below(static_cast<uint32_t>(i));  // a random order of 0 .. blocks - 2
    batch.block_table[i] = static_cast<int32_t>(i) - 1;
    if (at > 0) std::swap(batch.block_table[i], batch.block_table[at]);
  }
  const size_t count = blocks * batch.block_bytes() / SizeOf(shape.cache);
  batch.keys = RandomNumbers(count, shape.cache, random);
  batch.values = RandomNumbers(count, shape.cache, random);
  batch.qkv.resize(static_cast<size_t>(batch.num_rows) * static_cast<size_t>(batch.stride));
  for (float& x : batch.qkv) x = static_cast<float>(4 * random->Uniform() - 2);
  return batch;
}

// The batch's rows written and attended to, by the functions of one backend.
struct Memory {
  const float* qkv;
  KvIndex index;
  uint8_t *keys, *values, *y;
};
template <typename Write, typename Attend>
void Run(const Batch& batch, const Memory& memory, const Write& write, const Attend& attend) {
  const Shape& s = batch.shape;
  const KvLayerView cache{s.cache, memory.keys, memory.values};
  const absl::Status written = write({.num_rows = batch.num_rows,
                                      .kv_heads = s.kv_heads,
                                      .head_dim = s.head_dim,
                                      .stride = batch.stride,
                                      .k = memory.qkv + s.num_heads * s.head_dim,
                                      .v = memory.qkv + (s.num_heads + s.kv_heads) * s.head_dim,
                                      .index = memory.index,
                                      .cache = cache},
                                     nullptr);
  REQUIRE(written.ok());
  const absl::Status attended = attend({.num_rows = batch.num_rows,
                                        .num_heads = s.num_heads,
                                        .kv_heads = s.kv_heads,
                                        .head_dim = s.head_dim,
                                        .stride = batch.stride,
                                        .q = memory.qkv,
                                        .index = memory.index,
                                        .cache = cache,
                                        .act_type = s.act,
                                        .y = memory.y},
                                       nullptr);
  INFO(attended.message());
  REQUIRE(attended.ok());
}

struct Result {
  Bytes keys, values, y;
  bool operator==(const Result&) const = default;
};

size_t OutputBytes(const Batch& batch) {
  return static_cast<size_t>(batch.num_rows) * static_cast<size_t>(batch.shape.num_heads) *
         static_cast<size_t>(batch.shape.head_dim) * SizeOf(batch.shape.act);
}

Result OnCpu(const Batch& batch) {
  Result r{batch.keys, batch.values, Bytes(OutputBytes(batch))};
  const KvIndex index{batch.position, batch.table_offset, batch.block_table};
  Run(batch, {batch.qkv.data(), index, r.keys.data(), r.values.data(), r.y.data()}, cpu::KvWrite,
      cpu::Attention);
  return r;
}

Result OnDevice(const Batch& batch) {
  const DeviceArray<float> qkv(batch.qkv);
  const DeviceArray<int32_t> position(batch.position), offset(batch.table_offset);
  const DeviceArray<int32_t> table(batch.block_table);
  const DeviceArray<uint8_t> keys(batch.keys), values(batch.values), y(OutputBytes(batch));
  const KvIndex index{position.span(), offset.span(), table.span()};
  Run(batch, {qkv.data(), index, keys.data(), values.data(), y.data()}, cuda::KvWrite,
      cuda::Attention);
  return {keys.Read(), values.Read(), y.Read()};
}

TEST_CASE("attention on the device gives the bits of the CPU", "[device][attention]") {
  const Shape shapes[] = {
      {2, 2, 20, DType::kF32, DType::kF32},    // a head alone; not a whole number of lanes
      {4, 2, 64, DType::kBF16, DType::kBF16},  // two heads share keys
      {6, 2, 32, DType::kF32, DType::kBF16},   // three: one of four is nobody's
      {24, 2, 16, DType::kBF16, DType::kF32},  // twelve: two chunks
      {8, 1, 128, DType::kBF16, DType::kBF16},
      {5, 1, 256, DType::kF32, DType::kF32},  // a column per thread
      {1, 1, 4, DType::kF32, DType::kF32},
      {3, 3, 100, DType::kBF16, DType::kF32},
      {2, 1, 7, DType::kF32, DType::kF32},
  };
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 5);
    // The edges of key blocks and of what a block of threads takes at a time.
    const int32_t edges[] = {0, 62, 63, 64, 255, 256, 530};
    for (const Shape& shape : shapes) {
      const std::vector<int32_t> positions = {
          edges[random.Below(static_cast<uint32_t>(std::size(edges)))],
          static_cast<int32_t>(random.Below(130))};
      CAPTURE(round, shape.num_heads, shape.kv_heads, shape.head_dim, positions);
      const Batch batch = RandomBatch(shape, positions, &random);
      REQUIRE((OnDevice(batch) == OnCpu(batch)));
    }
  });
}

TEST_CASE("attention on the device does not see the batch, nor what lies behind its keys",
          "[device][attention]") {
  Random random(9);
  const Shape shape{4, 1, 24, DType::kF32, DType::kF32};
  Batch batch = RandomBatch(shape, {70, 5, 300}, &random);
  const Bytes all = OnDevice(batch).y;
  const size_t row_bytes = all.size() / 3;
  for (size_t t = 0; t < 3; ++t) {
    Batch alone = batch;
    alone.num_rows = 1;
    alone.position = {batch.position[t]};
    alone.table_offset = {batch.table_offset[t]};
    alone.qkv.assign(batch.qkv.begin() + static_cast<std::ptrdiff_t>(t) * batch.stride,
                     batch.qkv.begin() + static_cast<std::ptrdiff_t>(t + 1) * batch.stride);
    // Later positions of the last block hold anything.
    const size_t last = static_cast<size_t>(batch.position[t] % kKvBlockTokens) + 1;
    const auto block = batch.block_table[static_cast<size_t>(batch.table_offset[t]) +
                                         static_cast<size_t>(batch.position[t] / kKvBlockTokens)];
    const size_t row = static_cast<size_t>(shape.head_dim) * SizeOf(shape.cache);
    const size_t begin = static_cast<size_t>(block) * batch.block_bytes();
    for (Bytes* cache : {&alone.keys, &alone.values}) {
      std::fill(cache->begin() + static_cast<std::ptrdiff_t>(begin + last * row),
                cache->begin() + static_cast<std::ptrdiff_t>(begin + batch.block_bytes()), 0xff);
    }
    const Bytes y = OnDevice(alone).y;
    REQUIRE(
        std::equal(y.begin(), y.end(), all.begin() + static_cast<std::ptrdiff_t>(t * row_bytes)));
  }
}

TEST_CASE("attention on the device has its NaNs where the CPU has them", "[device][attention]") {
  Random random(11);
  const Shape shape{4, 2, 16, DType::kF32, DType::kF32};
  Batch batch = RandomBatch(shape, {90, 3, 80}, &random);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto row = [&](int t) { return &batch.qkv[static_cast<size_t>(t * batch.stride)]; };
  row(0)[5] = nan;                                      // query head 0 of the first
  row(1)[shape.num_heads * shape.head_dim + 20] = nan;  // a key of kv head 1 of the second
  const Bytes host = OnCpu(batch).y, device = OnDevice(batch).y;
  const auto* want = reinterpret_cast<const float*>(host.data());
  const auto* got = reinterpret_cast<const float*>(device.data());
  int nans = 0;
  for (size_t i = 0; i < host.size() / sizeof(float); ++i) {
    nans += std::isnan(want[i]);
    REQUIRE((std::isnan(want[i]) ? std::isnan(got[i]) : got[i] == want[i]));
  }
  REQUIRE(nans == 3 * shape.head_dim);
}

TEST_CASE("attention over no rows writes nothing", "[device][attention]") {
  Random random(10);
  const Batch batch = RandomBatch({2, 1, 16, DType::kF32, DType::kF32}, {}, &random);
  const Result result = OnDevice(batch);
  REQUIRE(result.keys == batch.keys);
  REQUIRE(result.values == batch.values);
}

}  // namespace
}  // namespace ballast
