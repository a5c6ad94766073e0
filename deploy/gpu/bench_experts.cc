#include "deploy/gpu/bench_experts.h"

#include "base/dtype.h"
#include "deploy/gpu/measure.h"
#include "kernels/grouped_mlp.h"

namespace ballast {
namespace {

struct Case {
  const char* model;
  int32_t hidden, inter, groups, rows;  // rows of each group
  GroupSize size;
};
constexpr Case kCases[] = {
    {"DeepSeek-V3", 7168, 2048, 9, 1024, GroupSize::kLarge},
    {"DeepSeek-V3", 7168, 2048, 9, 128, GroupSize::kLarge},
    {"DeepSeek-V3", 7168, 2048, 9, 16, GroupSize::kSmall},
    {"Qwen3-30B-A3B", 2048, 768, 128, 256, GroupSize::kLarge},
    {"Qwen3-30B-A3B", 2048, 768, 128, 16, GroupSize::kSmall},
    {"OLMoE", 2048, 1024, 64, 512, GroupSize::kLarge},
    {"OLMoE", 2048, 1024, 64, 16, GroupSize::kSmall},
};
constexpr Case kSmallCase = {"small", 64, 32, 2, 3, GroupSize::kSmall};

absl::Status Run(const Case& c, bool small, GpuBenchResult* result) {
  const ExpertShape shape = {.hidden = c.hidden, .inter = c.inter, .dtype = DType::kBF16};
  const int32_t rows = c.groups * c.rows;
  OnDevice<std::byte> arena, x, activated, y;
  BALLAST_RETURN_IF_ERROR(arena.Allocate(static_cast<size_t>(c.groups) * shape.packed_bytes()));
  BALLAST_RETURN_IF_ERROR(x.Allocate(size_t{2} * rows * c.hidden));
  BALLAST_RETURN_IF_ERROR(activated.Allocate(size_t{2} * rows * c.inter));
  BALLAST_RETURN_IF_ERROR(y.Allocate(x.size()));
  BALLAST_RETURN_IF_ERROR(FillWithNoise(&arena, small));
  BALLAST_RETURN_IF_ERROR(FillWithNoise(&x, small));
  std::vector<int32_t> begins, blocks;
  for (int32_t g = 0; g < c.groups; ++g) {
    begins.push_back(g * c.rows);
    blocks.push_back(g);
  }
  OnDevice<int32_t> begin, count, block;
  BALLAST_RETURN_IF_ERROR(begin.Set(begins));
  BALLAST_RETURN_IF_ERROR(count.Set(std::vector<int32_t>(begins.size(), c.rows)));
  BALLAST_RETURN_IF_ERROR(block.Set(blocks));
  const GroupedMlpArgs args = {.shape = shape,
                               .groups = {.num_groups = c.groups,
                                          .num_rows = rows,
                                          .max_rows = rows,
                                          .size = c.size,
                                          .begin = begin.data(),
                                          .rows = count.data(),
                                          .block = block.data(),
                                          .arena = arena.data(),
                                          .block_bytes = shape.packed_bytes(),
                                          .num_blocks = c.groups},
                               .x = x.data(),
                               .activated = activated.data(),
                               .y = y.data()};
  Times times;
  BALLAST_RETURN_IF_ERROR(Measure(
      small ? 1 : 5, small ? 2 : 30,
      [&](cudaStream_t stream) { return cuda::GroupedMlp(args, stream); }, &times));
  result->rows.push_back(
      {.name = "experts",
       .shape = absl::StrCat(c.model, " ", c.groups, " experts x ", c.rows, " rows"),
       .median_us = times.median_us,
       .spread_us = times.spread_us,
       .bytes = static_cast<double>(arena.size() + x.size() + y.size()),
       .flops = 6.0 * rows * c.hidden * c.inter});
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchExperts(bool small, GpuBenchResult* result) {
  if (small) return Run(kSmallCase, small, result);
  for (const Case& c : kCases) BALLAST_RETURN_IF_ERROR(Run(c, small, result));
  return absl::OkStatus();
}

}  // namespace ballast
