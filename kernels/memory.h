// Where a backend's arrays lie: the host's memory, or a device's.
#ifndef BALLAST_KERNELS_MEMORY_H_
#define BALLAST_KERNELS_MEMORY_H_

#include <cstddef>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "kernels/stream.h"

namespace ballast {

// THREADS any, with the device current whose memory it is.
class Memory {
 public:
  virtual ~Memory() = default;

  // Zeroed, and aligned to kCacheLineBytes at least. ERRORS kResourceExhausted: with the size
  virtual absl::StatusOr<std::byte*> Allocate(size_t bytes) = 0;
  // Waits for what runs on the device. REQUIRES a block of Allocate, or nullptr
  virtual void Free(std::byte* block) = 0;
  // Between the host and a block. STREAM in its order; Write returns when `from` may change, Read
  // when `to` is filled. ERRORS kInternal: the copy, or something before it on the device, failed
  virtual absl::Status Write(std::byte* to, std::span<const std::byte> from, Stream stream) = 0;
  virtual absl::Status Read(std::span<std::byte> to, const std::byte* from, Stream stream) = 0;
};

Memory& HostMemory();

// A block of a Memory. Movable, not copyable.
class Buffer {
 public:
  explicit Buffer(Memory* memory) : memory_(memory) {}
  ~Buffer() { memory_->Free(data_); }
  Buffer(Buffer&& other) noexcept
      : memory_(other.memory_),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Makes room for at least `bytes`; the content is lost when it grows. ERRORS those of Allocate
  absl::Status EnsureSize(size_t bytes);
  // The block becomes as large as `from` at least and begins with it. ERRORS those of Memory
  absl::Status Assign(std::span<const std::byte> from, Stream stream);

 private:
  Memory* memory_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_KERNELS_MEMORY_H_
