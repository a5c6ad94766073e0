#ifndef BALLAST_KERNELS_COPY_ROUTE_H_
#define BALLAST_KERNELS_COPY_ROUTE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/device_hosts.h"
#include "kernels/stream.h"

namespace ballast {

// Where every copy of this rank's batch goes: the copies of expert e, in (t, k) order, to its hosts
// in their order, send[h] of them to host h, in rows from row_begin[h] on.
// SHAPES ids [T, K]; send, row_begin [H] (DeviceSplitArgs); copy_rank, copy_row [T*K];
//        tile_counts [NumRouteTiles(T * K), E] workspace
// ORDER  stable, no atomics
// ERRORS in *status: kSharesWrong
struct CopyRouteArgs {
  int32_t rank = 0;
  int32_t num_tokens = 0, top_k = 0;
  const int32_t* ids = nullptr;
  const DeviceHosts* layer = nullptr;  // in device memory, as in DeviceSplitArgs
  int32_t num_experts = 0;
  const int32_t* send = nullptr;
  const int32_t* row_begin = nullptr;
  int32_t* copy_rank = nullptr;
  int32_t* copy_row = nullptr;
  int32_t* tile_counts = nullptr;
  uint32_t* status = nullptr;
};
inline constexpr int32_t kRouteTile = 2048;  // copies
constexpr int32_t NumRouteTiles(int32_t num_copies) {
  return (num_copies + kRouteTile - 1) / kRouteTile;
}

// STREAM asynchronous, two launches; one where all copies fit one tile.
namespace cuda {
absl::Status RouteCopies(const CopyRouteArgs& args, Stream stream);
}

}  // namespace ballast

#endif  // BALLAST_KERNELS_COPY_ROUTE_H_
