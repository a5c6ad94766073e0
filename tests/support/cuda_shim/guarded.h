// Memory with noise in it and guards around it.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_GUARDED_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_GUARDED_H_

#include <cstddef>
#include <cstdint>

namespace cuda_shim {

// A block that begins as noise. A write beside it is found out by IntactGuards, and under the
// address sanitizer, as a read is, when it happens.
class Guarded {
 public:
  static constexpr size_t kAlignment = 1024;  // as much as any instruction asks of shared memory

  // `shareable`: other processes can map it, by file().
  Guarded(size_t bytes, uint64_t noise, bool shareable = false);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::byte* data() const { return whole_ + kAlignment; }
  size_t size() const { return bytes_; }
  size_t whole_size() const { return whole_bytes_; }  // with the guards: what the file holds
  int file() const { return file_; }
  bool IntactGuards() const;

 private:
  void SetPoison(bool on) const;

  std::byte* whole_;
  size_t bytes_, whole_bytes_;
  int file_ = -1;  // a descriptor
};

}  // namespace cuda_shim

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_GUARDED_H_
