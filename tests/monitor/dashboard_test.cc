// What deploy/grafana/ shows must exist: names of metrics, ids, places on the screen.
#include <algorithm>
#include <catch2/catch.hpp>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "monitor/metrics.h"

namespace ballast {
namespace {

using Json = nlohmann::json;

Json ReadDashboard() {
  std::ifstream file(BALLAST_SOURCE_DIR "/deploy/grafana/dashboards/ballast-experts.json");
  REQUIRE(file.good());
  return Json::parse(file);
}

// The metric names in a query or a scrape: words that start like one of ours.
std::set<std::string> MetricNamesIn(const std::string& text) {
  const std::string letters = "abcdefghijklmnopqrstuvwxyz_";
  std::set<std::string> names;
  for (size_t at = 0; (at = text.find_first_of(letters, at)) != std::string::npos;) {
    const size_t end = std::min(text.find_first_not_of(letters, at), text.size());
    const std::string word = text.substr(at, end - at);
    if (word.rfind("ballast_", 0) == 0 || word.rfind("process_", 0) == 0) names.insert(word);
    at = end;
  }
  return names;
}

// Every name that a query may use. Histograms count only with their suffixes.
std::set<std::string> NamesInScrape() {
  RankMetricsOptions options;
  options.num_layers = 1;
  const auto metrics = RankMetrics::Create(options);
  REQUIRE(metrics.ok());
  (*metrics)->SetHotExperts({{0, 0, 1.0}});
  const auto text = (*metrics)->Render();
  REQUIRE(text.ok());
  std::string samples;
  std::istringstream lines(*text);
  for (std::string line; std::getline(lines, line);) {
    if (line[0] != '#') samples += line.substr(0, line.find('{')) + "\n";
  }
  return MetricNamesIn(samples);
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
  std::set<std::string> used;
  for (const std::string& query : QueriesOf(ReadDashboard())) {
    for (const std::string& name : MetricNamesIn(query)) {
      INFO(name << " in " << query);
      REQUIRE(names.count(name) == 1);
      used.insert(name);
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
