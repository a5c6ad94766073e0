#include "deploy/gpu/bench_rank.h"

#include <algorithm>

#include "base/random.h"

namespace ballast {

LayerHosts RandomHosts(int32_t experts, int32_t ranks, int32_t slots,
                       std::vector<int32_t> (*all)[4]) {
  Random random(kBenchSeed);
  std::vector<std::vector<uint8_t>> on(static_cast<size_t>(experts),
                                       std::vector<uint8_t>(static_cast<size_t>(ranks)));
  for (int32_t s = 0; s < slots; ++s) {
    const int32_t e = s < experts ? s : static_cast<int32_t>(random.Below(experts));
    on[e][s % ranks] = 1;
  }
  auto& [offsets, rank, copies, node] = *all;
  offsets = {0};
  for (int32_t e = 0; e < experts; ++e) {
    for (int32_t r = 0; r < ranks; ++r) {
      if (on[e][r] != 0) rank.push_back(r);
    }
    offsets.push_back(static_cast<int32_t>(rank.size()));
  }
  copies.assign(rank.size(), 1);
  for (int32_t r = 0; r < ranks; ++r) node.push_back(r / 8);
  return {experts, ranks, offsets, rank, copies, {}, node};
}

absl::Status RankMemory::Make(const LayerHosts& hosts, int32_t rank, const int32_t* counts,
                              int kinds) {
  BALLAST_RETURN_IF_ERROR(words.Set(compiled.words()));
  BALLAST_RETURN_IF_ERROR(layer.Set({compiled.At(words.data())}));
  const size_t num_hosts = hosts.host_rank.size();
  for (auto* array : {&quota, &send, &row_begin, &group_rows}) {
    BALLAST_RETURN_IF_ERROR(array->Allocate(num_hosts));
  }
  BALLAST_RETURN_IF_ERROR(group_begin.Allocate(num_hosts + 1));
  BALLAST_RETURN_IF_ERROR(load.Allocate(static_cast<size_t>(hosts.num_ranks)));
  BALLAST_RETURN_IF_ERROR(state.Set({{}}));
  int32_t max_groups = 0;
  for (int32_t r = 0; r < hosts.num_ranks; ++r) {
    max_groups = std::max(max_groups, compiled.num_groups(r));
  }
  split = {.layer = layer.data(),
           .num_experts = hosts.num_experts,
           .num_ranks = hosts.num_ranks,
           .max_hosts = static_cast<int32_t>(num_hosts),
           .max_groups = max_groups,
           .rank = rank,
           .row_align = kBenchRowAlign,
           .row_capacity = 1 << 30,
           .num_kinds = kinds,
           .counts = counts,
           .quota = quota.data(),
           .rank_load = load.data(),
           .send = send.data(),
           .row_begin = row_begin.data(),
           .group_begin = group_begin.data(),
           .group_rows = group_rows.data(),
           .status = &state.data()->status};
  return absl::OkStatus();
}

absl::Status RankMemory::MakeRoute(const LayerHosts& hosts, int32_t rank, int32_t tokens,
                                   int32_t top_k) {
  Random random(kBenchSeed + static_cast<uint64_t>(rank));
  std::vector<int32_t> chosen, all(static_cast<size_t>(hosts.num_experts));
  std::vector<int32_t> counts(2 * all.size());
  for (size_t e = 0; e < all.size(); ++e) all[e] = static_cast<int32_t>(e);
  for (int32_t t = 0; t < tokens; ++t) {
    for (int32_t k = 0; k < top_k; ++k) {
      std::swap(all[k], all[k + random.Below(hosts.num_experts - k)]);
      chosen.push_back(all[k]);
      ++counts[all[k]];
    }
  }
  BALLAST_RETURN_IF_ERROR(ids.Set(chosen));
  BALLAST_RETURN_IF_ERROR(histogram.Set(counts));
  BALLAST_RETURN_IF_ERROR(copy_rank.Allocate(chosen.size()));
  BALLAST_RETURN_IF_ERROR(copy_row.Allocate(chosen.size()));
  BALLAST_RETURN_IF_ERROR(
      tile_counts.Allocate(all.size() * static_cast<size_t>(NumRouteTiles(tokens * top_k))));
  route = {.rank = rank,
           .num_tokens = tokens,
           .top_k = top_k,
           .ids = ids.data(),
           .layer = layer.data(),
           .num_experts = hosts.num_experts,
           .send = send.data(),
           .row_begin = row_begin.data(),
           .copy_rank = copy_rank.data(),
           .copy_row = copy_row.data(),
           .tile_counts = tile_counts.data(),
           .status = &state.data()->status};
  return absl::OkStatus();
}

absl::Status RankMemory::Check() const {
  ExchangeState host;
  BALLAST_CUDA(cudaDeviceSynchronize());
  BALLAST_CUDA(cudaMemcpy(&host, state.data(), sizeof host, cudaMemcpyDeviceToHost));
  return ToStatus(host.status);
}

}  // namespace ballast
