// A stable counting sort by expert: lanes with the same expert find each other by a match, warps
// keep counters of their own, tiles add up those before them. The place among the expert's copies
// then says the host and the row.
#include "base/status.h"
#include "kernels/copy_route.h"
#include "kernels/exchange.cuh"

namespace ballast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / static_cast<int>(kWarp);
constexpr int kChunk = kRouteTile / kWarps;  // copies of a warp, which follow one another

// ---- device functions -------------------------------------------------------------------------

// Calls visit(copy, expert, earlier) for the copies of this warp's chunk of the tile, in steps of a
// warp, where `earlier` is how many copies of the expert the counters hold before it, and counts
// it.
template <typename Visit>
__device__ void CountChunk(const CopyRouteArgs& a, int tile, int* counters, const Visit& visit) {
  const unsigned lane = threadIdx.x % kWarp;
  const int num_copies = a.num_tokens * a.top_k;
  const int begin = tile * kRouteTile + static_cast<int>(threadIdx.x / kWarp) * kChunk;
  for (int first = begin; first < min(begin + kChunk, num_copies); first += kWarp) {
    const int copy = first + static_cast<int>(lane);
    const int expert = copy < num_copies ? a.ids[copy] : -1;
    const unsigned same = __match_any_sync(kFullWarp, expert);
    const int earlier_here = __popc(same & LanesBelow(lane));
    const int before = expert >= 0 ? counters[expert] : 0;
    if (expert >= 0) visit(copy, expert, before + earlier_here);
    __syncwarp();  // all have read
    if (expert >= 0 && earlier_here == 0) counters[expert] = before + __popc(same);
    __syncwarp();
  }
}

// counters [kWarps, E] of the tile, each warp's its own.
__device__ void CountTile(const CopyRouteArgs& a, int tile, int* counters) {
  const int experts = a.num_experts;
  for (int i = static_cast<int>(threadIdx.x); i < kWarps * experts; i += kThreads) counters[i] = 0;
  __syncthreads();
  CountChunk(a, tile, counters + static_cast<int>(threadIdx.x / kWarp) * experts,
             [](int, int, int) {});
  __syncthreads();
}

// The host and row of the copy that is the `place`-th of its expert on this rank.
__device__ void Route(const CopyRouteArgs& a, int copy, int expert, int place) {
  const DeviceHosts& hosts = *a.layer;
  const int end = hosts.host_offsets[expert + 1];
  int h = hosts.host_offsets[expert];
  while (h < end && place >= a.send[h]) place -= a.send[h++];
  if (h == end) {
    Report(a.status, ExchangeCode::kSharesWrong, a.rank);
    a.copy_rank[copy] = 0;  // an address that exists, for kernels that are under way
    a.copy_row[copy] = 0;
    return;
  }
  a.copy_rank[copy] = hosts.host_rank[h];
  a.copy_row[copy] = a.row_begin[h] + place;
}

// ---- kernels ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) TileCountsKernel(CopyRouteArgs a) {
  int* counters = &Shared<int>();
  const int experts = a.num_experts;
  if (HasFailed(a.status)) return;
  CountTile(a, static_cast<int>(blockIdx.x), counters);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    int sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += counters[warp * experts + e];
    a.tile_counts[static_cast<size_t>(blockIdx.x) * experts + e] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) RouteKernel(CopyRouteArgs a) {
  int* counters = &Shared<int>();
  const int experts = a.num_experts;
  const int tile = static_cast<int>(blockIdx.x);
  if (HasFailed(a.status)) return;
  CountTile(a, tile, counters);
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    int sum = 0;
    for (int before = 0; before < tile; ++before) {
      sum += a.tile_counts[static_cast<size_t>(before) * experts + e];
    }
    for (int warp = 0; warp < kWarps; ++warp) {
      const int of_warp = counters[warp * experts + e];
      counters[warp * experts + e] = sum;
      sum += of_warp;
    }
  }
  __syncthreads();
  CountChunk(a, tile, counters + static_cast<int>(threadIdx.x / kWarp) * experts,
             [&](int copy, int expert, int place) { Route(a, copy, expert, place); });
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------

absl::Status RouteCopies(const CopyRouteArgs& a, Stream stream) {
  const int tiles = NumRouteTiles(a.num_tokens * a.top_k);
  if (tiles == 0) return absl::OkStatus();
  const size_t bytes = sizeof(int) * kWarps * static_cast<size_t>(a.num_experts);
  if (bytes > kMostShared) {
    return absl::InvalidArgumentError(
        absl::StrCat("route: ", a.num_experts, " experts take ", bytes,
                     " bytes of shared memory, allowed: ", kMostShared));
  }
  BALLAST_RETURN_IF_ERROR(AllowMostShared<TileCountsKernel>());
  BALLAST_RETURN_IF_ERROR(AllowMostShared<RouteKernel>());
  const LaunchShape shape = {static_cast<unsigned>(tiles), kThreads, bytes};
  if (tiles > 1) BALLAST_RETURN_IF_ERROR(Launch(shape, stream, TileCountsKernel, a));
  return Launch(shape, stream, RouteKernel, a);
}

}  // namespace ballast::cuda
