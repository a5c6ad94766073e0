// Times the grouped MLP on a device, each case beside its two floors: the time in which its bytes
// can be read and the time of its arithmetic, at the rates of an H200's data sheet. Prints a row
// per case; exit code 77 without a device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/random.h"
#include "kernels/grouped_mlp.h"

namespace {

using namespace ballast;

constexpr double kBytesPerSecond = 4.8e12, kFlopsPerSecond = 989e12;
constexpr int kSamples = 30, kWarmUps = 5;

struct Case {
  const char* model;
  int32_t hidden, inter, groups, rows;  // rows of each group
  GroupSize size;
};
constexpr Case kCases[] = {
    {"7168 x 2048", 7168, 2048, 8, 1, GroupSize::kSmall},
    {"7168 x 2048", 7168, 2048, 32, 8, GroupSize::kSmall},
    {"7168 x 2048", 7168, 2048, 32, 64, GroupSize::kSmall},
    {"7168 x 2048", 7168, 2048, 32, 64, GroupSize::kLarge},
    {"7168 x 2048", 7168, 2048, 32, 512, GroupSize::kLarge},
    {"2048 x 768", 2048, 768, 128, 1, GroupSize::kSmall},
    {"2048 x 768", 2048, 768, 128, 16, GroupSize::kSmall},
    {"2048 x 768", 2048, 768, 128, 256, GroupSize::kLarge},
};

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

std::byte* Allocate(size_t bytes) {
  void* block = nullptr;
  Require(cudaMalloc(&block, bytes), "cudaMalloc");
  return static_cast<std::byte*>(block);
}

// Random bf16, the same 64 MiB again and again: zeros would run faster than real numbers do.
void FillRandom(std::byte* to, size_t bytes) {
  static const std::vector<uint16_t> noise = [] {
    std::vector<uint16_t> bits(32 << 20);
    Random random(1);
    for (uint16_t& b : bits) {
      b = ToBFloat16(static_cast<float>(random.Uniform() - 0.5) / 16).bits;
    }
    return bits;
  }();
  for (size_t at = 0; at < bytes; at += 2 * noise.size()) {
    const size_t count = std::min(bytes - at, 2 * noise.size());
    Require(cudaMemcpy(to + at, noise.data(), count, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
}

template <typename T>
T* Copy(const std::vector<T>& values) {
  std::byte* to = Allocate(values.size() * sizeof(T));
  Require(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  return reinterpret_cast<T*>(to);
}

double MedianSeconds(const GroupedMlpArgs& args) {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  Require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  Require(cudaEventCreate(&begin), "cudaEventCreate");
  Require(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> seconds;
  for (int i = 0; i < kWarmUps + kSamples; ++i) {
    Require(cudaEventRecord(begin, stream), "cudaEventRecord");
    const absl::Status status = cuda::GroupedMlp(args, stream);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
      std::exit(1);
    }
    Require(cudaEventRecord(end, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    Require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= kWarmUps) seconds.push_back(ms / 1e3);
  }
  Require(cudaEventDestroy(begin), "cudaEventDestroy");
  Require(cudaEventDestroy(end), "cudaEventDestroy");
  Require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  std::nth_element(seconds.begin(), seconds.begin() + kSamples / 2, seconds.end());
  return seconds[kSamples / 2];
}

void Run(const Case& c) {
  const ExpertShape shape = {.hidden = c.hidden, .inter = c.inter, .dtype = DType::kBF16};
  const auto rows = static_cast<size_t>(c.groups) * static_cast<size_t>(c.rows);
  const auto hidden = static_cast<size_t>(c.hidden), inter = static_cast<size_t>(c.inter);
  const size_t arena_bytes = static_cast<size_t>(c.groups) * shape.packed_bytes();
  std::byte* arena = Allocate(arena_bytes);
  std::byte* x = Allocate(2 * rows * hidden);
  std::byte* activated = Allocate(2 * rows * inter);
  std::byte* y = Allocate(2 * rows * hidden);
  FillRandom(arena, arena_bytes);
  FillRandom(x, 2 * rows * hidden);
  std::vector<int32_t> begins, block;
  for (int32_t g = 0; g < c.groups; ++g) {
    begins.push_back(g * c.rows);
    block.push_back(g);
  }
  int32_t* tables[] = {Copy(begins), Copy(std::vector<int32_t>(begins.size(), c.rows)),
                       Copy(block)};
  const double seconds = MedianSeconds({.shape = shape,
                                        .groups = {.num_groups = c.groups,
                                                   .num_rows = static_cast<int32_t>(rows),
                                                   .max_rows = static_cast<int32_t>(rows),
                                                   .size = c.size,
                                                   .begin = tables[0],
                                                   .rows = tables[1],
                                                   .block = tables[2],
                                                   .arena = arena,
                                                   .block_bytes = shape.packed_bytes(),
                                                   .num_blocks = c.groups},
                                        .x = x,
                                        .activated = activated,
                                        .y = y});
  const double bytes = static_cast<double>(arena_bytes + 4 * rows * (hidden + inter));
  const double flops = 6.0 * static_cast<double>(rows * hidden * inter);
  std::printf("%-12s %6d %6d  %-5s %9.1f us %8.0f GB/s %8.1f TFLOP/s %8.1f %8.1f us\n", c.model,
              c.groups, c.rows, c.size == GroupSize::kSmall ? "small" : "large", seconds * 1e6,
              bytes / seconds / 1e9, flops / seconds / 1e12, bytes / kBytesPerSecond * 1e6,
              flops / kFlopsPerSecond * 1e6);
  for (std::byte* block_of_memory : {arena, x, activated, y}) cudaFree(block_of_memory);
  for (int32_t* table : tables) cudaFree(table);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no device\n");
    return 77;
  }
  std::printf("medians of %d; bf16\n%-12s %6s %6s  %-5s %12s %13s %16s %8s %8s\n", kSamples,
              "expert", "groups", "rows", "tiles", "time", "read+written", "computed", "memory",
              "math");
  for (const Case& c : kCases) Run(c);
  return 0;
}
