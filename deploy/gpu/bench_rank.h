// One rank of an exchange on the device, for the measurements of this folder.
#ifndef BALLAST_DEPLOY_GPU_BENCH_RANK_H_
#define BALLAST_DEPLOY_GPU_BENCH_RANK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "base/layer_hosts.h"
#include "deploy/gpu/measure.h"
#include "kernels/copy_route.h"
#include "kernels/device_split.h"
#include "kernels/exchange.h"

namespace ballast {

inline constexpr uint64_t kBenchSeed = 20260801;
inline constexpr int32_t kBenchRowAlign = 128;

// Every expert once, round the ranks, and the rest of the slots at random. `all` holds what the
// result points to.
LayerHosts RandomHosts(int32_t experts, int32_t ranks, int32_t slots,
                       std::vector<int32_t> (*all)[4]);

// What a rank has on the device besides its arena.
struct RankMemory {
  OnDevice<int32_t> words, quota, load, send, row_begin, group_begin, group_rows;
  OnDevice<DeviceHosts> layer;
  OnDevice<int32_t> ids, copy_rank, copy_row, tile_counts, histogram;
  OnDevice<float> weights, base;
  OnDevice<std::byte> x, expanded;
  OnDevice<ExchangeState> state;
  CompiledHosts compiled;
  DeviceSplitArgs split;
  CopyRouteArgs route;

  explicit RankMemory(const LayerHosts& hosts) : compiled(hosts, 0) {}

  // `counts` are those of the arena; the split gets no limit of rows.
  absl::Status Make(const LayerHosts& hosts, int32_t rank, const int32_t* counts, int kinds);
  // Distinct random experts for every token, in the order of a hash.
  absl::Status MakeRoute(const LayerHosts& hosts, int32_t rank, int32_t tokens, int32_t top_k);
  // Waits for the device. OK, or what ended an exchange of this rank.
  absl::Status Check() const;
};

}  // namespace ballast

#endif  // BALLAST_DEPLOY_GPU_BENCH_RANK_H_
