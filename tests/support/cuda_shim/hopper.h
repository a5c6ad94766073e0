// Hopper's asynchronous units in the emulator: barriers that count bytes, the copy engine, products
// of a warpgroup. Copies and products happen at some later time, a box in several parts; until a
// wait says that they are done, the sums in registers are NaN and shared memory may be old or new.
// What the device leaves undefined is a failure where it can be told.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_HOPPER_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_HOPPER_H_

#include <cstddef>
#include <cstdint>

namespace cuda_shim {

// A tensor map: matrices [depth, rows, columns], of which boxes of 128 bytes by box_rows are copied
// in the 128-byte swizzle.
struct alignas(64) BoxMap {
  const std::byte* at = nullptr;
  uint64_t columns = 0, rows = 0, depth = 0;
  uint64_t row_bytes = 0, matrix_bytes = 0;
  uint32_t element_bytes = 0, box_rows = 0;
};
// Why the driver would refuse the map, or null.
const char* FaultOf(const BoxMap& map);

void BarrierInit(uint64_t* barrier, uint32_t count);
void BarrierArrive(uint64_t* barrier, uint32_t announced_bytes);
void BarrierWait(uint64_t* barrier, uint32_t parity);
// Barriers that this thread has begun may be told to the copy engine from now on.
void AsyncProxyFence();

void CopyBox(void* to, const BoxMap& map, uint64_t* barrier, int64_t column, int64_t row,
             int64_t matrix);

// The address as shared memory's own addresses begin, at the block's.
uint64_t SharedOffset(const void* at);
void SumsFence();
enum class Element : uint8_t { kBf16, kE4m3 };
// Products of 32 bytes of each row. d [num_sums] of this thread: the sums of 64 rows by 2 num_sums
// columns over the warpgroup.
void BeginProduct(Element element, float* d, int num_sums, uint64_t x, uint64_t w, bool add);
void CommitProducts();
void WaitProducts(size_t left);

}  // namespace cuda_shim

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_HOPPER_H_
