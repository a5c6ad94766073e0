// Ends with 77, which ctest counts as skipped, where there is no device; BALLAST_REQUIRE_GPU=1
// makes that a failure.
#define CATCH_CONFIG_RUNNER
#include <cuda_runtime.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char** argv) {
  // Ranks that share a device wait for each other's kernels: each needs a queue of its own, and no
  // kernel may be loaded while others spin.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  // What lists the cases after linking must not need a device.
  bool lists = false;
  for (int i = 1; i < argc; ++i) lists |= std::strncmp(argv[i], "--list", 6) == 0;
  int devices = 0;
  const cudaError_t error = lists ? cudaSuccess : cudaGetDeviceCount(&devices);
  if (!lists && devices == 0) {
    const char* required = std::getenv("BALLAST_REQUIRE_GPU");
    const bool must = required != nullptr && std::strcmp(required, "1") == 0;
    std::printf("%s: no device (%s)\n", must ? "failed" : "skipped", cudaGetErrorString(error));
    return must ? 1 : 77;
  }
  return Catch::Session().run(argc, argv);
}
