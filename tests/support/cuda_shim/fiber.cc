#include "tests/support/cuda_shim/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SHIM_ASAN 1
#else
#define SHIM_ASAN 0
#endif

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

namespace cuda_shim {

// Saves what a function must preserve on the running stack, and goes on with the other one. The
// system's swapcontext also asks the kernel for the signal mask: twenty times slower.
extern "C" void BallastShimSwitch(void** from, void* to);
asm(R"(
.text
.globl BallastShimSwitch
.type BallastShimSwitch, @function
BallastShimSwitch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size BallastShimSwitch, .-BallastShimSwitch

.globl BallastShimEnter
.type BallastShimEnter, @function
BallastShimEnter:
  movq %r12, %rdi
  call BallastShimTrampoline
  ud2
.size BallastShimEnter, .-BallastShimEnter
.section .note.GNU-stack,"",@progbits
.text
)");
extern "C" void BallastShimEnter();

void Trampoline(Fiber* fiber) {
#if SHIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &fiber->scheduler_stack_,
                                  &fiber->scheduler_stack_bytes_);
#endif
  fiber->entry_(fiber->argument_);
  std::abort();  // an entry ends in Finish
}

extern "C" void BallastShimTrampoline(void* fiber) {
  Trampoline(static_cast<Fiber*>(fiber));
}

Fiber::Fiber() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) {
    std::perror("cuda_shim: no room for a stack");
    std::abort();
  }
  mprotect(stack, 4096, PROT_NONE);  // an overflow ends the process instead of another fiber
  stack_ = static_cast<std::byte*>(stack);
}

Fiber::~Fiber() {
  munmap(stack_, kStackBytes);
}

void Fiber::Start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  // What the switch pops: six registers, then where it returns to. At the entry of a function the
  // stack pointer is 8 past a multiple of 16.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes) - 2;
  *--top = reinterpret_cast<uint64_t>(&BallastShimEnter);
  *--top = 0;                                 // rbp
  *--top = 0;                                 // rbx
  *--top = reinterpret_cast<uint64_t>(this);  // r12
  for (int i = 0; i < 3; ++i) *--top = 0;     // r13, r14, r15
  fiber_sp_ = top;
#if SHIM_ASAN
  fake_stack_ = nullptr;
  // What an earlier run left poisoned when it was dropped in the middle.
  __asan_unpoison_memory_region(stack_ + 4096, kStackBytes - 4096);
#endif
}

void Fiber::Resume() {
#if SHIM_ASAN
  void* scheduler_fake = nullptr;
  __sanitizer_start_switch_fiber(&scheduler_fake, stack_, kStackBytes);
  BallastShimSwitch(&scheduler_sp_, fiber_sp_);
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#else
  BallastShimSwitch(&scheduler_sp_, fiber_sp_);
#endif
}

void Fiber::Suspend() {
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, scheduler_stack_, scheduler_stack_bytes_);
  BallastShimSwitch(&fiber_sp_, scheduler_sp_);
  __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack_, &scheduler_stack_bytes_);
#else
  BallastShimSwitch(&fiber_sp_, scheduler_sp_);
#endif
}

void Fiber::Finish() {
#if SHIM_ASAN
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack_, scheduler_stack_bytes_);
#endif
  BallastShimSwitch(&fiber_sp_, scheduler_sp_);
  std::abort();
}

}  // namespace cuda_shim
