#ifndef BALLAST_TESTS_SUPPORT_RUN_RANKS_H_
#define BALLAST_TESTS_SUPPORT_RUN_RANKS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/transport.h"

namespace ballast::testing {

using RankFunction = std::function<absl::Status(Transport*, Communicator*, int rank)>;

// Runs `fn` on `num_ranks` threads, the ranks of one local fabric, and gives each rank's status.
// Transports and communicators live until all have returned: a rank that fails leaves nothing that
// another one could trip over. Catch2's assertions are not thread-safe: `fn` records, the caller
// asserts.
std::vector<absl::Status> RunRanks(int num_ranks, const RankFunction& fn,
                                   int64_t deadline_ms = 60'000);

// The first of the statuses that is not OK, with its rank, or an empty string.
std::string FirstError(const std::vector<absl::Status>& statuses);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_RUN_RANKS_H_
