#include "placement/cluster_model.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr double kBytesPerUs = 1e3;  // of 1 GB/s

// A member of ClusterModel as a key of the file.
struct Key {
  const char* name;
  double ClusterModel::*member;
  double least, most;
  const char* unit;
};
constexpr Key kKeys[] = {
    {"link_gb_per_s", &ClusterModel::link_gb_per_s, 0.5, 1e5, "GB/s"},
    {"link_latency_us", &ClusterModel::link_latency_us, 0.0, 1e6, "us"},
    {"network_gb_per_s", &ClusterModel::network_gb_per_s, 0.5, 1e5, "GB/s"},
    {"network_latency_us", &ClusterModel::network_latency_us, 0.0, 1e6, "us"},
    {"message_us", &ClusterModel::message_us, 0.0, 1e6, "us"},
    {"dispatch_row_bytes", &ClusterModel::dispatch_row_bytes, 1.0, 1e6, "bytes"},
    {"combine_row_bytes", &ClusterModel::combine_row_bytes, 1.0, 1e6, "bytes"},
    {"expert_bytes", &ClusterModel::expert_bytes, 1.0, 1e12, "bytes"},
    {"expert_read_us", &ClusterModel::expert_read_us, 1e-6, 1e6, "us"},
    {"token_us", &ClusterModel::token_us, 0.0, 1e3, "us"},
    {"background_share", &ClusterModel::background_share, 0.01, 0.9, "of the link"}};
constexpr char kRanksPerNode[] = "ranks_per_node";

absl::Status Reject(const std::string& key, const nlohmann::json& value,
                    const std::string& allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(key, " is ", value.dump(), ", allowed: ", allowed));
}

absl::StatusOr<ClusterModel> ModelOf(const nlohmann::json& json) {
  if (!json.is_object()) return absl::InvalidArgumentError("not a JSON object");
  ClusterModel model;
  std::string names = kRanksPerNode;
  for (const Key& key : kKeys) absl::StrAppend(&names, ", ", key.name);
  for (const auto& [name, value] : json.items()) {
    const bool known =
        name == kRanksPerNode || std::any_of(std::begin(kKeys), std::end(kKeys),
                                             [&](const Key& key) { return name == key.name; });
    if (known) continue;
    return absl::InvalidArgumentError(absl::StrCat("unknown key \"", name, "\", allowed: ", names));
  }
  const nlohmann::json ranks = json.value(kRanksPerNode, nlohmann::json());
  if (!ranks.is_number_integer() || ranks < 1 || ranks > 65536) {
    return Reject(kRanksPerNode, ranks, "1 to 65536");
  }
  model.ranks_per_node = ranks.get<int32_t>();
  for (const Key& key : kKeys) {
    const nlohmann::json value = json.value(key.name, nlohmann::json());
    if (!value.is_number() || !(value >= key.least) || !(value <= key.most)) {
      return Reject(key.name, value, absl::StrCat(key.least, " to ", key.most, " ", key.unit));
    }
    model.*key.member = value.get<double>();
  }
  return model;
}

// How long a rank takes to exchange rows over one link, busy both ways.
double LinkUs(int64_t sent, int64_t received, double row_bytes, double gb_per_s,
              double latency_us) {
  const int64_t rows = std::max(sent, received);
  if (rows == 0) return 0.0;
  return latency_us + static_cast<double>(rows) * row_bytes / (gb_per_s * kBytesPerUs);
}

}  // namespace

absl::StatusOr<ClusterModel> ClusterModel::FromJson(const std::string& name,
                                                    const std::string& json) {
  if (JsonNestsTooDeep(json)) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": nests deeper than ", kMostJsonDepth));
  }
  absl::StatusOr<ClusterModel> model =
      ModelOf(nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false,
                                    /*ignore_comments=*/true));
  if (model.ok()) return model;
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", model.status().message()));
}

