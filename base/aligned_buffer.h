// Zeroed memory aligned to cache lines.
#ifndef BALLAST_BASE_ALIGNED_BUFFER_H_
#define BALLAST_BASE_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>

#include "base/check.h"

namespace ballast {

inline constexpr size_t kCacheLineBytes = 64;

constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A block of bytes, 64-byte aligned, zero at first, never moved. Movable, not copyable.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) : bytes_(bytes) {
    const size_t padded = RoundUp(bytes == 0 ? 1 : bytes, kCacheLineBytes);
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kCacheLineBytes, padded)));
    BALLAST_CHECK(data_ != nullptr);
    std::memset(data_.get(), 0, padded);
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return bytes_; }
  std::span<std::byte> bytes() { return {data_.get(), bytes_}; }
  std::span<const std::byte> bytes() const { return {data_.get(), bytes_}; }

  template <typename T>
  T* as() { return reinterpret_cast<T*>(data_.get()); }
  template <typename T>
  const T* as() const { return reinterpret_cast<const T*>(data_.get()); }

  // Makes room for at least `bytes`; the content is lost when it grows.
  void EnsureSize(size_t bytes) {
    if (bytes > bytes_) *this = AlignedBuffer(bytes + bytes / 2);
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_BASE_ALIGNED_BUFFER_H_
