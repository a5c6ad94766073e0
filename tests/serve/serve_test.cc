// What clients and operators see of a running server.
#include <signal.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <future>
#include <sstream>
#include <thread>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

using nlohmann::json;

constexpr int kTopK = 4;
constexpr int kMoeLayers = 4;
constexpr int kExperts = 32;

json Greedy(const std::string& prompt, int max_tokens) {
  return {{"prompt", prompt},
          {"max_tokens", max_tokens},
          {"temperature", 0},
          {"return_token_ids", true}};
}

// Tokens that went through the layers for an answer: the last one sampled does not.
int64_t TokensRun(const Answer& answer) {
  const json& usage = answer.json.at("usage");
  return usage.at("total_tokens").get<int64_t>() - (answer.finish() == "length" ? 1 : 0);
}

// The names in the first column of the table in docs/metrics.md.
std::vector<std::string> DocumentedMetrics() {
  std::vector<std::string> names;
  std::istringstream lines(ReadText(BALLAST_SOURCE_DIR "/docs/metrics.md"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("| `", 0) == 0) names.push_back(line.substr(3, line.find('`', 3) - 3));
  }
  return names;
}

TEST_CASE("a completion does what its fields say", "[serve][sanitized]") {
  Server server(2, {});
  const std::string prompt = "def main():\n";
  const Answer whole = server.Complete(Greedy(prompt, 24));
  INFO(whole.body);
  REQUIRE(whole.status == 200);
  REQUIRE(whole.json["object"] == "text_completion");
  REQUIRE(whole.json["model"] == "model");
  REQUIRE(whole.ids().size() == 24);
  REQUIRE(whole.finish() == "length");
  REQUIRE(whole.json["usage"]["completion_tokens"] == 24);

  SECTION("temperature 0 gives the same answer again") {
    REQUIRE(server.Complete(Greedy(prompt, 24)).ids() == whole.ids());
  }
  SECTION("token ids ask the same as the text they stand for") {
    json body = Greedy("", 24);
    body["prompt"] = json::array({0});  // a text begins with this token of the model
    for (const char c : prompt) body["prompt"].push_back(static_cast<unsigned char>(c));
    const Answer by_ids = server.Complete(body);
    REQUIRE(by_ids.ids() == whole.ids());
    REQUIRE(by_ids.text() == whole.text());
    REQUIRE(whole.json["usage"]["prompt_tokens"] == prompt.size() + 1);
  }
  SECTION("a stream carries the same text and tokens in parts") {
    Stream stream(server, Greedy(prompt, 24));
    REQUIRE(stream.status() == 200);
    stream.ReadAll();
    REQUIRE(stream.done());
    REQUIRE(stream.ids() == whole.ids());
    REQUIRE(stream.text() == whole.text());
    REQUIRE(stream.finish() == "length");
  }
  SECTION("a stop string ends the text before it") {
    const std::string text = whole.text();
    const auto next_character = [&](size_t at) {
      do ++at;
      while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80);
      return at;
    };
    const size_t begin = next_character(next_character(0));
    const std::string stop = text.substr(begin, next_character(begin) - begin);
    json body = Greedy(prompt, 24);
    body["stop"] = json::array({stop});
    const Answer stopped = server.Complete(body);
    REQUIRE(stopped.finish() == "stop");
    REQUIRE(stopped.text() == text.substr(0, text.find(stop)));
  }
  SECTION("a seed fixes what is sampled and another seed changes it") {
    json body = Greedy(prompt, 40);
    body["temperature"] = 1.5;
    body["seed"] = 7;
    const std::vector<int32_t> first = server.Complete(body).ids();
    REQUIRE_FALSE(first.empty());
    REQUIRE(server.Complete(body).ids() == first);
    body["seed"] = 8;
    REQUIRE(server.Complete(body).ids() != first);
  }
  SECTION("token ids are returned only when asked for") {
    json body = Greedy(prompt, 4);
    body.erase("return_token_ids");
    REQUIRE_FALSE(server.Complete(body).json["choices"][0].contains("token_ids"));
  }
}

