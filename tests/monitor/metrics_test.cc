#include "monitor/metrics.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <map>
#include <sstream>

#include "monitor/load_window.h"

namespace ballast {
namespace {

std::unique_ptr<RankMetrics> Make() {
  auto metrics = RankMetrics::Create({.rank = 3,
                                      .node = "a",
                                      .backend = "cpu",
                                      .version = "0.1.0",
                                      .commit = "abc",
                                      .model = "tiny \"quoted\"",
                                      .num_layers = 2,
                                      .num_experts = 8,
                                      .top_k = 2,
                                      .num_ranks = 5});
  REQUIRE(metrics.ok());
  return *std::move(metrics);
}

std::string Scrape(const RankMetrics& metrics) {
  auto text = metrics.Render();
  REQUIRE(text.ok());
  return *text;
}

bool Has(const std::string& text, const std::string& line) {
  return ("\n" + text).find("\n" + line + "\n") != std::string::npos;
}

// Metric name to type, from the TYPE lines of a scrape.
std::map<std::string, std::string> TypesIn(const std::string& text) {
  std::map<std::string, std::string> types;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string hash, keyword, name, type;
    if (words >> hash >> keyword >> name >> type && hash == "#" && keyword == "TYPE") {
      REQUIRE(types.emplace(name, type).second);  // one family, one block
    }
  }
  return types;
}

// The same from the rows `| `name` | type | ...` of docs/metrics.md.
std::map<std::string, std::string> TypesInDocs() {
  std::map<std::string, std::string> types;
  std::ifstream file(BALLAST_SOURCE_DIR "/docs/metrics.md");
  REQUIRE(file.good());
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string bar, name, second_bar, type;
    words >> bar >> name >> second_bar >> type;
    if (bar == "|" && name.size() > 2 && name.front() == '`') {
      types[name.substr(1, name.size() - 2)] = type;
    }
  }
  return types;
}

TEST_CASE("the documented metrics are those of a scrape", "[monitor][metrics]") {
  const auto metrics = Make();
  metrics->SetHotExperts({{0, 1, 0.5}});
  REQUIRE(TypesIn(Scrape(*metrics)) == TypesInDocs());
}

TEST_CASE("every bounded combination of labels exists before the first event",
          "[monitor][metrics]") {
  const std::string text = Scrape(*Make());
  for (const char* line :
       {"ballast_tokens_routed_total{rank=\"3\",phase=\"prefill\"} 0",
        "ballast_tokens_routed_total{rank=\"3\",phase=\"decode\"} 0",
        "ballast_layer_tokens_total{rank=\"3\",layer=\"0\"} 0",
        "ballast_layer_tokens_total{rank=\"3\",layer=\"1\"} 0",
        "ballast_expert_copies_total{rank=\"3\",result=\"applied\"} 0",
        "ballast_expert_copies_total{rank=\"3\",result=\"failed\"} 0",
        "ballast_rebalances_total{rank=\"3\",result=\"aborted\",trigger=\"manual\"} 0",
        "ballast_requests_total{rank=\"3\",result=\"cancelled\"} 0",
        "ballast_placement_epoch{rank=\"3\"} 0", "ballast_rank_serving{rank=\"3\"} 1",
        "ballast_ranks{rank=\"3\"} 5",
        "ballast_rank_info{rank=\"3\",backend=\"cpu\",node=\"a\"} 1"}) {
    INFO(line << "\n" << text);
    REQUIRE(Has(text, line));
  }
  REQUIRE(text.find("ballast_hot_expert_share_ratio") == std::string::npos);
  REQUIRE(text.find("model=\"tiny \\\"quoted\\\"\"") != std::string::npos);
}

