#include "placement/cluster_model.h"

#include <catch2/catch.hpp>

#include "absl/strings/str_replace.h"
#include "base/random.h"
#include "placement/replay.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;

constexpr char kCluster[] = R"({"ranks_per_node": 2, "link_gb_per_s": 100, "link_latency_us": 2,
  "network_gb_per_s": 10, "network_latency_us": 5, "message_us": 0.5, "dispatch_row_bytes": 1000,
  "combine_row_bytes": 2000, "expert_bytes": 1e6, "expert_read_us": 9, "token_us": 1,
  "background_share": 0.2})";

TEST_CASE("the parts of a layer take the times on paper", "[placement][cluster]") {
  const auto cluster = ClusterModel::FromJson("c.json", kCluster);
  REQUIRE(cluster.ok());
  // Hosts on ranks 0, 1, 1, 3. Rank 1 gets 300 rows of its node, rank 3 gets 100 of the other.
  const RowTraffic traffic{.node_sent = {300, 0, 0, 0},
                           .node_received = {0, 300, 0, 0},
                           .network_sent = {100, 0, 0, 0},
                           .network_received = {0, 0, 0, 100}};
  const std::vector<int32_t> host_rank = {0, 1, 1, 3};
  const LayerTime time =
      PredictLayer(*cluster, std::vector<int32_t>{0, 290, 10, 100}, host_rank, traffic);
  // Rank 0 sends to 3 others; its network is the slower link: 5 + 100 * 1 kB / 10 kB per us.
  REQUIRE(time.dispatch_us == Approx(3 * 0.5 + 5 + 10));
  REQUIRE(time.compute_us == Approx(290 + 10));
  REQUIRE(time.combine_us == Approx(3 * 0.5 + 5 + 20));  // rank 3 sends to at most 3 others
  const LayerTime small = PredictLayer(*cluster, std::vector<int32_t>{0, 4, 5, 0}, host_rank,
                                       {.node_sent = {9, 0, 0, 0},
                                        .node_received = {0, 9, 0, 0},
                                        .network_sent = {0, 0, 0, 0},
                                        .network_received = {0, 0, 0, 0}});
  REQUIRE(small.compute_us == Approx(18));  // two reads
  REQUIRE(small.dispatch_us == Approx(1.5 + 2 + 0.09));
  REQUIRE(small.us() == Approx(1.5 + 2 + 0.09 + 18 + 1.5 + 2 + 0.18));
}

TEST_CASE("copies take the time of the busiest rank and link", "[placement][cluster]") {
  const auto cluster = ClusterModel::FromJson("c.json", kCluster);
  REQUIRE(cluster.ok());
  const Topology topology = Topology::Uniform(4, 2, 2);
  const auto move = [](int32_t from, int32_t to_slot) {
    return Move{.layer = 0, .expert = 0, .from_rank = from, .to_slot = to_slot};
  };
  const std::vector<Move> near = {move(0, 2), move(0, 3), move(1, 0)};
  REQUIRE(PredictCopiesUs(*cluster, topology, near) == Approx(2 + 2 * 1e6 / 1e5));
  const std::vector<Move> far = {move(0, 2), move(0, 4), move(1, 6)};
  REQUIRE(PredictCopiesUs(*cluster, topology, far) == Approx(5 + 1e6 / 1e4));
  REQUIRE(PredictCopiesUs(*cluster, topology, {}) == 0.0);
}

TEST_CASE("a cluster gives the cost split its constants", "[placement][cluster]") {
  const auto cluster = ClusterModel::FromJson("c.json", kCluster);
  REQUIRE(cluster.ok());
  REQUIRE(cluster->constants().link_us_per_token == Approx(0.03));
  REQUIRE(cluster->constants().network_us_per_token == Approx(0.3));
  REQUIRE(CheckCostConstants(cluster->constants(), 4).ok());
}

TEST_CASE("a replay of 320 ranks and 61 layers of 384 experts predicts steps",
          "[placement][cluster]") {
  Random random(15);
  StepTrace trace{.num_layers = 61,
                  .num_experts = 384,
                  .step_tokens = 320 * 16,
                  .phase_offsets = {0, 1},
                  .phase_names = {"drawn"}};
  for (int i = 0; i < 61 * 384; ++i) {  // about 320 * 16 * 8 copies per layer, skewed
    trace.counts.push_back(
        static_cast<int32_t>(random.Below(8) == 0 ? random.Below(1000) : random.Below(90)));
  }
  ReplayOptions options;
  options.topology = Topology::Uniform(320, 2, 40);
  options.policies = {"never"};
  options.splits = {SplitMode::kExact, SplitMode::kCost, SplitMode::kEven};
  options.cluster = *ClusterModel::FromJson(
      "c.json", absl::StrReplaceAll(kCluster, {{"_node\": 2", "_node\": 8"}}));
  options.constants = options.cluster->constants();
  const auto result = Replay(trace, options);
  REQUIRE(result.ok());
  std::vector<double> step_us;
  for (const ReplayFigures& f : result->figures) {
    REQUIRE(f.predicted.has_value());
    REQUIRE(f.predicted->step_us_mean == Approx(61 * f.predicted->layer_us_mean));
    REQUIRE(f.predicted->compute_us_mean >= 61 * 9.0);
    step_us.push_back(f.predicted->step_us_mean);
  }
  REQUIRE(step_us[0] < step_us[2]);  // the exact split against the even one
}

TEST_CASE("bad cluster files are refused by file and key and value",
          "[placement][cluster][errors]") {
  const auto refused = [](const std::string& text, const std::string& part) {
    const absl::Status status = ClusterModel::FromJson("c.json", text).status();
    REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
    REQUIRE_THAT(std::string(status.message()), Contains("c.json: ") && Contains(part));
  };
  refused("[]", "not a JSON object");
  refused("{\"ranks_per_node\": ", "not a JSON object");
  for (const auto& [from, to, part] :
       {std::tuple("_node\": 2", "_node\": 0", "ranks_per_node is 0, allowed: 1 to 65536"),
        std::tuple("_node\": 2", "_node\": 2.5", "ranks_per_node is 2.5, allowed: 1 to"),
        std::tuple("\"token_us\"", "\"tokens_us\"", "unknown key \"tokens_us\", allowed: ranks"),
        std::tuple("\"token_us\": 1,", "", "token_us is null, allowed: 0 to 1000 us"),
        std::tuple("_s\": 100", "_s\": 0", "link_gb_per_s is 0, allowed: 0.5 to 100000 GB/s"),
        std::tuple("_s\": 100", "_s\": \"100\"", "link_gb_per_s is \"100\", allowed: "),
        std::tuple("_share\": 0.2", "_share\": 1", "background_share is 1, allowed: 0.01 to 0.9"),
        std::tuple("message_us\": 0.5", "message_us\": -1", "message_us is -1, allowed: 0 to")}) {
    refused(absl::StrReplaceAll(kCluster, {{from, to}}), part);
  }
}

}  // namespace
}  // namespace ballast
