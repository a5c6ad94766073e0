// A stack of its own and a way to switch to it: what the emulated threads of a kernel run on.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_FIBER_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_FIBER_H_

#include <cstddef>

namespace cuda_shim {

// THREADS one system thread runs all fibers.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Lets the next Resume begin `entry(argument)` on an empty stack. `entry` ends in Finish.
  void Start(void (*entry)(void*), void* argument);
  // From the scheduler: runs the fiber until it calls Suspend or Finish.
  void Resume();
  // From the fiber: back to the scheduler.
  void Suspend();
  [[noreturn]] void Finish();

 private:
  static constexpr size_t kStackBytes = 256 << 10;  // address space: few pages of it are touched

  std::byte* stack_ = nullptr;
  void* fiber_sp_ = nullptr;
  void* scheduler_sp_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;  // the address sanitizer's, of whoever is not running
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;

  friend void Trampoline(Fiber* fiber);
};

}  // namespace cuda_shim

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_FIBER_H_
