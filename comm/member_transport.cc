#include "comm/member_transport.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace ballast {

MemberTransport::MemberTransport(Transport* base, std::vector<int32_t> members, int64_t generation)
    : base_(base),
      members_(std::move(members)),
      first_tag_(static_cast<int>(1 + generation % kGenerations) * kTagsPerGeneration) {
  BALLAST_CHECK(std::is_sorted(members_.begin(), members_.end()));
  const auto mine = std::find(members_.begin(), members_.end(), base->rank());
  BALLAST_CHECK(mine != members_.end());
  rank_ = static_cast<int>(mine - members_.begin());
  for (std::vector<int64_t>& sent : bytes_sent_) sent.resize(members_.size());
}

int64_t MemberTransport::TakeBytesSent(int peer, int tag) {
  return std::exchange(bytes_sent_[tag][peer], 0);
}

int MemberTransport::TagOf(int tag) const {
  BALLAST_CHECK(tag >= 0 && tag < kTagsPerGeneration);
  return first_tag_ + tag;
}

}  // namespace ballast
