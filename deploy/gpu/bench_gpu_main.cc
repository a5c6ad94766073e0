// `ballast-bench-gpu [--json FILE]`: `ballast bench gpu` where nothing but the kernels is built.
#include <cstdio>
#include <cstring>

#include "base/file.h"
#include "deploy/gpu/bench_gpu.h"

int main(int argc, char** argv) {
  const char* json = nullptr;
  if (argc == 3 && std::strcmp(argv[1], "--json") == 0) {
    json = argv[2];
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: ballast-bench-gpu [--json FILE]\n");
    return 2;
  }
  if (json != nullptr) {
    const absl::Status writable = ballast::CheckWritable(json);
    if (!writable.ok()) {
      std::fprintf(stderr, "ballast-bench-gpu: %s\n", std::string(writable.message()).c_str());
      return 2;
    }
  }
  const auto result = ballast::RunGpuBench(false);
  if (!result.ok()) {
    std::fprintf(stderr, "ballast-bench-gpu: %s\n", std::string(result.status().message()).c_str());
    return 1;
  }
  std::fputs(ballast::ToTable(*result).c_str(), stdout);
  if (json == nullptr) return 0;
  const absl::Status written = ballast::WriteFile(json, ballast::ToJson(*result));
  if (written.ok()) return 0;
  std::fprintf(stderr, "ballast-bench-gpu: %s\n", std::string(written.message()).c_str());
  return 2;
}
