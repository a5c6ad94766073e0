#ifndef BALLAST_TESTS_COMM_CONFORMANCE_H_
#define BALLAST_TESTS_COMM_CONFORMANCE_H_

#include "absl/status/status.h"
#include "comm/communicator.h"

namespace ballast::testing {

// What every transport must do, as seen from one rank; the first thing that is not so comes back.
// COLLECTIVE over the ranks of the communicator.
absl::Status CheckAllGather(Communicator* communicator);
absl::Status CheckExchange(Communicator* communicator);
absl::Status CheckOrder(Transport* transport);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_COMM_CONFORMANCE_H_
