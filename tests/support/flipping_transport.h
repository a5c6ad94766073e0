// A transport on which a message can be made to arrive with a bit changed.
#ifndef BALLAST_TESTS_SUPPORT_FLIPPING_TRANSPORT_H_
#define BALLAST_TESTS_SUPPORT_FLIPPING_TRANSPORT_H_

#include <utility>

#include "comm/transport.h"

namespace ballast::testing {

class FlippingTransport : public Transport {
 public:
  // `base` must live longer.
  explicit FlippingTransport(Transport* base) : base_(base) {}
  // REQUIRES whoever sends fills its buffer anew for every message
  void FlipNext() { flip_next_ = true; }

  int rank() const override { return base_->rank(); }
  int size() const override { return base_->size(); }
  absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) override {
    if (std::exchange(flip_next_, false)) const_cast<std::byte&>(bytes.back()) ^= std::byte{1};
    return base_->PostSend(peer, tag, bytes);
  }
  absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) override {
    return base_->PostRecv(peer, tag, bytes);
  }
  absl::StatusOr<bool> Test(Handle handle, size_t* received) override {
    return base_->Test(handle, received);
  }

 private:
  Transport* const base_;
  bool flip_next_ = false;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_FLIPPING_TRANSPORT_H_
