#include "runtime/http_server.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <thread>

#include "deploy/http_client.h"
#include "tests/support/fake_ranks.h"

namespace ballast {
namespace {

using nlohmann::json;
using testing::Eventually;
using testing::FakeRanks;

// A server over ranks without a model.
struct Served {
  explicit Served(FakeRanks::Options rank_options = {.num_ranks = 2},
                  FrontendOptions frontend_options = {.max_pending = 64,
                                                      .request_timeout_ms = 60'000,
                                                      .context_tokens = 512,
                                                      .vocab_size = 256},
                  HttpServerOptions options = {.host = "127.0.0.1", .port = 0, .threads = 16},
                  Tokenizer tokenizer = Tokenizer::ByteLevel())
      : ranks(std::move(rank_options)) {
    auto created = Frontend::Create(frontend_options, ranks.TakeChannels(), nullptr);
    REQUIRE(created.ok());
    frontend = std::move(*created);
    auto started =
        HttpServer::Start(options, {.frontend = frontend.get(),
                                    .tokenizer = tokenizer,
                                    .model_name = "demo",
                                    .is_ready = [this] { return ready.load(); },
                                    .get = {{"/v1/placement",
                                             [] {
                                               return HttpReply{200, R"({"epoch":3})"};
                                             }}},
                                    .post = {{"/v1/rebalance", [](const std::string& body) {
                                                return HttpReply{202, json{{"got", body}}.dump()};
                                              }}}});
    REQUIRE(started.ok());
    server = std::move(*started);
  }

