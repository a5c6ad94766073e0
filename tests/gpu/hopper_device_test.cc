#include <cstring>
#include <vector>

#include "base/dtype.h"
#include "base/random.h"
#include "kernels/e4m3.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/hopper_probe.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;

TEST_CASE("a box arrives swizzled and with zeros for what is outside", "[device][hopper]") {
  // Two matrices of 20 rows of 72 numbers, in rows of 160 bytes; every number is its index.
  constexpr int kRows = 20, kColumns = 72, kRowNumbers = 80, kMatrixNumbers = 1700 * 4;
  std::vector<uint16_t> numbers(2 * kMatrixNumbers);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(i + 1);
  const DeviceArray<uint16_t> from(numbers);
  constexpr int kBoxRows = 16;
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 71);
    const int row = static_cast<int>(random.Below(kRows));
    const int column = static_cast<int>(random.Below(kColumns)) / 8 * 8;
    const int matrix = static_cast<int>(random.Below(2));
    CAPTURE(round, row, column, matrix);
    const DeviceArray<std::byte> dump(kBoxRows * 128);
    const absl::Status status = testing::ProbeCopy({.at = from.data(),
                                                    .columns = kColumns,
                                                    .rows = kRows,
                                                    .depth = 2,
                                                    .row_bytes = kRowNumbers * 2,
                                                    .matrix_bytes = kMatrixNumbers * 2,
                                                    .box_rows = kBoxRows},
                                                   column, row, matrix, dump.data());
    INFO(status.message());
    REQUIRE(status.ok());
    const std::vector<std::byte> bytes = dump.Read();
    for (int r = 0; r < kBoxRows; ++r) {
      for (int c = 0; c < 64; ++c) {
        uint16_t value;
        std::memcpy(&value, &bytes[static_cast<size_t>(r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2)],
                    sizeof value);
        const bool inside = row + r < kRows && column + c < kColumns;
        const int index = matrix * kMatrixNumbers + (row + r) * kRowNumbers + column + c;
        REQUIRE(value == (inside ? static_cast<uint16_t>(index + 1) : 0));
      }
    }
  });
}

TEST_CASE("a product of small integers is exact", "[device][hopper]") {
  testing::ForEachSchedule([&](int round) {
    Random random(static_cast<uint64_t>(round) + 83);
    const bool is_e4m3 = round % 3 == 0;
    const int depth = is_e4m3 ? 128 : 64;
    const auto draw = [&](int rows, std::vector<uint8_t>* bytes) {
      std::vector<int> values;
      for (int i = 0; i < rows * depth; ++i) {
        values.push_back(static_cast<int>(random.Below(9)) - 4);
        const auto value = static_cast<float>(values.back());
        if (is_e4m3) {
          bytes->push_back(ToE4M3(value));
        } else {
          const uint16_t bits = ToBFloat16(value).bits;
          bytes->push_back(static_cast<uint8_t>(bits & 0xff));
          bytes->push_back(static_cast<uint8_t>(bits >> 8));
        }
      }
      return values;
    };
    std::vector<uint8_t> x_bytes, w_bytes;
    const std::vector<int> x = draw(64, &x_bytes), w = draw(128, &w_bytes);
    const DeviceArray<uint8_t> device_x(x_bytes), device_w(w_bytes);
    const DeviceArray<float> d(64 * 128);
    const absl::Status status =
        testing::ProbeProduct(is_e4m3 ? 1 : 2, device_x.data(), device_w.data(), d.data());
    INFO(status.message());
    REQUIRE(status.ok());
    const std::vector<float> read = d.Read();
    for (int r = 0; r < 64; ++r) {
      for (int c = 0; c < 128; ++c) {
        int sum = 0;
        for (int k = 0; k < depth; ++k) {
          sum += x[static_cast<size_t>(r * depth + k)] * w[static_cast<size_t>(c * depth + k)];
        }
        CAPTURE(round, r, c);
        REQUIRE(read[static_cast<size_t>(r * 128 + c)] == static_cast<float>(sum));
      }
    }
  });
}

}  // namespace
}  // namespace ballast
