#ifndef BALLAST_COMM_MEMBER_TRANSPORT_H_
#define BALLAST_COMM_MEMBER_TRANSPORT_H_

#include <array>
#include <cstdint>
#include <vector>

#include "comm/transport.h"

namespace ballast {

// Some ranks of a transport, numbered anew: what the members of one generation talk over.
//
// Each generation has tags of its own, so that nothing an earlier one left behind is ever taken for
// its messages: not those that a lost rank sent before it died, not those that were under way to
// members which had stopped listening. Tags come round again after kGenerations.
class MemberTransport : public Transport {
 public:
  static constexpr int64_t kGenerations = 4096;

  // Member i is rank `members[i]` of `base`, which must live longer.
  // REQUIRES members are ascending and base->rank() is one of them
  MemberTransport(Transport* base, std::vector<int32_t> members, int64_t generation);

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(members_.size()); }
  absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) override {
    const int base_tag = TagOf(tag);
    bytes_sent_[tag][peer] += static_cast<int64_t>(bytes.size());
    return base_->PostSend(members_[peer], base_tag, bytes);
  }
  absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) override {
    return base_->PostRecv(members_[peer], TagOf(tag), bytes);
  }
  absl::StatusOr<bool> Test(Handle handle, size_t* received) override {
    return base_->Test(handle, received);
  }

  // The ranks of `base`, by member.
  const std::vector<int32_t>& members() const { return members_; }

  // Bytes of the messages, headers and all, that were posted to a member with this tag since the
  // last call.
  int64_t TakeBytesSent(int peer, int tag);

 private:
  // MPI promises tags up to 32,767. The first ones are those of whoever uses `base` itself.
  static constexpr int kTagsPerGeneration = 4;
  static_assert((kGenerations + 1) * kTagsPerGeneration <= 32'767);

  int TagOf(int tag) const;

  Transport* const base_;
  const std::vector<int32_t> members_;
  const int first_tag_;
  int rank_ = -1;
  std::array<std::vector<int64_t>, kTagsPerGeneration> bytes_sent_;  // [tag][member]
};

}  // namespace ballast

#endif  // BALLAST_COMM_MEMBER_TRANSPORT_H_
