// The exact split on the device: from the counts of all ranks to where this rank's copies go, with
// no word to the host.
#ifndef BALLAST_KERNELS_DEVICE_SPLIT_H_
#define BALLAST_KERNELS_DEVICE_SPLIT_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/device_hosts.h"
#include "kernels/exchange.h"
#include "kernels/stream.h"

namespace ballast {

// Divides the batch over the hosts as ExactSplitter does (placement/split_exact.h), quota by quota,
// cuts the quotas over the sources as Splitter::Cut does, and lays out the rows of every rank:
// groups in the order of rank_hosts, each from a multiple of row_align on; in a group by source
// rank, then in the order of the source's copies.
//
// SHAPES counts [P, kinds, E], what is split is the sum over the kinds; quota, send, row_begin
//        [max_hosts], of which the layer's hosts are written; rank_load [R]; group_begin
//        [max_groups+1], group_rows [max_groups] of this rank: groups that it has not got are empty
// REQUIRES all counts together are below 2^31; the layer has at most max_hosts hosts, and at most
//          max_groups of them on this rank (checked on the device)
// ERRORS in *status: kLayerTooLarge; kRowsExceeded: a rank gets more than row_capacity rows; that
// rank's groups are
//        empty then
struct DeviceSplitArgs {
  const DeviceHosts* layer = nullptr;  // in device memory: a flip writes another one there
  int32_t num_experts = 0, num_ranks = 0;
  int32_t max_hosts = 0, max_groups = 0;  // of any placement
  int32_t rank = 0;
  int32_t row_align = 1;
  int32_t row_capacity = 0;  // of every rank
  int32_t num_kinds = 1;
  const int32_t* counts = nullptr;
  const int32_t* place = nullptr;  // [R] of the ranks in `counts`; as in Exchange
  int32_t* quota = nullptr;
  int32_t* rank_load = nullptr;
  int32_t* send = nullptr;       // copies of this rank that go to the host
  int32_t* row_begin = nullptr;  // on the host's rank: where those begin
  int32_t* group_begin = nullptr;
  int32_t* group_rows = nullptr;
  uint32_t* status = nullptr;
};

// STREAM asynchronous, one launch of one block.
// ERRORS kInvalidArgument: layers of this size do not fit into shared memory
namespace cuda {
absl::Status SplitOnDevice(const DeviceSplitArgs& args, Stream stream);
// First tells all ranks this rank's counts, own_counts [kinds, E], and waits for theirs.
// Where it fails, this rank's groups are empty.
// REQUIRES args.counts and args.status are the arena's counts and the exchange's places and
//          status
// ERRORS also kInvalidArgument: other numbers than the exchange's
absl::Status ExchangeCountsAndSplit(const DeviceSplitArgs& args, const Exchange& exchange,
                                    const int32_t* own_counts, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_DEVICE_SPLIT_H_
