// What deploy/grafana/ shows must exist: names of metrics, ids, places on the screen.
#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "monitor/metrics.h"

namespace ballast {
namespace {

using Json = nlohmann::json;

Json ReadDashboard() {
  std::ifstream file(BALLAST_SOURCE_DIR "/deploy/grafana/dashboards/ballast-experts.json");
  REQUIRE(file.good());
  return Json::parse(file);
}

// Every name that a query may use: those of a scrape, with their suffixes and labels apart.
std::set<std::string> NamesInScrape() {
  RankMetricsOptions options;
  options.num_layers = 1;
  const auto metrics = RankMetrics::Create(options);
  REQUIRE(metrics.ok());
  (*metrics)->SetHotExperts({{0, 0, 1.0}});
  const auto text = (*metrics)->Render();
  REQUIRE(text.ok());
  std::set<std::string> names;
  const std::regex line("(^|\n)([a-z_]+)\\{");
  for (std::sregex_iterator it(text->begin(), text->end(), line), end; it != end; ++it) {
    names.insert((*it)[2]);
  }
  return names;
}

std::vector<std::string> QueriesOf(const Json& dashboard) {
  std::vector<std::string> queries;
  for (const Json& panel : dashboard["panels"]) {
    REQUIRE_FALSE(panel["targets"].empty());
    for (const Json& target : panel["targets"]) queries.push_back(target["expr"]);
  }
  for (const Json& annotation : dashboard["annotations"]["list"]) {
    queries.push_back(annotation["expr"]);
  }
  for (const Json& variable : dashboard["templating"]["list"]) {
    if (variable["type"] == "query") queries.push_back(variable["definition"]);
  }
  return queries;
}

TEST_CASE("the dashboard asks only for metrics that exist", "[monitor][deploy]") {
  const std::set<std::string> names = NamesInScrape();
  const std::regex metric("(ballast|process)_[a-z_]+");
  std::set<std::string> used;
  for (const std::string& query : QueriesOf(ReadDashboard())) {
    for (std::sregex_iterator it(query.begin(), query.end(), metric), end; it != end; ++it) {
      INFO(it->str() << " in " << query);
      REQUIRE(names.count(it->str()) == 1);
      used.insert(it->str());
    }
  }
  for (const char* wanted :
       {"ballast_layer_tokens_total", "ballast_imbalance_ratio", "ballast_hot_expert_share_ratio",
        "ballast_placement_epoch", "ballast_expert_copies_total",
        "ballast_serving_stall_seconds_bucket", "ballast_step_duration_seconds_bucket"}) {
    INFO(wanted);
    REQUIRE(used.count(wanted) == 1);
  }
}

TEST_CASE("the dashboard can be provisioned", "[monitor][deploy]") {
  const Json dashboard = ReadDashboard();
  REQUIRE(dashboard["uid"] == "ballast-experts");
  REQUIRE(dashboard["id"].is_null());
  REQUIRE(dashboard["schemaVersion"] == 39);
  REQUIRE_FALSE(dashboard.contains("__inputs"));
  REQUIRE(dashboard["templating"]["list"][0]["type"] == "datasource");
  std::set<int> ids;
  std::set<std::pair<int, int>> cells;
  for (const Json& panel : dashboard["panels"]) {
    INFO(panel["title"]);
    REQUIRE(ids.insert(panel["id"].get<int>()).second);
    REQUIRE(panel["datasource"]["uid"] == "${datasource}");
    const Json& at = panel["gridPos"];
    const int x = at["x"], y = at["y"], w = at["w"], h = at["h"];
    REQUIRE(x + w <= 24);
    for (int i = 0; i < w * h; ++i) REQUIRE(cells.insert({x + i % w, y + i / w}).second);
    std::set<std::string> ref_ids;
    for (const Json& target : panel["targets"]) {
      REQUIRE(ref_ids.insert(target["refId"].get<std::string>()).second);
    }
  }
}

}  // namespace
}  // namespace ballast