TEST_CASE("events arrive in their metrics", "[monitor][metrics]") {
  const auto metrics = Make();
  const std::vector<int64_t> copies = {7, 5};
  metrics->OnStep({.prefill_tokens = 10,
                   .decode_tokens = 2,
                   .layer_copies = copies,
                   .seconds = 0.003,
                   .stall_seconds = 0.0002,
                   .to_node = {.steps = 100, .experts = 20},
                   .to_network = {.steps = 3, .experts = 4}});
  metrics->SetImbalance(std::vector<double>{1.5, 1.25});
  metrics->SetPlacementEpoch(4);
  metrics->OnExpertCopies(CopyResult::kFailed, 3, 4096);
  metrics->OnRebalance(RebalanceResult::kRejected, RebalanceTrigger::kFailure);
  metrics->OnRequest(RequestResult::kOk);
  metrics->OnTokensGenerated(6);
  metrics->SetQueueDepth(8);
  metrics->SetServing(false);
  metrics->SetSequencesRunning(9);
  metrics->SetKvBytesUsed(1024);
  metrics->SetHotExperts({{1, 5, 0.25}});
  const std::string text = Scrape(*metrics);
  for (const char* line :
       {"ballast_tokens_routed_total{rank=\"3\",phase=\"prefill\"} 10",
        "ballast_tokens_routed_total{rank=\"3\",phase=\"decode\"} 2",
        "ballast_layer_tokens_total{rank=\"3\",layer=\"1\"} 5",
        "ballast_imbalance_ratio{rank=\"3\",layer=\"0\"} 1.5",
        "ballast_placement_epoch{rank=\"3\"} 4",
        "ballast_expert_copies_total{rank=\"3\",result=\"failed\"} 3",
        "ballast_expert_copy_bytes_total{rank=\"3\"} 4096",
        "ballast_bytes_sent_total{rank=\"3\",link=\"node\",what=\"steps\"} 100",
        "ballast_bytes_sent_total{rank=\"3\",link=\"node\",what=\"experts\"} 20",
        "ballast_bytes_sent_total{rank=\"3\",link=\"network\",what=\"steps\"} 3",
        "ballast_bytes_sent_total{rank=\"3\",link=\"network\",what=\"experts\"} 4",
        "ballast_rebalances_total{rank=\"3\",result=\"rejected\",trigger=\"failure\"} 1",
        "ballast_requests_total{rank=\"3\",result=\"ok\"} 1",
        "ballast_tokens_generated_total{rank=\"3\"} 6",
        "ballast_queue_depth{rank=\"3\"} 8",
        "ballast_rank_serving{rank=\"3\"} 0",
        "ballast_sequences_running{rank=\"3\"} 9",
        "ballast_kv_bytes_used{rank=\"3\"} 1024",
        "ballast_hot_expert_share_ratio{rank=\"3\",layer=\"1\",expert=\"5\"} 0.25",
        "ballast_step_duration_seconds_count{rank=\"3\"} 1",
        "ballast_step_duration_seconds_bucket{rank=\"3\",le=\"0.002\"} 0",
        "ballast_step_duration_seconds_bucket{rank=\"3\",le=\"0.005\"} 1",
        "ballast_serving_stall_seconds_bucket{rank=\"3\",le=\"0.0003\"} 1"}) {
    INFO(line << "\n" << text);
    REQUIRE(Has(text, line));
  }
}

TEST_CASE("the process metrics say something", "[monitor][metrics]") {
  const std::string text = Scrape(*Make());
  for (const char* name : {"process_resident_memory_bytes", "process_open_fds",
                           "process_start_time_seconds", "process_cpu_seconds_total"}) {
    const std::string start = std::string("\n") + name + "{rank=\"3\"} ";
    const size_t at = text.find(start);
    INFO(name);
    REQUIRE(at != std::string::npos);
    REQUIRE(std::stod(text.substr(at + start.size())) > 0.0);
  }
}

TEST_CASE("a load window reports the imbalance of whole windows", "[monitor][window]") {
  LoadWindow window(2, 4, /*window_tokens=*/10);
  const std::vector<int64_t> first = {4, 0, 0, 0};
  const std::vector<int64_t> second = {0, 4, 4, 4};
  window.Add(0, first);
  REQUIRE_FALSE(window.EndStep(9));
  REQUIRE(window.imbalance()[0] == 1.0);
  window.Add(0, second);
  window.Add(1, first);
  REQUIRE(window.EndStep(1));
  REQUIRE(window.imbalance()[0] == 1.0);
  REQUIRE(window.imbalance()[1] == 4.0);
  window.Add(0, second);
  REQUIRE(window.EndStep(10));
  REQUIRE(window.imbalance()[0] == Approx(4.0 / 3.0));
  REQUIRE(window.imbalance()[1] == 1.0);
}

}  // namespace
}  // namespace ballast
