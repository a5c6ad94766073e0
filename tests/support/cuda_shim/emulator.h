// Runs kernels on the processor: every thread of a block is a fiber, and a seeded choice says who
// goes on whenever one of them waits. What a kernel may not rely on is as bad as it can be: blocks
// start in any order, shared and device memory begin as noise, stores to peers arrive late, copies
// and launches of different streams interleave. Built against this header, device code is plain
// C++.
//
// THREADS any, one at a time: who calls a function of the CUDA runtime has a turn, and runs the
// kernels of all. Between turns it may be another's. So kernels that wait for another thread of the
// host to launch something wait for ever.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

struct CUstream_st;

namespace cuda_shim {

struct Shape {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

// What a collective operation of a warp does with the values of its lanes.
struct WarpOp {
  const char* name;
  // Sets result[i] for every lane i of `mask` from value[] and argument[] of the lanes of `mask`.
  void (*combine)(uint32_t mask, const uint64_t* value, const uint64_t* argument, uint64_t* result);
};

// ---- called by device code --------------------------------------------------------------------
uint64_t InWarp(const WarpOp& op, uint32_t mask, uint64_t value, uint64_t argument);
void Barrier();             // __syncthreads
bool BarrierOr(bool any);   // __syncthreads_or
void Yield();               // another thread may go on; time passes
void Fence();               // what this thread has stored or seen, others see
std::byte* SharedMemory();  // of the block
size_t SharedBytes();
uint64_t Nanoseconds();  // on the device: advances with every switch
// A store that others see at the next fence at the latest, and perhaps before.
void StoreLate(void* to, const void* from, size_t bytes);
[[noreturn]] void Trap(const char* why);
// What the device does beside its threads: `work` happens at some later time. A block that ends
// before it is an error.
void Later(std::function<void()> work);
// This thread goes on after somebody, or such work, wakes those that sleep on `key`.
void Sleep(const void* key, const char* what);
void WakeSleepers(const void* key);
std::shared_ptr<void>& BlockState();  // null at first: what else lives as long as the block

// ---- called by host code ----------------------------------------------------------------------
// Held during a turn. REQUIRES it is held by whoever calls one of the following
std::mutex& Mutex();
struct Launch {
  const char* name = "";
  Shape grid, block;
  size_t shared_bytes = 0;
  std::function<void()> body;  // of one thread
};
inline constexpr unsigned kMostResident = 24'576;  // threads on the device at a time
void Enqueue(CUstream_st* stream, Launch launch);
void Enqueue(CUstream_st* stream, std::function<void()> host_work);
// Work that waits until `ready` says so.
void EnqueueWait(CUstream_st* stream, std::function<bool()> ready);
// Likewise, for something that the emulator does not do itself: that it waits is no failure.
void EnqueueWaitOutside(CUstream_st* stream, std::function<bool()> ready);
bool IsIdle(CUstream_st* stream, bool all);
CUstream_st* MakeStream();
void FreeStream(CUstream_st* stream);  // REQUIRES it is idle
// Runs until the stream (nullptr of `all`: every stream) has nothing left, or all of it waits for
// something outside. False: a kernel failed or nothing can go on; the reason is LastFailure().
bool RunUntilIdle(CUstream_st* stream, bool all);
// Who asks how far the device is finds it a little further, how far is a matter of luck.
void RunAWhile();
const char* LastFailure();  // empty: none

uint64_t Noise();  // what fresh memory holds
std::byte* AllocateDevice(size_t bytes);
// False: something wrote outside of the block, or it is not one.
bool FreeDevice(void* block);
size_t DeviceBytes();  // that are lent
// Names a block that something wrote outside of, or returns true.
bool CheckDeviceBlocks();
std::byte* AllocatePinned(size_t bytes);
bool FreePinned(void* block);
// Whether it is in a block of the device or a pinned one: copies from there are made when the
// stream comes to them. Others are read at once, as by the driver.
bool IsReadLate(const void* from);

// Blocks that processes lend each other.
struct SharedBlock {
  int process, file;
  size_t bytes;
};
bool ExportDevice(void* block, SharedBlock* shared);
std::byte* OpenDevice(const SharedBlock& shared);  // null: it cannot be
bool CloseDevice(void* opened);

// ---- called by tests --------------------------------------------------------------------------
// Begins a schedule: every choice, and what fresh memory holds, follows from the seed.
// REQUIRES all streams are idle
void Reseed(uint64_t seed);
// Calls of the runtime so far that wait for a device or may take its driver's lock for long.
uint64_t BlockingCalls();

}  // namespace cuda_shim

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_EMULATOR_H_
