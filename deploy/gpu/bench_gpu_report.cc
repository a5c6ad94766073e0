#include <cmath>

#include "absl/strings/str_cat.h"
#include "deploy/gpu/bench_gpu.h"

namespace ballast {

std::string ToTable(const GpuBenchResult& result) {
  std::string table =
      absl::StrCat(result.device, ", copies at ", std::llround(result.copy_bytes_per_second / 1e9),
                   " GB/s read and written\n| kernel | shape | median us | p90 - p10 us | GB/s | "
                   "of a copy | TFLOP/s |\n",
                   "| --- | --- | --- | --- | --- | --- | --- |\n");
  const auto rounded = [](double value) { return std::round(value * 100) / 100; };
  for (const GpuBenchRow& row : result.rows) {
    const double rate = row.bytes / row.median_us * 1e6;
    absl::StrAppend(&table, "| ", row.name, " | ", row.shape, " | ", rounded(row.median_us), " | ",
                    rounded(row.spread_us), " | ", std::llround(rate / 1e9), " | ",
                    rounded(rate / result.copy_bytes_per_second), " | ",
                    row.flops > 0 ? absl::StrCat(rounded(row.flops / row.median_us / 1e6)) : "",
                    " |\n");
  }
  return table;
}

std::string ToJson(const GpuBenchResult& result) {
  std::string json =
      absl::StrCat("{\"device\":\"", result.device,
                   "\",\"copy_bytes_per_second\":", result.copy_bytes_per_second, ",\"rows\":[");
  for (size_t i = 0; i < result.rows.size(); ++i) {
    const GpuBenchRow& row = result.rows[i];
    absl::StrAppend(&json, i == 0 ? "\n" : ",\n", "{\"name\":\"", row.name, "\",\"shape\":\"",
                    row.shape, "\",\"median_us\":", row.median_us, ",\"spread_us\":", row.spread_us,
                    ",\"bytes\":", row.bytes, ",\"flops\":", row.flops, "}");
  }
  return json + "\n]}\n";
}

}  // namespace ballast
