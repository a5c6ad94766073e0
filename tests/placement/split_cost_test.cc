#include "placement/split_cost.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <string>

#include "base/npy.h"
#include "placement/split.h"
#include "placement/trace.h"
#include "tests/placement/random_instances.h"
#include "tests/placement/split_check.h"
#include "tests/support/traces.h"

namespace ballast {
namespace {

using Catch::Matchers::Contains;
using testing::BrokenQuotas;
using testing::RandomPlacement;
using testing::RandomRow;
using testing::RandomTopology;

// The time of the slowest rank, from the formula of the contract in floating point.
double SlowestUs(const CostConstants& c, const LayerHosts& hosts, std::span<const int32_t> quota) {
  double slowest = 0.0;
  for (int32_t r = 0; r < hosts.num_ranks; ++r) {
    int32_t near = 0;
    for (int32_t s = 0; s < hosts.num_ranks; ++s) {
      near += s != r && hosts.node_of_rank[s] == hosts.node_of_rank[r];
    }
    double us = c.message_us * (hosts.num_ranks - 1);
    for (size_t h = 0; h < quota.size(); ++h) {
      if (hosts.host_rank[h] != r || quota[h] == 0) continue;
      const double speed = c.speed.empty() ? 1.0 : c.speed[r];
      us += std::max(c.expert_read_us, quota[h] * c.token_us) / speed;
      us += quota[h] * c.link_us_per_token * near / hosts.num_ranks;
      us += quota[h] * c.network_us_per_token * (hosts.num_ranks - 1 - near) / hosts.num_ranks;
    }
    slowest = std::max(slowest, us);
  }
  return slowest;
}

// The least time of the slowest rank over all quotas in whole rows, by trying every one of them.
class Enumeration {
 public:
  Enumeration(const CostModel& model, const LayerHosts& hosts, std::span<const int32_t> demand)
      : model_(model), hosts_(hosts), demand_(demand), time_(hosts.num_ranks, model.base()) {}

  double LeastUs() {
    Try(0, 0, demand_[0]);
    return static_cast<double>(best_) / kTicksPerUs;
  }

 private:
  void Try(int32_t expert, int32_t host, int32_t left) {
    if (host == hosts_.host_offsets[expert + 1] - 1) {  // the last takes what is left
      const int32_t rank = hosts_.host_rank[host];
      const int64_t before = time_[rank];
      time_[rank] += model_.on(rank).Of(left);
      if (expert + 1 < hosts_.num_experts) {
        Try(expert + 1, host + 1, demand_[expert + 1]);
      } else {
        best_ = std::min(best_, *std::max_element(time_.begin(), time_.end()));
      }
      time_[rank] = before;
      return;
    }
    const int32_t rank = hosts_.host_rank[host];
    const int64_t before = time_[rank];
    for (int32_t rows = 0; rows <= left; ++rows) {
      time_[rank] = before + model_.on(rank).Of(rows);
      Try(expert, host + 1, left - rows);
    }
    time_[rank] = before;
  }

