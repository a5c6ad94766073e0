// What a stream of the emulator holds, and what a graph keeps of it.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_STREAM_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_STREAM_H_

#include <deque>
#include <functional>
#include <memory>

#include "tests/support/cuda_shim/emulator.h"

namespace cuda_shim {

struct Work {
  enum class Kind { kKernel, kHost, kWait, kWaitOutside } kind;
  Launch launch;
  std::function<void()> host;
  std::function<bool()> ready;
};

struct Grid;  // a kernel that runs

}  // namespace cuda_shim

struct CUgraph_st {
  std::deque<cuda_shim::Work> work;
};

struct CUstream_st {
  std::deque<cuda_shim::Work> work;
  std::unique_ptr<CUgraph_st> captured;  // gets the work instead, while it is there
  std::unique_ptr<cuda_shim::Grid> grid;
  ~CUstream_st();
};

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_STREAM_H_
