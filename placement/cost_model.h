#ifndef BALLAST_PLACEMENT_COST_MODEL_H_
#define BALLAST_PLACEMENT_COST_MODEL_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/layer_hosts.h"

namespace ballast {

// What the time of a rank in one layer is made of. A *token* in these names is one row through one
// expert: a copy in the words of the split.
//
// The defaults are of an H200 and of DeepSeek-V3's experts in FP8; a row is sent in FP8 with its
// scales and comes back in BF16: 7,392 + 14,336 bytes.
// UNITS  microseconds
// SOURCE arithmetic on published figures: 44.0 MB per expert at 4.8 TB/s; 88.1 MFLOP per row at 60
// %
//        of 1,979 TFLOPS; rows at 320 GB/s within 8 x H200 (uccl ep/README) and at 45 GB/s over NDR
//        InfiniBand. What a message costs is not published apart, so it is 0: it is the same for
//        every split.
struct CostConstants {
  double expert_read_us = 9.2;         // reading the parameters of one active expert
  double token_us = 0.074;             // computing one row in one expert
  double link_us_per_token = 0.068;    // one row between ranks of a node: there and back
  double network_us_per_token = 0.48;  // the same between nodes
  double message_us = 0.0;             // per other rank that rows are exchanged with
  std::vector<double> speed = {};      // [R] read and compute are divided by it; empty: all 1
};

// ERRORS kInvalidArgument names the constant, its value and what is allowed: times from 0, a row at
//        most 4,000 us in each of its parts, a read or a message at most 1e6 us, one of read and
//        compute above 0, speeds of 1/16 to 16, none or one per rank
absl::Status CheckCostConstants(const CostConstants& constants, int32_t num_ranks);

// Reads {"expert_read_us": 9.2, "token_us": 0.074, "link_us_per_token": 0.068, ...}: the members of
// CostConstants, and of a measurement of a machine row_block, block_us (which stand in for
// token_us = block_us / row_block where that is null) and copy_us (not used here). What is null or
// absent counts as 0, and network_us_per_token as link_us_per_token.
// ERRORS kInvalidArgument names the file `name`, the key, its value and what is allowed
absl::StatusOr<CostConstants> CostConstantsFromJson(const std::string& name,
                                                    const std::string& json, int32_t num_ranks);

// Times in whole ticks, so that sums do not depend on their order.
inline constexpr double kTicksPerUs = 65536.0;

// The predicted time of the ranks of one layer under given quotas.
//
//   time[r] = message * (R - 1)
//           + sum over hosts h on rank r with quota[h] > 0 of
//               max(expert_read, quota[h] * token) / speed[r] + quota[h] * link[r]
//   link[r] = (link_us_per_token * (ranks of r's node - 1) + network_us_per_token * (ranks of other
//             nodes)) / R
//
// Every rank is taken to be the source of an equal share of each expert's rows, so 1/R of what a
// rank computes is its own. Only what comes in is counted: links carry both directions at once, and
// what a rank sends out depends on where its rows are computed, not on what it computes.
class CostModel {
 public:
  // The time of the rows of one expert on one rank, in ticks.
  struct OnRank {
    int64_t read, row, link;

    int64_t Of(int64_t rows) const {
      return rows == 0 ? 0 : std::max(read, rows * row) + rows * link;
    }
    // The most rows whose time is within `ticks`, up to 2^31 - 1; -1 if none, not even 0.
    int64_t MostWithin(int64_t ticks) const;
    // The most rows that cost no more time to compute than to wait for the parameters.
    int64_t ridge() const { return row == 0 ? (int64_t{1} << 31) - 1 : read / row; }
  };

  // REQUIRES CheckCostConstants(constants, hosts.num_ranks).ok() (checked)
  CostModel(const CostConstants& constants, const LayerHosts& hosts);

  const OnRank& on(int32_t rank) const { return on_rank_[rank]; }
  int64_t base() const { return base_; }  // what every rank pays, in ticks
  // SHAPES quota [num_hosts], host_rank [num_hosts]   ticks [R], written
  void RankTicks(std::span<const int32_t> quota, std::span<const int32_t> host_rank,
                 std::span<int64_t> ticks) const;
  // The time of the slowest rank.
  double LargestUs(std::span<const int32_t> quota, std::span<const int32_t> host_rank) const;

 private:
  std::vector<OnRank> on_rank_;  // [R]
  int64_t base_;
};

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_COST_MODEL_H_