  HttpClient Connect() {
    auto client = HttpClient::Connect("127.0.0.1", server->port(), 20'000);
    REQUIRE(client.ok());
    return std::move(*client);
  }
  HttpResponse Post(const std::string& body, const std::string& path = "/v1/completions") {
    auto response = Connect().Request("POST", path, body);
    REQUIRE(response.ok());
    return *response;
  }
  HttpResponse Get(const std::string& path) {
    auto response = Connect().Request("GET", path);
    REQUIRE(response.ok());
    return *response;
  }

  FakeRanks ranks;
  std::atomic<bool> ready = true;
  std::unique_ptr<Frontend> frontend;
  std::unique_ptr<HttpServer> server;
};

std::string ErrorOf(const HttpResponse& response) {
  const json body = json::parse(response.body, nullptr, false);
  REQUIRE(body.is_object());
  REQUIRE(body["error"]["type"].is_string());
  REQUIRE(response.headers.at("content-type") == "application/json");
  return body["error"]["message"].get<std::string>();
}

// What the fake ranks answer to a text prompt.
std::string ExpectedText(const std::string& prompt, uint64_t seed, int tokens) {
  GenerationRequest request;
  request.prompt = *Tokenizer::ByteLevel().Encode(prompt);
  request.sampling.seed = seed;
  std::string text;
  for (int i = 0; i < tokens; ++i) text += static_cast<char>(FakeRanks::ReplyToken(request, i));
  return text;
}

// The data of each event of a stream.
std::vector<std::string> Events(const std::string& body) {
  std::vector<std::string> events;
  for (size_t at = 0; at < body.size();) {
    const size_t end = body.find("\n\n", at);
    REQUIRE(body.compare(at, 6, "data: ") == 0);
    REQUIRE(end != std::string::npos);
    events.push_back(body.substr(at + 6, end - at - 6));
    at = end + 2;
  }
  return events;
}

TEST_CASE("a completion is answered", "[runtime][unit]") {
  Served served;
  const HttpResponse response = served.Post(
      R"({"model":"demo","prompt":"Hello","max_tokens":12,"seed":5,"return_token_ids":true})");
  REQUIRE(response.status == 200);
  const json body = json::parse(response.body);
  const std::string text = ExpectedText("Hello", 5, 12);
  REQUIRE(body["choices"][0]["text"] == text);
  REQUIRE(body["choices"][0]["token_ids"] == json(std::vector<int>(text.begin(), text.end())));
  REQUIRE(body["choices"][0]["finish_reason"] == "length");
  REQUIRE(body["choices"][0]["logprobs"].is_null());
  REQUIRE(body["usage"] ==
          json{{"prompt_tokens", 6}, {"completion_tokens", 12}, {"total_tokens", 18}});
  REQUIRE(body["id"].get<std::string>().starts_with("cmpl-"));
  REQUIRE(body["object"] == "text_completion");
}

TEST_CASE("requests without a seed draw different ones", "[runtime][unit]") {
  Served served;
  const std::string body = R"({"prompt":"Hello","max_tokens":20})";
  REQUIRE(json::parse(served.Post(body).body)["choices"] !=
          json::parse(served.Post(body).body)["choices"]);
}

TEST_CASE("a stream shows the same text and ends with usage", "[runtime][unit]") {
  Served served;
  const HttpResponse response = served.Post(
      R"({"prompt":"Hello","max_tokens":12,"seed":5,"stream":true,"return_token_ids":true})");
  REQUIRE(response.status == 200);
  REQUIRE(response.headers.at("content-type") == "text/event-stream");
  auto events = Events(response.body);
  REQUIRE(events.size() >= 2);
  REQUIRE(events.back() == "[DONE]");
  events.pop_back();
  std::string text;
  size_t tokens = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    const json chunk = json::parse(events[i]);
    text += chunk["choices"][0]["text"].get<std::string>();
    tokens += chunk["choices"][0]["token_ids"].size();
    const bool last = i + 1 == events.size();
    REQUIRE(chunk["choices"][0]["finish_reason"] == (last ? json("length") : json(nullptr)));
    REQUIRE(chunk.contains("usage") == last);
  }
  REQUIRE(text == ExpectedText("Hello", 5, 12));
  REQUIRE(tokens == 12);
}

TEST_CASE("two clients stream at once on connections that stay open", "[runtime][unit]") {
  Served served({.num_ranks = 2, .step = std::chrono::milliseconds(3)});
  std::vector<std::string> bodies[2];
  std::vector<std::thread> clients;
  for (int c = 0; c < 2; ++c) {
    clients.emplace_back([&served, &bodies, c] {
      auto client = HttpClient::Connect("127.0.0.1", served.server->port(), 20'000);
      for (int i = 0; i < 3 && client.ok(); ++i) {
        const auto response = client->Request(
            "POST", "/v1/completions",
            json{{"prompt", "client"}, {"seed", 10 * c + i}, {"max_tokens", 20}, {"stream", true}}
                .dump());
        if (response.ok()) bodies[c].push_back(response->body);
      }
    });
  }
  for (auto& client : clients) client.join();
  for (int c = 0; c < 2; ++c) {
    REQUIRE(bodies[c].size() == 3);
    for (int i = 0; i < 3; ++i) {
      std::string text;
      for (const std::string& event : Events(bodies[c][static_cast<size_t>(i)])) {
        if (event != "[DONE]") text += json::parse(event)["choices"][0]["text"].get<std::string>();
      }
      REQUIRE(text == ExpectedText("client", static_cast<uint64_t>(10 * c + i), 20));
    }
  }
}

TEST_CASE("a stop string cuts the text and frees the sequence", "[runtime][unit]") {
  Served served;
  const std::string text = ExpectedText("Hello", 5, 300);
  const std::string stop = text.substr(9, 3);
  const std::string cut = text.substr(0, text.find(stop));
  for (const bool stream : {false, true}) {
    const HttpResponse response = served.Post(json{
        {"prompt", "Hello"}, {"seed", 5}, {"max_tokens", 300}, {"stop", stop}, {"stream", stream}}
                                                  .dump());
    REQUIRE(response.status == 200);
    std::string got;
    json last;
    for (const std::string& event :
         stream ? Events(response.body) : std::vector<std::string>{response.body}) {
      if (event == "[DONE]") continue;
      last = json::parse(event);
      got += last["choices"][0]["text"].get<std::string>();
    }
    REQUIRE(got == cut);
    REQUIRE(last["choices"][0]["finish_reason"] == "stop");
    REQUIRE(Eventually([&] { return served.ranks.running() == 0; }));
  }
  REQUIRE(served.frontend->stats().finished == 2);
}

TEST_CASE("the end of text is a stop", "[runtime][unit]") {
  Served served({.num_ranks = 1, .reply = [](const GenerationRequest& request, int index) {
                   const std::vector<int32_t> bytes = {0xe6, 0x97, 0xa5, 0xe6, -1};
                   return request.prompt.size() > 3 ? -1 : bytes[static_cast<size_t>(index)];
                 }});
  const json body = json::parse(served.Post(R"({"prompt":"x"})").body);
  REQUIRE(body["choices"][0]["text"] == "\xe6\x97\xa5\xef\xbf\xbd");
  REQUIRE(body["choices"][0]["finish_reason"] == "stop");
  REQUIRE(body["usage"]["completion_tokens"] == 4);
  const json empty = json::parse(served.Post(R"({"prompt":"xxxx"})").body);
  REQUIRE(empty["choices"][0]["text"] == "");
}

TEST_CASE("a client that goes away frees its sequence", "[runtime][unit]") {
  Served served;
  const auto gone = [&](bool stream, bool hold) {
    CAPTURE(stream, hold);
    served.ranks.Hold(hold);
    HttpClient client = served.Connect();
    REQUIRE(client
                .Send(FormatRequest(
                    "POST", "/v1/completions",
                    json{{"prompt", "x"}, {"max_tokens", 500}, {"stream", stream}}.dump(), ""))
                .ok());
    REQUIRE(Eventually([&] { return served.ranks.running() == 1; }));
    if (stream) REQUIRE(client.ReceiveHead()->status == 200);
    client.Close();
    REQUIRE(Eventually([&] { return served.frontend->stats().pending == 0; }));
    REQUIRE(Eventually([&] { return served.ranks.running() == 0; }));
  };
  gone(true, false);
  gone(true, true);
  gone(false, true);
  REQUIRE(served.frontend->stats().cancelled >= 2);
  served.ranks.Hold(false);
  REQUIRE(served.Post(R"({"prompt":"still here"})").status == 200);
}

TEST_CASE("models health readiness placement and rebalance", "[runtime][unit]") {
  Served served;
  const json models = json::parse(served.Get("/v1/models").body);
  REQUIRE(models["data"][0]["id"] == "demo");
  REQUIRE(served.Get("/healthz").status == 200);
  REQUIRE(served.Get("/readyz").status == 200);
  REQUIRE(served.Get("/readyz?verbose=1").status == 200);
  served.ready = false;
  REQUIRE(served.Get("/readyz").status == 503);
  served.ready = true;
  REQUIRE(served.Get("/v1/placement").body == R"({"epoch":3})");
  const HttpResponse rebalance = served.Post("please", "/v1/rebalance");
  REQUIRE(rebalance.status == 202);
  REQUIRE(rebalance.body == R"({"got":"please"})");
}

TEST_CASE("paths and methods that do not exist", "[runtime][unit][errors]") {
  Served served;
  REQUIRE(served.Get("/nothing").status == 404);
  REQUIRE(ErrorOf(served.Get("/nothing")).find("/nothing") != std::string::npos);
  REQUIRE(served.Get("/").status == 404);
  const HttpResponse wrong = served.Get("/v1/completions");
  REQUIRE(wrong.status == 405);
  REQUIRE(wrong.headers.at("allow") == "POST");
  REQUIRE(served.Post("{}", "/v1/models").headers.at("allow") == "GET");
}

TEST_CASE("requests that cannot be answered are refused", "[runtime][unit][errors]") {
  Served served;
  const auto refusal = [&](const std::string& body, int status) {
    const HttpResponse response = served.Post(body);
    REQUIRE(response.status == status);
    return ErrorOf(response);
  };
  REQUIRE(refusal(R"({"prompt":)", 400) == "body: invalid JSON at byte 11 of 10");
  REQUIRE(refusal("", 400) == "body: invalid JSON at byte 1 of 0");
  REQUIRE(refusal(R"({"prompt":"x","temperature":9})", 400).find("temperature: 9") == 0);
  REQUIRE(refusal(R"({"prompt":"x","model":"other"})", 404).find("model: ") == 0);
  REQUIRE(refusal(R"({"prompt":[]})", 400).find("prompt: it is empty") == 0);
  REQUIRE(refusal(R"({"prompt":[300]})", 400).find("prompt: token 300 at index 0") == 0);
  REQUIRE(refusal(json{{"prompt", std::string(600, 'x')}}.dump(), 400).find("prompt: 601") == 0);
  REQUIRE(refusal(std::string(100'000, '{'), 400).find("body: invalid JSON") == 0);
  REQUIRE(refusal(std::string("{\"prompt\":\"\0\"}", 14), 400).find("body: invalid") == 0);
  const HttpResponse param = served.Post(R"({"prompt":"x","n":2})");
  REQUIRE(json::parse(param.body)["error"]["param"] == "n");
}

TEST_CASE("a model without a tokenizer takes token ids", "[runtime][unit]") {
  Served served({.num_ranks = 1}, {.context_tokens = 64, .vocab_size = 1000},
                {.host = "127.0.0.1", .port = 0, .threads = 8}, Tokenizer::None());
  REQUIRE(ErrorOf(served.Post(R"({"prompt":"text"})")).find("token ids") != std::string::npos);
  const json body =
      json::parse(served.Post(R"({"prompt":[999],"max_tokens":3,"return_token_ids":true})").body);
  REQUIRE(body["choices"][0]["text"] == "");
  REQUIRE(body["choices"][0]["token_ids"].size() == 3);
}

TEST_CASE("bodies have a limit however they come", "[runtime][unit][errors]") {
  Served served({.num_ranks = 1}, {.context_tokens = 64, .vocab_size = 256},
                {.host = "127.0.0.1", .port = 0, .threads = 8, .max_body_bytes = 1000});
  const std::string big = json{{"prompt", std::string(2000, 'x')}}.dump();
  HttpResponse response = served.Post(big);
  REQUIRE(response.status == 413);
  REQUIRE(ErrorOf(response).find("1000 bytes") != std::string::npos);
  const std::string head =
      "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  HttpClient chunked = served.Connect();
  REQUIRE(chunked.Send(head + "7d0\r\n" + std::string(2000, ' ') + "\r\n0\r\n\r\n").ok());
  REQUIRE(chunked.Receive()->status == 413);
  HttpClient good = served.Connect();
  REQUIRE(good.Send(head + "7\r\n{\"promp\r\n7\r\nt\":\"x\"}\r\n0\r\n\r\n").ok());
  REQUIRE(good.Receive()->status == 200);
  HttpClient waiting = served.Connect();
  REQUIRE(waiting
              .Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                    "Content-Length: 14\r\n\r\n")
              .ok());
  REQUIRE(waiting.Send(R"({"prompt":"x"})").ok());
  REQUIRE(waiting.Receive()->status == 200);
  HttpClient huge = served.Connect();
  REQUIRE(huge.Send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
                    "9223372036854775807\r\n\r\n")
              .ok());
  REQUIRE(huge.Receive()->status == 413);
}

TEST_CASE("bytes that are no HTTP are refused as JSON", "[runtime][unit][errors]") {
  Served served;
  for (const char* bytes :
       {"hello\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", "\r\n\r\n\x01\x02\x03\r\n\r\n"}) {
    HttpClient client = served.Connect();
    REQUIRE(client.Send(bytes).ok());
    const auto response = client.Receive();
    if (!response.ok()) continue;  // closed without a word
    CAPTURE(bytes, response->body);
    REQUIRE(response->status >= 400);
    REQUIRE(json::accept(response->body));
  }
  HttpClient cut = served.Connect();
  REQUIRE(cut.Send("POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{").ok());
  cut.Close();
  REQUIRE(served.Get("/healthz").status == 200);
}

TEST_CASE("a connection stays open and closes on request", "[runtime][unit]") {
  Served served;
  HttpClient client = served.Connect();
  for (int i = 0; i < 3; ++i) {
    const auto response = client.Request("POST", "/v1/completions", R"({"prompt":"x"})");
    REQUIRE(response.ok());
    REQUIRE(response->headers.at("connection") == "keep-alive");
    REQUIRE(client.Request("POST", "/v1/completions", "{")->status == 400);
    REQUIRE(client.Request("GET", "/nothing")->status == 404);
  }
  REQUIRE(
      client.Request("GET", "/healthz", "", "Connection: close\r\n")->headers.at("connection") ==
      "close");
  const auto after = client.Request("GET", "/healthz");
  REQUIRE(after.status().code() == absl::StatusCode::kUnavailable);
}

TEST_CASE("a full queue is 429 and a draining server is 503", "[runtime][unit][errors]") {
  Served served({.num_ranks = 1}, {.max_pending = 1, .context_tokens = 64, .vocab_size = 256});
  served.ranks.Hold(true);
  HttpClient first = served.Connect();
  REQUIRE(first.Send(FormatRequest("POST", "/v1/completions", R"({"prompt":"x"})", "")).ok());
  REQUIRE(Eventually([&] { return served.ranks.running() == 1; }));
  const HttpResponse full = served.Post(R"({"prompt":"x"})");
  REQUIRE(full.status == 429);
  REQUIRE(full.headers.at("retry-after") == "1");
  REQUIRE(json::parse(full.body)["error"]["code"] == "queue_full");
  served.frontend->DrainAndStop(20);
  REQUIRE(first.Receive()->status == 503);
  const HttpResponse draining = served.Post(R"({"prompt":"x"})");
  REQUIRE(draining.status == 503);
  REQUIRE(draining.headers.contains("retry-after"));
  REQUIRE(served.Get("/readyz").status == 503);
  REQUIRE(served.Get("/healthz").status == 200);
}

TEST_CASE("more clients than threads leave room for health checks", "[runtime][unit][errors]") {
  Served served({.num_ranks = 1}, {.context_tokens = 64, .vocab_size = 256},
                {.host = "127.0.0.1", .port = 0, .threads = 8});
  served.ranks.Hold(true);
  std::vector<HttpClient> clients;
  for (int i = 0; i < 4; ++i) {
    clients.push_back(served.Connect());
    REQUIRE(clients.back()
                .Send(FormatRequest("POST", "/v1/completions", R"({"prompt":"x"})", ""))
                .ok());
  }
  REQUIRE(Eventually([&] { return served.ranks.running() == 4; }));
  REQUIRE(served.Post(R"({"prompt":"x"})").status == 429);
  REQUIRE(served.Get("/healthz").status == 200);
  served.ranks.Hold(false);
  for (HttpClient& client : clients) REQUIRE(client.Receive()->status == 200);
}

TEST_CASE("a deadline is 504 or the last event of a stream", "[runtime][unit][errors]") {
  Served served;
  served.ranks.Hold(true);
  const HttpResponse whole = served.Post(R"({"prompt":"x","timeout":0.05})");
  REQUIRE(whole.status == 504);
  REQUIRE(json::parse(whole.body)["error"]["code"] == "deadline_exceeded");
  const HttpResponse stream = served.Post(R"({"prompt":"x","timeout":0.05,"stream":true})");
  REQUIRE(stream.status == 200);
  const auto events = Events(stream.body);
  REQUIRE(events.size() == 2);
  REQUIRE(json::parse(events[0])["error"]["type"] == "timeout_error");
  REQUIRE(events[1] == "[DONE]");
}

TEST_CASE("a lost rank fails what is pending", "[runtime][unit][errors]") {
  Served served;
  served.ranks.Hold(true);
  HttpClient client = served.Connect();
  REQUIRE(client.Send(FormatRequest("POST", "/v1/completions", R"({"prompt":"x"})", "")).ok());
  REQUIRE(Eventually([&] { return served.ranks.running() == 1; }));
  served.ranks.Kill(1);
  REQUIRE(client.Receive()->status == 503);
  REQUIRE(served.Get("/readyz").status == 503);
}

TEST_CASE("the end of the server ends what is under way", "[runtime][unit]") {
  Served served;
  served.ranks.Hold(true);
  HttpClient client = served.Connect();
  REQUIRE(client.Send(FormatRequest("POST", "/v1/completions", R"({"prompt":"x"})", "")).ok());
  REQUIRE(Eventually([&] { return served.ranks.running() == 1; }));
  served.server.reset();
  REQUIRE(served.frontend->stats().pending == 0);
}

TEST_CASE("a port in use is named", "[runtime][unit][errors]") {
  Served served;
  const int port = served.server->port();
  const auto second = HttpServer::Start({.host = "127.0.0.1", .port = port, .threads = 8},
                                        {.frontend = served.frontend.get()});
  REQUIRE(second.status().code() == absl::StatusCode::kUnavailable);
  const std::string message(second.status().message());
  CAPTURE(message);
  REQUIRE(message.find("127.0.0.1:" + std::to_string(port)) != std::string::npos);
  REQUIRE(message.find("in use") != std::string::npos);
  REQUIRE(HttpServer::Start({.threads = 1}, {.frontend = served.frontend.get()}).status().code() ==
          absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace ballast