  const CostModel& model_;
  const LayerHosts& hosts_;
  std::span<const int32_t> demand_;
  std::vector<int64_t> time_;
  int64_t best_ = INT64_MAX;
};

double UsOf(const CostSplitter& splitter, const LayerHosts& hosts, const Split& split) {
  return splitter.model().LargestUs(split.quota, hosts.host_rank);
}

// The three predicted times of one batch.
struct Times {
  double exact, activated, cost;
};
Times TimesOf(CostSplitter* splitter, const LayerHosts& hosts, std::span<const int32_t> demand,
              Split* split) {
  Times times{};
  ExactSplitter(hosts).Run(demand, split);
  times.exact = UsOf(*splitter, hosts, *split);
  splitter->RunActivated(demand, split);
  times.activated = UsOf(*splitter, hosts, *split);
  splitter->Run(demand, split);
  times.cost = UsOf(*splitter, hosts, *split);
  return times;
}

// Constants of one of six kinds, from reads alone to products alone, with links and with speeds.
CostConstants DrawConstants(Random* random, int32_t num_ranks) {
  CostConstants c{.expert_read_us = 4.0,
                  .token_us = 1.0,
                  .link_us_per_token = 0.0,
                  .network_us_per_token = 0.0};
  const uint32_t kind = random->Below(6);
  if (kind == 0) c.token_us = 0.0;
  if (kind == 1) c.expert_read_us = 0.0;
  if (kind >= 4) c.link_us_per_token = 0.25, c.network_us_per_token = 0.5;
  for (int32_t r = 0; kind % 2 == 1 && r < num_ranks; ++r) {
    c.speed.push_back(random->Below(3) == 0 ? 0.5 : 1.0);
  }
  return c;
}

TEST_CASE("the predicted time of a rank is the one on paper", "[placement][cost]") {
  // Ranks 0 and 1 on node 0, rank 2 on node 1. Expert 0 on all, expert 1 on rank 0.
  const Topology topology{.slot_offsets = {0, 2, 3, 4}, .node_of_rank = {0, 0, 1}};
  const auto placement = Placement::Create(1, 2, topology, {0, 1, 0, 0}, 0);
  REQUIRE(placement.ok());
  const LayerHosts& hosts = placement->hosts(0);
  const CostConstants constants{.expert_read_us = 10.0,
                                .token_us = 1.0,
                                .link_us_per_token = 3.0,
                                .network_us_per_token = 6.0,
                                .message_us = 0.5,
                                .speed = {1.0, 2.0, 0.5}};
  const CostModel model(constants, hosts);
  std::vector<int64_t> ticks(3);
  model.RankTicks(std::vector<int32_t>{6, 20, 0, 12}, hosts.host_rank, ticks);
  // Rank 0: 1 + 10 (read) + 12 (compute) + 18 rows * (3 * 1 + 6 * 1) / 3
  REQUIRE(ticks[0] == 77 * 65536);
  REQUIRE(ticks[1] == (1 + 10 + 20 * 3) * 65536);  // twice as fast
  REQUIRE(ticks[2] == 1 * 65536);                  // nothing is active there
  REQUIRE(model.LargestUs(std::vector<int32_t>{6, 20, 0, 12}, hosts.host_rank) == 77.0);
}

TEST_CASE("few rows are concentrated and many are balanced", "[placement][cost]") {
  // Two ranks that both hold both experts.
  const auto placement = Placement::Create(1, 2, Topology::Uniform(2, 2), {0, 1, 0, 1}, 0);
  REQUIRE(placement.ok());
  CostSplitter splitter(placement->hosts(0), {.link_us_per_token = 0.0});
  Split split;
  splitter.Run(std::vector<int32_t>{8, 6}, &split);  // each expert is read once
  REQUIRE(UsOf(splitter, placement->hosts(0), split) == Approx(9.2).margin(1e-4));
  splitter.Run(std::vector<int32_t>{4000, 1000}, &split);
  REQUIRE(split.largest_load == 2500);
}

TEST_CASE("the cost split is never worse than both pure splits and near the optimum",
          "[placement][cost][property]") {
  Random random(11);
  int instances = 0, optimal = 0;
  double worst = 1.0, sum = 0.0;
  while (instances < 1500) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 4), 1);
    const LayerHosts& hosts = placement.hosts(0);
    if (hosts.num_experts > 5 || hosts.host_rank.size() > 10) continue;
    std::vector<int32_t> demand;
    for (int32_t e = 0; e < hosts.num_experts; ++e) demand.push_back(random.Below(9));
    const CostConstants constants = DrawConstants(&random, hosts.num_ranks);
    CostSplitter splitter(hosts, constants);
    Split split;
    const Times times = TimesOf(&splitter, hosts, demand, &split);
    CAPTURE(instances, times.exact, times.activated, times.cost);
    REQUIRE(BrokenQuotas(hosts, std::vector<int64_t>(demand.begin(), demand.end()), split) == "");
    REQUIRE(times.cost <= std::min(times.exact, times.activated));
    REQUIRE(times.cost == Approx(SlowestUs(constants, hosts, split.quota)).epsilon(1e-4));
    const double least = Enumeration(splitter.model(), hosts, demand).LeastUs();
    REQUIRE(times.cost >= least);
    const double ratio = least == 0.0 ? 1.0 : times.cost / least;
    optimal += ratio == 1.0;
    worst = std::max(worst, ratio);
    sum += ratio;
    ++instances;
  }
  std::cout << "cost split against all quotas: " << optimal << " of " << instances
            << " optimal, mean ratio " << sum / instances << ", worst " << worst << "\n";
  REQUIRE(optimal >= instances * 0.97);
  REQUIRE(sum / instances < 1.001);
  REQUIRE(worst < 1.2);
}

