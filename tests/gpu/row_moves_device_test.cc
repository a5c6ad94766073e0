// Rows that a device moves and adds up by index, against the CPU's and against plain loops.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/row_moves.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;

std::vector<std::byte> RandomRows(size_t bytes, Random* random) {
  std::vector<std::byte> rows(bytes);
  for (std::byte& b : rows) b = static_cast<std::byte>(random->Next());
  return rows;
}

// Values of many sizes, so that the order of a sum shows.
std::vector<float> RandomFloats(size_t count, Random* random) {
  std::vector<float> x(count);
  for (float& v : x) v = static_cast<float>(std::exp(8 * random->Uniform()) - 20.0);
  return x;
}

TEST_CASE("rows are gathered by index", "[device][rows]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 40);
    // From less than a block to rows that every thread takes several vectors of.
    const size_t row_bytes = round % 5 == 4 ? 16 * 1300 : 16 * (1 + random.Below(40));
    const size_t num_in = 1 + random.Below(12), num_out = random.Below(30);
    const std::vector<std::byte> in = RandomRows(num_in * row_bytes, &random);
    std::vector<int32_t> index(num_out);
    for (int32_t& i : index) i = static_cast<int32_t>(random.Below(num_in + 1)) - 1;
    std::vector<std::byte> expected(num_out * row_bytes, std::byte{0xa5});
    for (size_t i = 0; i < num_out; ++i) {
      if (index[i] < 0) continue;
      std::copy_n(in.begin() + static_cast<std::ptrdiff_t>(index[i] * row_bytes), row_bytes,
                  expected.begin() + static_cast<std::ptrdiff_t>(i * row_bytes));
    }
    const DeviceArray<std::byte> device_in(in), device_out(expected.size());
    const DeviceArray<int32_t> device_index(index);
    GatherRowsArgs args = {.num_rows = static_cast<int32_t>(num_out),
                           .row_bytes = static_cast<int32_t>(row_bytes),
                           .index = device_index.data(),
                           .in = device_in.data(),
                           .out = device_out.data()};
    CAPTURE(round, row_bytes, num_in, num_out);
    REQUIRE(cuda::GatherRows(args, nullptr).ok());
    REQUIRE(device_out.Read() == expected);

    std::vector<std::byte> host(expected.size(), std::byte{0xa5});
    args.index = index.data();
    args.in = in.data();
    args.out = host.data();
    REQUIRE(cpu::GatherRows(args, nullptr).ok());
    REQUIRE(host == expected);
  });
}

TEST_CASE("more rows than a launch has blocks are gathered", "[device][rows]") {
  constexpr int32_t kRows = 2500;
  std::vector<int32_t> index(kRows);
  for (int32_t i = 0; i < kRows; ++i) index[i] = (i * 7) % kRows;
  std::vector<std::byte> in(size_t{16} * kRows);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::byte>(i / 16 * 31 + i % 16);
  const DeviceArray<std::byte> device_in(in), device_out(in.size());
  const DeviceArray<int32_t> device_index(index);
  REQUIRE(cuda::GatherRows({.num_rows = kRows,
                            .row_bytes = 16,
                            .index = device_index.data(),
                            .in = device_in.data(),
                            .out = device_out.data()},
                           nullptr)
              .ok());
  const std::vector<std::byte> out = device_out.Read();
  for (size_t i = 0; i < out.size(); ++i) {
    REQUIRE(out[i] == in[static_cast<size_t>(index[i / 16]) * 16 + i % 16]);
  }
}

TEST_CASE("results are added up in the order of the choices", "[device][rows]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 80);
    const DType type = round % 2 == 0 ? DType::kF32 : DType::kBF16;
    const int32_t top_k =
        round % 6 == 5 ? kMostChoices : 1 + static_cast<int32_t>(random.Below(12));
    const int32_t width =
        round % 7 == 6 ? 8 * 700 : 8 * (1 + static_cast<int32_t>(random.Below(20)));
    const int32_t tokens = static_cast<int32_t>(random.Below(9));
    const size_t copies = static_cast<size_t>(tokens) * top_k, rows = copies + 3;
    const std::vector<float> values = RandomFloats(rows * width, &random);
    std::vector<std::byte> results(values.size() * SizeOf(type));
    std::vector<float> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      const BFloat16 half = FromFloat<BFloat16>(values[i]);
      rounded[i] = type == DType::kF32 ? values[i] : ToFloat(half);
      const void* const from = type == DType::kF32 ? static_cast<const void*>(&values[i]) : &half;
      std::copy_n(static_cast<const std::byte*>(from), SizeOf(type),
                  results.begin() + static_cast<std::ptrdiff_t>(i * SizeOf(type)));
    }
    std::vector<int32_t> index(copies);
    for (int32_t& i : index) i = static_cast<int32_t>(random.Below(static_cast<uint32_t>(rows)));
    const std::vector<float> weights = RandomFloats(copies, &random);
    const std::vector<float> base = RandomFloats(static_cast<size_t>(tokens) * width, &random);
    std::vector<float> expected = base;
    for (size_t copy = 0; copy < copies; ++copy) {
      for (int32_t i = 0; i < width; ++i) {
        float& sum = expected[copy / top_k * width + i];
        sum = std::fma(weights[copy], rounded[static_cast<size_t>(index[copy]) * width + i], sum);
      }
    }
    const DeviceArray<std::byte> device_results(results);
    const DeviceArray<int32_t> device_index(index);
    const DeviceArray<float> device_weights(weights), out(base);  // base and out are one array
    CombineRowsArgs args = {.num_tokens = tokens,
                            .top_k = top_k,
                            .width = width,
                            .type = type,
                            .weights = device_weights.data(),
                            .index = device_index.data(),
                            .results = device_results.data(),
                            .base = out.data(),
                            .out = out.data()};
    CAPTURE(round, tokens, top_k, width);
    REQUIRE(cuda::CombineRows(args, nullptr).ok());
    REQUIRE(out.Read() == expected);

    std::vector<float> host(expected.size());
    args.weights = weights.data();
    args.index = index.data();
    args.results = results.data();
    args.base = base.data();
    args.out = host.data();
    REQUIRE(cpu::CombineRows(args, nullptr).ok());
    REQUIRE(host == expected);
  });
}

TEST_CASE("row moves that cannot be are refused", "[device][rows][errors]") {
  const auto said = [](const absl::Status& status) {
    REQUIRE(absl::IsInvalidArgument(status));
    return std::string(status.message());
  };
  REQUIRE(said(cuda::GatherRows({.num_rows = 1, .row_bytes = 24}, nullptr)) ==
          "gather: 1 rows of 24 bytes, allowed: 0 and more, of a multiple of 16 bytes");
  REQUIRE(said(cuda::GatherRows({.num_rows = -1, .row_bytes = 16}, nullptr)) ==
          "gather: -1 rows of 16 bytes, allowed: 0 and more, of a multiple of 16 bytes");
  REQUIRE(said(cuda::CombineRows({.num_tokens = 1, .top_k = 33, .width = 8}, nullptr)) ==
          "combine: top-k is 33, allowed: 1 to 32");
  REQUIRE(said(cuda::CombineRows({.num_tokens = 2, .top_k = 2, .width = 4, .type = DType::kBF16},
                                 nullptr)) ==
          "combine: 2 rows of 8 bytes, allowed: 0 and more, of a multiple of 16 bytes");
}

}  // namespace
}  // namespace ballast
