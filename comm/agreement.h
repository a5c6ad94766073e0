#ifndef BALLAST_COMM_AGREEMENT_H_
#define BALLAST_COMM_AGREEMENT_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace ballast {

// A number that has to be the same on all ranks.
struct AgreedValue {
  const char* name;  // for messages, the same on all ranks
  int64_t value;
};
inline constexpr size_t kMostAgreedValues = 4;

// Gathers each rank's `payload` (of one length) and lets all ranks go on or none: a rank that fails
// must not leave the others alone in a call that waits for it.
//
// ERRORS the same on all ranks: the status of the lowest rank whose is not OK, with that rank's
//        number, but one that has waited in vain only if no rank knows better; then
//        kInvalidArgument for values that differ, with both ranks; or AllGather's
// COLLECTIVE all ranks of `world`
absl::StatusOr<std::vector<std::byte>> Agree(Communicator* world, int64_t epoch,
                                             const absl::Status& mine,
                                             std::span<const AgreedValue> values,
                                             std::span<const std::byte> payload);

}  // namespace ballast

#endif  // BALLAST_COMM_AGREEMENT_H_