// Rows per expert of `rows` draws from Zipf shares in random order.
std::vector<int32_t> DrawDemand(Random* random, int32_t num_experts, int32_t rows) {
  std::vector<double> edge(num_experts);
  for (int32_t i = 0; i < num_experts; ++i) edge[i] = 1.0 / (1 + random->Below(num_experts));
  for (int32_t i = 1; i < num_experts; ++i) edge[i] += edge[i - 1];
  std::vector<int32_t> demand(num_experts, 0);
  for (int32_t j = 0; j < rows; ++j) {
    const double at = random->Uniform() * edge.back();
    ++demand[std::lower_bound(edge.begin(), edge.end() - 1, at) - edge.begin()];
  }
  return demand;
}

TEST_CASE("the cost split of many rows is the exact split's where products dominate",
          "[placement][cost][property]") {
  Random random(12);
  for (int i = 0; i < 300; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 12), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const std::vector<int32_t> demand = DrawDemand(&random, hosts.num_experts, 5000);
    CostSplitter splitter(
        hosts, {.expert_read_us = 0.0, .link_us_per_token = 0.0, .network_us_per_token = 0.0});
    Split exact, cost;
    ExactSplitter(hosts).Run(demand, &exact);
    splitter.Run(demand, &cost);
    CAPTURE(i);
    REQUIRE(cost.largest_load == exact.largest_load);
  }
}

TEST_CASE("the cost split of many rows is balanced by speed", "[placement][cost][property]") {
  Random random(13);
  for (int i = 0; i < 300; ++i) {
    const Placement placement = RandomPlacement(&random, RandomTopology(&random, 6), 1);
    const LayerHosts& hosts = placement.hosts(0);
    const std::vector<int32_t> demand = DrawDemand(&random, hosts.num_experts, 5000);
    CostConstants constants{.expert_read_us = 0.0,
                            .token_us = 1.0,
                            .link_us_per_token = 0.0,
                            .network_us_per_token = 0.0};
    for (int32_t r = 0; r < hosts.num_ranks; ++r) {
      constants.speed.push_back(r % 3 == 0 ? 0.5 : 1.0);
    }
    CostSplitter splitter(hosts, constants);
    Split split;
    splitter.Run(demand, &split);
    // No fractional split is below: max over rank sets of demand only inside / speed inside.
    double bound = 0.0;
    for (uint32_t set = 1; set < (1u << hosts.num_ranks); ++set) {
      double rows = 0.0, speed = 0.0;
      for (int32_t r = 0; r < hosts.num_ranks; ++r) {
        if (set >> r & 1) speed += constants.speed[r];
      }
      for (int32_t e = 0; e < hosts.num_experts; ++e) {
        bool inside = true;
        for (int32_t h = hosts.host_offsets[e]; h < hosts.host_offsets[e + 1]; ++h) {
          inside = inside && (set >> hosts.host_rank[h] & 1) != 0;
        }
        if (inside) rows += demand[e];
      }
      bound = std::max(bound, rows / speed);
    }
    const double us = UsOf(splitter, hosts, split);
    CAPTURE(i, us, bound);
    REQUIRE(us >= bound - 1e-9);
    REQUIRE(us <= bound + 2.0);  // a row of the slowest rank
  }
}

TEST_CASE("activated experts are balanced as matchings say", "[placement][cost]") {
  // Greedy puts expert 0 on rank 0; experts 1 and 2 have no other choice than to share it, unless
  // expert 0 makes way.
  const Topology topology{.slot_offsets = {0, 3, 5}, .node_of_rank = {0, 0}};
  const auto placement = Placement::Create(1, 4, topology, {0, 1, 2, 0, 3}, 0);
  REQUIRE(placement.ok());
  const LayerHosts& hosts = placement->hosts(0);
  CostSplitter splitter(hosts, {.expert_read_us = 5.0, .token_us = 0.001});
  Split split;
  splitter.RunActivated(std::vector<int32_t>{4, 1, 1, 0}, &split);
  REQUIRE(split.quota == std::vector<int32_t>{0, 4, 1, 1, 0});  // (0,0) (0,1) (1,0) (2,0) (3,1)
  splitter.RunActivated(std::vector<int32_t>{4, 1, 0, 1}, &split);
  REQUIRE(split.quota == std::vector<int32_t>{4, 0, 1, 0, 1});  // no rank is better: it stays
}

