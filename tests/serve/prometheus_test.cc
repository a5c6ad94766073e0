// Every query of the dashboards, put to a Prometheus that scrapes a live cluster.
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

constexpr char kPrometheus[] = "/usr/bin/prometheus";
constexpr int kRanks = 4;

std::string Replace(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string PercentEncode(const std::string& text) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string encoded;
  for (const unsigned char c : text) {
    encoded += {'%', kDigits[c >> 4], kDigits[c & 15]};
  }
  return encoded;
}

struct Query {
  std::string panel;
  std::string expression;
};

std::vector<Query> DashboardQueries() {
  std::vector<Query> queries;
  const auto add = [&](const std::string& panel, std::string expression) {
    for (const char* interval : {"$__rate_interval", "$__interval"}) {
      expression = Replace(expression, interval, "20s");
    }
    for (const char* variable : {"$job", "$rank", "$layer"}) {
      expression = Replace(expression, variable, ".*");
    }
    REQUIRE(expression.find('$') == std::string::npos);
    queries.push_back({panel, expression});
  };
  for (const auto& file :
       std::filesystem::directory_iterator(BALLAST_SOURCE_DIR "/deploy/grafana/dashboards")) {
    const json dashboard = json::parse(ReadText(file.path()));
    for (const json& panel : dashboard["panels"]) {
      for (const json& target : panel["targets"]) add(panel["title"], target["expr"]);
    }
    for (const json& annotation : dashboard["annotations"]["list"]) {
      add(annotation["name"], annotation["expr"]);
    }
  }
  return queries;
}

class Prometheus {
 public:
  explicit Prometheus(const Server& server) {
    // The job as it is shipped, but a scrape every second.
    std::string config = ReadText(BALLAST_SOURCE_DIR "/deploy/prometheus/prometheus.yml");
    config = Replace(config, "scrape_interval: 5s", "scrape_interval: 1s");
    config = Replace(config, "evaluation_interval: 5s", "evaluation_interval: 1s");
    REQUIRE(config.find("targets/*.json") != std::string::npos);
    PutText(dir_ / "prometheus.yml", config);
    PutText(dir_ / "rules.yml", ReadText(BALLAST_SOURCE_DIR "/deploy/prometheus/rules.yml"));
    json targets = json::array();
    for (const int port : server.metrics_ports()) {
      targets.push_back("127.0.0.1:" + std::to_string(port));
    }
    std::filesystem::create_directory(dir_ / "targets");
    PutText(dir_ / "targets/local.json",
              json::array({{{"targets", targets}, {"labels", {{"cluster", "local"}}}}}).dump());
    process_ = std::make_unique<Process>(
        std::vector<std::string>{kPrometheus, "--config.file=" + (dir_ / "prometheus.yml"),
                                 "--storage.tsdb.path=" + (dir_ / "data"),
                                 "--web.listen-address=127.0.0.1:" + std::to_string(kPort)},
        Environment{}, dir_ / "log", dir_ / "log");
  }
  std::string Log() const { return ReadText(dir_ / "log"); }
  bool Runs() { return !process_->Wait(0).has_value(); }

  // The answer to a query, or null.
  json Ask(const std::string& expression) const {
    auto client = HttpClient::Connect("127.0.0.1", kPort, 20'000);
    if (!client.ok()) return nullptr;
    const auto answer = client->Request("GET", "/api/v1/query?query=" + PercentEncode(expression));
    if (!answer.ok()) return nullptr;
    return json::parse(answer->body, nullptr, /*allow_exceptions=*/false);
  }

 private:
  static constexpr int kPort = 19'473;
  TempDir dir_;
  std::unique_ptr<Process> process_;
};

TEST_CASE("every panel of the dashboards has data from a live cluster", "[serve][prometheus]") {
  if (!std::filesystem::exists(kPrometheus)) {
    const char* required = std::getenv("BALLAST_REQUIRE_PROMETHEUS");
    REQUIRE((required == nullptr || std::string(required) != "1"));
    std::cout << "SKIPPED: " << kPrometheus << " is not installed (Debian package prometheus)\n";
    return;
  }
  Server server(kRanks, {"--rebalance-every", "20"});
  Prometheus prometheus(server);
  const std::vector<Query> queries = DashboardQueries();
  REQUIRE(queries.size() > 20);
  std::string missing;
  // Traffic goes on until every panel has something to show, or the time is over.
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  do {
    for (const Answer& answer : CompleteAll(server, MixedRequests(48, 64), 16)) {
      REQUIRE(answer.status == 200);
    }
    missing.clear();
    for (const Query& query : queries) {
      const json answer = prometheus.Ask(query.expression);
      if (answer.is_object() && answer.value("status", "") == "error") {
        FAIL(query.panel << ": " << query.expression << ": " << answer.dump());
      }
      if (!answer.is_object() || answer["data"]["result"].empty()) {
        missing += query.panel + ": " + query.expression + "\n";
      }
    }
  } while (!missing.empty() && std::chrono::steady_clock::now() < until);
  INFO(prometheus.Log());
  REQUIRE(prometheus.Runs());
  INFO("without data:\n" << missing);
  REQUIRE(missing.empty());
  // Not NaN, and as many ranks as there are.
  const json up = prometheus.Ask("sum(up{job=\"ballast\"})");
  REQUIRE(up["data"]["result"][0]["value"][1] == std::to_string(kRanks));
  for (const Query& query : queries) {
    INFO(query.panel << ": " << query.expression);
    for (const json& sample : prometheus.Ask(query.expression)["data"]["result"]) {
      REQUIRE(sample["value"][1] != "NaN");
    }
  }
}

}  // namespace
}  // namespace ballast::testing
