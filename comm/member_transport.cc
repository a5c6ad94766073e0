#include "comm/member_transport.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace ballast {
namespace {

// MPI promises tags up to 32,767. The first ones are those of whoever uses `base` itself.
constexpr int kTagsPerGeneration = 4;
static_assert((MemberTransport::kGenerations + 1) * kTagsPerGeneration <= 32'767);

}  // namespace

MemberTransport::MemberTransport(Transport* base, std::vector<int32_t> members, int64_t generation)
    : base_(base),
      members_(std::move(members)),
      first_tag_(static_cast<int>(1 + generation % kGenerations) * kTagsPerGeneration) {
  BALLAST_CHECK(std::is_sorted(members_.begin(), members_.end()));
  const auto mine = std::find(members_.begin(), members_.end(), base->rank());
  BALLAST_CHECK(mine != members_.end());
  rank_ = static_cast<int>(mine - members_.begin());
}

int MemberTransport::TagOf(int tag) const {
  BALLAST_CHECK(tag >= 0 && tag < kTagsPerGeneration);
  return first_tag_ + tag;
}

}  // namespace ballast
