#ifndef BALLAST_PLACEMENT_CLUSTER_MODEL_H_
#define BALLAST_PLACEMENT_CLUSTER_MODEL_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/cost_model.h"
#include "placement/migration_plan.h"
#include "placement/split.h"

namespace ballast {

// A cluster of equal nodes of equal ranks, as far as the time of a step depends on it. Links carry
// both directions at once; within a node and between nodes at the same time.
// UNITS  1 GB = 1e9 bytes
struct ClusterModel {
  int32_t ranks_per_node = 8;
  double link_gb_per_s = 0.0;     // of a rank, each way, within its node
  double link_latency_us = 0.0;   // until the first byte
  double network_gb_per_s = 0.0;  // of a rank, each way, to other nodes
  double network_latency_us = 0.0;
  double message_us = 0.0;          // of a rank per rank that it sends to
  double dispatch_row_bytes = 0.0;  // one copy on its way to an expert: hidden size * element size
  double combine_row_bytes = 0.0;   // its result on the way back
  double expert_bytes = 0.0;        // the parameters of one expert
  double expert_read_us = 0.0;      // as CostConstants
  double token_us = 0.0;
  double background_share = 0.0;  // of a link that copies of experts may take while steps run

  // ERRORS kInvalidArgument names the file `name`, the key, its value and what is allowed. Every
  //        member is a required key, and there is no other.
  static absl::StatusOr<ClusterModel> FromJson(const std::string& name, const std::string& json);
  // What the cost split is to know of the cluster.
  CostConstants constants() const;
  // All members and what is assumed, in sentences.
  std::string Assumptions() const;
};

// The time of one layer of a step, or of several layers added up.
struct LayerTime {
  double dispatch_us = 0.0;  // until the last rank has its rows
  double compute_us = 0.0;   // until the slowest rank has computed them
  double combine_us = 0.0;   // until the last rank has its results

  double us() const { return dispatch_us + compute_us + combine_us; }
  LayerTime& operator+=(const LayerTime& other);
};

// Predicts the three parts, one after the other, each as long as the slowest rank takes.
//
//   dispatch = max over ranks of message * min(R - 1, rows sent)
//            + max over both links, where rows pass, of
//                latency + max(rows sent, rows received) * dispatch_row_bytes / bandwidth
//   compute  = max over ranks of the sum over its active experts of max(expert_read, rows * token)
//   combine  = as dispatch, the other way round, with combine_row_bytes
//
// SHAPES quota, host_rank [num_hosts]
// REQUIRES traffic is that of the quotas
LayerTime PredictLayer(const ClusterModel& cluster, std::span<const int32_t> quota,
                       std::span<const int32_t> host_rank, const RowTraffic& traffic);

// The time of a plan's copies if they had the links for themselves: of the busiest rank, link and
// direction.
double PredictCopiesUs(const ClusterModel& cluster, const Topology& topology,
                       std::span<const Move> moves);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_CLUSTER_MODEL_H_