CostConstants ClusterModel::constants() const {
  const double row_bytes = dispatch_row_bytes + combine_row_bytes;
  return {.expert_read_us = expert_read_us,
          .token_us = token_us,
          .link_us_per_token = row_bytes / (link_gb_per_s * kBytesPerUs),
          .network_us_per_token = row_bytes / (network_gb_per_s * kBytesPerUs),
          .message_us = message_us};
}

std::string ClusterModel::Assumptions() const {
  std::string text = absl::StrCat("Nodes of ", ranks_per_node, " ranks");
  for (const Key& key : kKeys) {
    absl::StrAppend(&text, ", ", key.name, " ", this->*key.member);
  }
  return text +
         ". A layer is dispatch, then experts, then combine, each as long as its slowest rank; "
         "links carry both directions at once, and those within a node and between nodes at the "
         "same time. Every copy is a row of its own, also where a token has two experts on a rank. "
         "Attention and shared experts are not counted. Blocking: a step waits for its copies. "
         "Background: they take their share of the links for as long as it takes, and slow the "
         "dispatch and combine that they meet.";
}

LayerTime& LayerTime::operator+=(const LayerTime& other) {
  dispatch_us += other.dispatch_us;
  compute_us += other.compute_us;
  combine_us += other.combine_us;
  return *this;
}

LayerTime PredictLayer(const ClusterModel& cluster, std::span<const int32_t> quota,
                       std::span<const int32_t> host_rank, const RowTraffic& traffic) {
  const auto num_ranks = static_cast<int64_t>(traffic.node_sent.size());
  std::vector<double> compute_us(traffic.node_sent.size(), 0.0);
  for (size_t h = 0; h < quota.size(); ++h) {
    if (quota[h] == 0) continue;
    compute_us[host_rank[h]] += std::max(cluster.expert_read_us, quota[h] * cluster.token_us);
  }
  LayerTime time;
  time.compute_us = *std::max_element(compute_us.begin(), compute_us.end());
  for (int64_t r = 0; r < num_ranks; ++r) {
    const auto exchange_us = [&](double row_bytes, int64_t rows_out) {
      const double node_us = LinkUs(traffic.node_sent[r], traffic.node_received[r], row_bytes,
                                    cluster.link_gb_per_s, cluster.link_latency_us);
      const double network_us =
          LinkUs(traffic.network_sent[r], traffic.network_received[r], row_bytes,
                 cluster.network_gb_per_s, cluster.network_latency_us);
      return static_cast<double>(std::min(num_ranks - 1, rows_out)) * cluster.message_us +
             std::max(node_us, network_us);
    };
    const int64_t sent = traffic.node_sent[r] + traffic.network_sent[r];
    const int64_t received = traffic.node_received[r] + traffic.network_received[r];
    time.dispatch_us = std::max(time.dispatch_us, exchange_us(cluster.dispatch_row_bytes, sent));
    time.combine_us = std::max(time.combine_us, exchange_us(cluster.combine_row_bytes, received));
  }
  return time;
}

double PredictCopiesUs(const ClusterModel& cluster, const Topology& topology,
                       std::span<const Move> moves) {
  // Per rank: experts sent and received within the node, sent and received between nodes.
  std::vector<std::array<int64_t, 4>> copies(topology.num_ranks());
  for (const Move& move : moves) {
    if (move.from_rank == Move::kFromFile) continue;  // no link carries it
    const int32_t to = topology.rank_of_slot(move.to_slot);
    const bool near = topology.node_of_rank[to] == topology.node_of_rank[move.from_rank];
    ++copies[move.from_rank][near ? 0 : 2];
    ++copies[to][near ? 1 : 3];
  }
  double us = 0.0;
  for (const auto& [sent, received, far_sent, far_received] : copies) {
    us = std::max({us,
                   LinkUs(sent, received, cluster.expert_bytes, cluster.link_gb_per_s,
                          cluster.link_latency_us),
                   LinkUs(far_sent, far_received, cluster.expert_bytes, cluster.network_gb_per_s,
                          cluster.network_latency_us)});
  }
  return us;
}

}  // namespace ballast
