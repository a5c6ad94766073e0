#include "kernels/memory.h"

#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {
namespace {

class PlainHostMemory : public Memory {
 public:
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    const size_t padded = RoundUp(bytes == 0 ? 1 : bytes, kCacheLineBytes);
    void* const block = std::aligned_alloc(kCacheLineBytes, padded);
    if (block == nullptr) {
      return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
    }
    std::memset(block, 0, padded);
    return static_cast<std::byte*>(block);
  }
  void Free(std::byte* block) override { std::free(block); }
  absl::Status Write(std::byte* to, std::span<const std::byte> from, Stream) override {
    if (!from.empty()) std::memcpy(to, from.data(), from.size());
    return absl::OkStatus();
  }
  absl::Status Read(std::span<std::byte> to, const std::byte* from, Stream) override {
    if (!to.empty()) std::memcpy(to.data(), from, to.size());
    return absl::OkStatus();
  }
};

}  // namespace

Memory& HostMemory() {
  static PlainHostMemory memory;
  return memory;
}

absl::Status Buffer::EnsureSize(size_t bytes) {
  if (bytes <= bytes_ && data_ != nullptr) return absl::OkStatus();
  const size_t wanted = data_ == nullptr ? bytes : bytes + bytes / 2;  // it grows once more
  memory_->Free(std::exchange(data_, nullptr));
  bytes_ = 0;
  BALLAST_ASSIGN_OR_RETURN(data_, memory_->Allocate(wanted));
  bytes_ = wanted;
  return absl::OkStatus();
}

absl::Status Buffer::Assign(std::span<const std::byte> from, Stream stream) {
  BALLAST_RETURN_IF_ERROR(EnsureSize(from.size()));
  return memory_->Write(data_, from, stream);
}

}  // namespace ballast