// Both pure splits and the cost split on batches of all sizes; the number of broken promises.
int64_t CheckBatches(const StepTrace& trace, const Placement& placement) {
  int64_t broken = 0;
  Split split;
  for (int32_t layer = 0; layer < trace.num_layers; ++layer) {
    const LayerHosts& hosts = placement.hosts(layer);
    CostSplitter splitter(hosts, {});
    for (int64_t step = 0; step < trace.num_steps(); ++step) {
      const Times times = TimesOf(&splitter, hosts, trace.layer(step, layer), &split);
      broken += times.cost > std::min(times.exact, times.activated);
    }
  }
  return broken;
}

TEST_CASE("the cost split is never worse at any batch size on drawn traffic",
          "[placement][cost][property]") {
  Random random(14);
  const Topology topology = Topology::Uniform(8, 9);
  for (int32_t rows = 6; rows <= 6 * 16384; rows *= 2) {
    StepTrace trace{.num_layers = 1,
                    .num_experts = 64,
                    .step_tokens = rows,
                    .phase_offsets = {0, 8},
                    .phase_names = {"drawn"}};
    for (int step = 0; step < 8; ++step) {
      const std::vector<int32_t> demand = DrawDemand(&random, 64, rows);
      trace.counts.insert(trace.counts.end(), demand.begin(), demand.end());
    }
    const auto placement = Placement::Create(1, 64, topology, RandomRow(&random, 72, 64), 0);
    REQUIRE(placement.ok());
    CAPTURE(rows);
    REQUIRE(CheckBatches(trace, *placement) == 0);
  }
}

TEST_CASE("the cost split is never worse at any batch size on the recorded traces",
          "[placement][cost][golden]") {
  const char* folder = testing::TracesFolder();
  if (folder == nullptr) return;
  for (const char* task : {"intent", "law", "summary"}) {
    const std::string path = std::string(folder) + "/esft_deepseek_v2_lite/ids_" + task + ".npy";
    auto array = ReadNpy(path);
    REQUIRE(array.ok());
    const NamedArray phase{.name = path, .array = *std::move(array)};
    const auto placement = Placement::Contiguous(26, 64, Topology::Uniform(8, 9), true);
    REQUIRE(placement.ok());
    for (int64_t tokens : {4, 64, 512, 4096}) {
      const auto trace =
          CountSteps(std::span(&phase, 1), {.step_tokens = tokens, .num_experts = 64});
      REQUIRE(trace.ok());
      CAPTURE(path, tokens);
      REQUIRE(CheckBatches(*trace, *placement) == 0);
    }
  }
}

TEST_CASE("constants are read by name and bad ones are refused by name and value",
          "[placement][cost][errors]") {
  const auto read = CostConstantsFromJson(
      "c.json",
      R"({"expert_read_us": 30, "token_us": null, "row_block": 16, "block_us": 8,
          "link_us_per_token": 2, "copy_us": null, "speed": [1, 0.5]} // measured)",
      2);
  REQUIRE(read.ok());
  REQUIRE(read->expert_read_us == 30.0);
  REQUIRE(read->token_us == 0.5);
  REQUIRE(read->network_us_per_token == 2.0);
  REQUIRE(read->message_us == 0.0);
  REQUIRE(read->speed == std::vector<double>{1.0, 0.5});
  for (const auto& [text, part] :
       {std::pair(R"([1])", "not a JSON object"),
        std::pair(R"({"token_us": )", "not a JSON object"),
        std::pair(R"({"token_us": "1"})", "token_us is \"1\", allowed: a number or null"),
        std::pair(R"({"token_us": -1})", "token_us is -1, allowed: 0 to 1000"),
        std::pair(R"({"token_us": 1, "message_us": 1e9})", "message_us is 1e+09, allowed: 0 to"),
        std::pair(R"({"token": 1})", "unknown key \"token\", allowed: expert_read_us, token_us"),
        std::pair(R"({"link_us_per_token": 1})", "allowed: one of them above 0"),
        std::pair(R"({"token_us": 1, "row_block": 0})", "row_block is 0, allowed: 1 to 65536"),
        std::pair(R"({"token_us": 1, "speed": [1]})", "speed has 1 numbers, allowed: none or"),
        std::pair(R"({"token_us": 1, "speed": [1, 0]})", "speed of rank 1 is 0, allowed: 0.06"),
        std::pair(R"({"token_us": 1, "speed": 2})", "speed is 2, allowed: a list")}) {
    const absl::Status status = CostConstantsFromJson("c.json", text, 2).status();
    REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
    REQUIRE_THAT(std::string(status.message()), Contains("c.json: ") && Contains(part));
  }
}

}  // namespace
}  // namespace ballast
