#include "tests/support/cuda_shim/guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/random.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SHIM_POISON(at, bytes) __asan_poison_memory_region(at, bytes)
#define SHIM_UNPOISON(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define SHIM_POISON(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#define SHIM_UNPOISON(at, bytes) (static_cast<void>(at), static_cast<void>(bytes))
#endif

namespace cuda_shim {
namespace {

constexpr std::byte kGuard{0xfb};

bool AllGuard(const std::byte* begin, const std::byte* end) {
  return std::all_of(begin, end, [](std::byte b) { return b == kGuard; });
}

}  // namespace

Guarded::Guarded(size_t bytes, uint64_t noise, bool shareable)
    : bytes_(bytes),
      whole_bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment + 2 * kAlignment) {
  if (shareable) {
    file_ = memfd_create("cuda_shim", MFD_CLOEXEC);
    void* mapped = MAP_FAILED;
    if (file_ >= 0 && ftruncate(file_, static_cast<off_t>(whole_bytes_)) == 0) {
      mapped = mmap(nullptr, whole_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    }
    if (mapped == MAP_FAILED) std::abort();
    whole_ = static_cast<std::byte*>(mapped);
  } else {
    whole_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, whole_bytes_));
    if (whole_ == nullptr) std::abort();
  }
  std::memset(whole_, static_cast<int>(kGuard), whole_bytes_);
  for (size_t at = 0; at < bytes; at += 8) {
    const uint64_t bits = ballast::RandomBits(noise, at);
    std::memcpy(data() + at, &bits, std::min<size_t>(8, bytes - at));
  }
  SetPoison(true);
}

Guarded::~Guarded() {
  SetPoison(false);
  if (file_ < 0) {
    std::free(whole_);
    return;
  }
  munmap(whole_, whole_bytes_);
  close(file_);
}

bool Guarded::IntactGuards() const {
  SetPoison(false);
  const bool intact = AllGuard(whole_, data()) && AllGuard(data() + bytes_, whole_ + whole_bytes_);
  SetPoison(true);
  return intact;
}

void Guarded::SetPoison(bool on) const {
  std::byte* end = data() + bytes_;
  if (on) {
    SHIM_POISON(whole_, kAlignment);
    SHIM_POISON(end, static_cast<size_t>(whole_ + whole_bytes_ - end));
  } else {
    SHIM_UNPOISON(whole_, whole_bytes_);
  }
}

}  // namespace cuda_shim