TEST_CASE("models health and readiness are told", "[serve]") {
  Server server(2, {});
  const Answer models = server.Request("GET", "/v1/models");
  REQUIRE(models.status == 200);
  REQUIRE(models.json["data"][0]["id"] == "model");
  REQUIRE(server.Request("GET", "/healthz").status == 200);
  const Answer ready = server.Request("GET", "/readyz");
  REQUIRE(ready.status == 200);
  REQUIRE(ready.json["status"] == "ready");
  REQUIRE(server.Request("GET", "/v1/nothing").status == 404);
  const Answer wrong_method = server.Request("GET", "/v1/completions");
  REQUIRE(wrong_method.status == 405);
  REQUIRE(wrong_method.headers.at("allow") == "POST");
  REQUIRE(server.Stop() == 0);
}

TEST_CASE("a forced rebalance copies experts and all ranks agree on the epoch",
          "[serve][sanitized]") {
  constexpr int kRanks = 4;
  constexpr int kSlots = 10;
  Server server(kRanks, {"--policy", "eplb", "--slots-per-rank", std::to_string(kSlots)});
  // Placement of before any traffic.
  const Answer before = server.Request("GET", "/v1/placement");
  INFO(before.body.substr(0, 400));
  REQUIRE(before.status == 200);
  const int64_t epoch = before.json.at("epoch").get<int64_t>();
  const auto check = [&](const json& placement) {
    REQUIRE(placement.at("replicas").size() == kMoeLayers);
    for (const json& layer : placement.at("replicas")) {
      REQUIRE(layer.size() == kExperts);
      int held = 0;
      for (const json& count : layer) {
        REQUIRE(count.get<int>() >= 1);
        held += count.get<int>();
      }
      REQUIRE(held <= kRanks * kSlots);
    }
  };
  check(before.json);

  const std::vector<Answer> answers = CompleteAll(server, MixedRequests(24, 24), 8);
  for (const Answer& answer : answers) REQUIRE(answer.status == 200);
  const int64_t epoch_before = server.Epoch();
  const Answer forced = server.Request("POST", "/v1/rebalance");
  INFO(forced.body);
  REQUIRE(forced.status == 200);
  REQUIRE(forced.json.at("planned") == true);
  const int copies = forced.json.at("copies").get<int>();
  REQUIRE(copies > 0);
  REQUIRE(epoch_before >= epoch);

  REQUIRE(server.AwaitMetric("ballast_placement_epoch", kRanks * (epoch_before + 1.0)));
  for (int rank = 0; rank < kRanks; ++rank) {
    REQUIRE(server.Metrics(rank).Sum("ballast_placement_epoch") == epoch_before + 1);
  }
  // The leader's answer follows the ranks' own view by a moment.
  for (int i = 0; i < 100 && server.Epoch() == epoch_before; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  REQUIRE(server.Epoch() == epoch_before + 1);
  REQUIRE(server.MetricSum("ballast_expert_copies_total", {R"(result="applied")"}) >= copies);
  REQUIRE(server.MetricSum("ballast_expert_copy_bytes_total") > 0);
  REQUIRE(server.Metrics(0).Sum("ballast_rebalances_total",
                                {R"(result="applied")", R"(trigger="manual")"}) == 1);
  const Answer after = server.Request("GET", "/v1/placement");
  check(after.json);
  REQUIRE(after.json.at("replicas") != before.json.at("replicas"));
}

TEST_CASE("the metrics count every token request and copy", "[serve][sanitized]") {
  constexpr int kRanks = 4;
  Server server(kRanks, {"--rebalance-every", "20"});
  const std::vector<Answer> answers = CompleteAll(server, MixedRequests(32, 32), 8);
  int64_t tokens = 0, generated = 0, prompts = 0;
  for (const Answer& answer : answers) {
    REQUIRE(answer.status == 200);
    tokens += TokensRun(answer);
    generated += answer.json.at("usage").at("completion_tokens").get<int64_t>();
    prompts += answer.json.at("usage").at("prompt_tokens").get<int64_t>();
  }
  REQUIRE(server.AwaitMetric("ballast_tokens_routed_total", static_cast<double>(tokens)));
  REQUIRE(server.MetricSum("ballast_tokens_routed_total", {R"(phase="prefill")"}) <= prompts);
  REQUIRE(server.AwaitMetric("ballast_tokens_generated_total", static_cast<double>(generated)));
  for (int layer = 0; layer < kMoeLayers; ++layer) {
    const std::string label = "layer=\"" + std::to_string(layer) + "\"";
    INFO(label);
    REQUIRE(server.AwaitMetric("ballast_layer_tokens_total", static_cast<double>(tokens) * kTopK,
                               {label}));
  }
  REQUIRE(server.AwaitMetric("ballast_requests_total", static_cast<double>(answers.size()),
                             {R"(result="ok")"}));
  REQUIRE(server.AwaitMetric("ballast_sequences_running", 0));
  REQUIRE(server.AwaitMetric("ballast_queue_depth", 0));
  REQUIRE(server.AwaitMetric("ballast_kv_bytes_used", 0));

  const std::vector<std::string> names = DocumentedMetrics();
  REQUIRE(names.size() > 20);
  TempDir dir;
  for (int rank = 0; rank < kRanks; ++rank) {
    const Scrape scrape = server.Metrics(rank);
    INFO(scrape.text);
    REQUIRE(scrape.valid);
    for (const std::string& name : names) {
      INFO(name << " on rank " << rank);
      const bool leader_only = name == "ballast_hot_expert_share_ratio";
      if (leader_only && rank > 0) continue;
      REQUIRE(scrape.Count(name) + scrape.Count(name + "_bucket") > 0);
    }
    REQUIRE(scrape.Sum("ballast_build_info") == 1);
    REQUIRE(scrape.Sum("ballast_step_duration_seconds_count") > 0);
    REQUIRE(scrape.Sum("ballast_step_duration_seconds_sum") > 0);
    REQUIRE(scrape.Sum("process_resident_memory_bytes") > 1e6);
    REQUIRE(scrape.Sum("process_open_fds") > 3);
    REQUIRE(scrape.Sum("ballast_imbalance_ratio") >= kMoeLayers);
    if (std::filesystem::exists("/usr/bin/promtool")) {
      PutText(dir / "metrics", scrape.text);
      Process promtool({"bash", "-c", "promtool check metrics < " + (dir / "metrics")}, {},
                       dir / "out", dir / "out");
      INFO(ReadText(dir / "out"));
      REQUIRE(promtool.Wait(20'000) == 0);
    }
  }
}

TEST_CASE("clients that stream at once get what each gets alone", "[serve][sanitized]") {
  Server server(2, {"--rebalance-every", "20"});
  const json first = Greedy("The quick brown fox", 120);
  json second = Greedy("{\"name\": \"", 150);
  second["temperature"] = 1;
  second["seed"] = 5;
  const std::vector<int32_t> first_alone = server.Complete(first).ids();
  const std::vector<int32_t> second_alone = server.Complete(second).ids();
  REQUIRE_FALSE(first_alone.empty());
  REQUIRE_FALSE(second_alone.empty());
  for (int round = 0; round < 3; ++round) {
    Stream a(server, first), b(server, second);
    bool a_runs = true, b_runs = true;
    while (a_runs || b_runs) {
      a_runs = a_runs && !a.Next().is_discarded();
      b_runs = b_runs && !b.Next().is_discarded();
    }
    REQUIRE(a.done());
    REQUIRE(b.done());
    REQUIRE(a.ids() == first_alone);
    REQUIRE(b.ids() == second_alone);
  }
}

TEST_CASE("a client that goes away frees its sequence", "[serve][sanitized]") {
  Server server(2, {});
  {
    Stream stream(server, Greedy("Once upon a time", 1000));
    REQUIRE(stream.status() == 200);
    REQUIRE(stream.Next().is_object());
    stream.Close();
  }
  INFO(server.Metrics(0).text);
  REQUIRE(server.AwaitMetric("ballast_requests_total", 1, {R"(result="cancelled")"}));
  REQUIRE(server.AwaitMetric("ballast_sequences_running", 0));
  REQUIRE(server.AwaitMetric("ballast_kv_bytes_used", 0));
  REQUIRE(server.MetricSum("ballast_tokens_generated_total") < 1000);
}

TEST_CASE("told to stop the server ends what runs and refuses what is new", "[serve]") {
  const int ranks = GENERATE(1, 2, 4);
  INFO(ranks << " ranks");
  Server server(ranks, {});
  constexpr int kStreams = 6;
  const auto request = [](int i) {
    json body = Greedy("Stream number " + std::to_string(i) + ": ", 500);
    body["seed"] = i;
    return body;
  };
  std::vector<std::vector<int32_t>> alone;
  for (int i = 0; i < kStreams; ++i) alone.push_back(server.Complete(request(i)).ids());
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.push_back(std::make_unique<Stream>(server, request(i)));
    REQUIRE(streams.back()->status() == 200);
    REQUIRE(streams.back()->Next().is_object());
  }
  kill(server.leader_pid(), SIGTERM);
  // The server hears it a moment later; until then it may admit a request, which then ends.
  Answer late;
  for (int i = 0; i < 50 && late.status != 503; ++i) {
    late = server.Complete(Greedy("late", 1));
    REQUIRE((late.status == 200 || late.status == 503));
  }
  INFO(late.body);
  REQUIRE(late.status == 503);
  REQUIRE(late.headers.count("retry-after") == 1);
  for (int i = 0; i < kStreams; ++i) {
    streams[static_cast<size_t>(i)]->ReadAll();
    REQUIRE(streams[static_cast<size_t>(i)]->done());
    REQUIRE(streams[static_cast<size_t>(i)]->ids() == alone[static_cast<size_t>(i)]);
  }
  const std::optional<int> code = server.mpirun().Wait(30'000);
  INFO(server.Log());
  REQUIRE(code == 0);  // mpirun's is 0 only when every rank's is
  REQUIRE(server.Log().find("stopped") != std::string::npos);
}

TEST_CASE("stopping mpirun itself loses no request", "[serve]") {
  // 3 s instead of Open MPI's 1 s: mpirun waits that long before it tells the
  // ranks and that long again before it kills them.
  Server server(2, {}, {{"BALLAST_TEST_SIGKILL_TIMEOUT", "3"}});
  const std::vector<int32_t> alone = server.Complete(Greedy("To be or not", 200)).ids();
  REQUIRE_FALSE(alone.empty());
  const std::vector<int32_t> long_alone = server.Complete(Greedy("To be or not", 900)).ids();
  // One request is under way when the stop comes.
  auto running =
      std::async(std::launch::async, [&] { return server.Complete(Greedy("To be or not", 900)); });
  REQUIRE(server.AwaitMetric("ballast_sequences_running", 1));
  kill(server.mpirun().pid(), SIGTERM);
  // Requests may go on being answered, one after the other, until mpirun tells the ranks; whatever
  // was admitted is answered in full.
  for (Answer answer;;) {
    answer = server.Complete(Greedy("To be or not", 200));
    if (answer.status != 200) {
      REQUIRE((answer.status == 503 || answer.status == 0));
      break;
    }
    REQUIRE(answer.ids() == alone);
  }
  const Answer long_answer = running.get();
  REQUIRE(long_answer.status == 200);
  REQUIRE(long_answer.ids() == long_alone);
  const std::optional<int> code = server.mpirun().Wait(30'000);
  INFO(server.Log());
  REQUIRE(code.has_value());
  REQUIRE(*code == 1);  // what Open MPI 4.1 returns after SIGTERM, whatever its ranks return
  REQUIRE(server.Log().find("serve: stopped") != std::string::npos);
}

TEST_CASE("requests that cannot be served say why", "[serve][sanitized]") {
  Server server(1, {});
  const auto refused = [&](const std::string& body, const std::string& param,
                           const std::string& part) {
    const Answer answer = server.Request("POST", "/v1/completions", body);
    INFO(body.substr(0, 200) << " -> " << answer.body);
    REQUIRE(answer.status == 400);
    const json& error = answer.json.at("error");
    REQUIRE(error.at("type") == "invalid_request_error");
    REQUIRE(error.at("param") == param);
    REQUIRE(error.at("message").get<std::string>().find(part) != std::string::npos);
  };
  refused("{\"prompt\": ", "body", "invalid JSON at byte");
  refused("[1]", "body", "JSON object");
  refused(R"({"prompt":"a","colour":1})", "colour", "unknown field");
  refused(R"({})", "prompt", "missing");
  refused(R"({"prompt":[]})", "prompt", "empty");
  refused(R"({"prompt":7})", "prompt", "7 is not allowed");
  refused(R"({"prompt":[1,"a"]})", "prompt", "index 1");
  refused(R"({"prompt":[1,256]})", "prompt", "0 to 255");
  refused(R"({"prompt":[-1]})", "prompt", "-1");
  refused(R"({"prompt":"a","max_tokens":"many"})", "max_tokens", "\"many\"");
  refused(R"({"prompt":"a","max_tokens":0})", "max_tokens", "at least 1");
  refused(R"({"prompt":"a","temperature":3})", "temperature", "0 to 2");
  refused(R"({"prompt":"a","temperature":"hot"})", "temperature", "\"hot\"");
  refused(R"({"prompt":"a","stream":1})", "stream", "true or false");
  refused(json{{"prompt", std::string(1023, 'x')}}.dump(), "prompt", "1024 tokens; at most 1023");
  REQUIRE(server.Complete({{"prompt", std::string(1022, 'x')}, {"max_tokens", 5}}).status == 200);

  const Answer other = server.Complete({{"prompt", "a"}, {"model", "other"}});
  REQUIRE(other.status == 404);
  REQUIRE(other.json["error"]["code"] == "model_not_found");
  const Answer large =
      server.Request("POST", "/v1/completions", json{{"prompt", std::string(5 << 20, 'x')}}.dump());
  REQUIRE((large.status == 413 || large.status == 0));  // 0: it hung up while we still sent
  auto announcer = HttpClient::Connect("127.0.0.1", server.port(), 20'000);
  REQUIRE(announcer.ok());
  REQUIRE(announcer
              ->Send("POST /v1/completions HTTP/1.1\r\nHost: ballast\r\nContent-Length: "
                     "5000000\r\n\r\n")
              .ok());
  const auto head = announcer->Receive();
  REQUIRE(head.ok());
  REQUIRE(head->status == 413);
  REQUIRE(head->body.find("4194304") != std::string::npos);
  REQUIRE(server.Complete({{"prompt", "a"}, {"max_tokens", 1}}).status == 200);
}

TEST_CASE("a full queue is refused with a time to come back", "[serve]") {
  Server server(2, {"--max-queue", "2"});
  Stream first(server, Greedy("One", 1000)), second(server, Greedy("Two", 1000));
  REQUIRE(first.Next().is_object());
  REQUIRE(second.Next().is_object());
  const Answer third = server.Complete(Greedy("Three", 4));
  INFO(third.body);
  REQUIRE(third.status == 429);
  REQUIRE(third.headers.at("retry-after") == "1");
  REQUIRE(third.json["error"]["code"] == "queue_full");
  REQUIRE(server.AwaitMetric("ballast_requests_total", 1, {R"(result="rejected")"}));
  first.ReadAll();
  second.ReadAll();
  REQUIRE(first.done());
  REQUIRE(second.done());
  REQUIRE(server.Complete(Greedy("Three", 4)).status == 200);
}

}  // namespace
}  // namespace ballast::testing
