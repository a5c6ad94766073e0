#include "runtime/http_server.h"

#include <civetweb.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/random.h"
#include "base/status.h"
#include "runtime/completions_api.h"
#include "runtime/http_connection.h"

namespace ballast {
namespace {

constexpr int kMinThreads = 8;
constexpr int kReservedThreads = 4;                // never busy with completions
constexpr std::chrono::milliseconds kGlance(100);  // how often a waiting thread looks at its client
constexpr std::chrono::milliseconds kVisit(20);
constexpr char kRequestTimeoutMs[] = "10000";   // for a client to send its request or take bytes
constexpr char kKeepAliveTimeoutMs[] = "2000";  // for the next request on a connection
constexpr char kRetryAfter[] = "Retry-After: 1\r\n";

// Carries the events of one request from the front end's I/O thread to the thread of its client.
class EventQueue : public TokenSink {
 public:
  void OnEvent(const TokenEvent& event) override {
    const std::lock_guard lock(mutex_);
    events_.push_back(event);
    arrived_.notify_one();
  }
  // Everything that has arrived; waits for something at most `timeout`.
  std::vector<TokenEvent> Take(std::chrono::milliseconds timeout) {
    std::unique_lock lock(mutex_);
    arrived_.wait_for(lock, timeout, [this] { return !events_.empty(); });
    return std::exchange(events_, {});
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<TokenEvent> events_;
};

// What a client hears of an end that is neither kStop nor kLength.
absl::Status StatusOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError("the request's deadline has passed");
    case FinishReason::kCancelled:
      return absl::UnavailableError("the server is draining");
    case FinishReason::kFailed:
      return absl::UnavailableError("the server could not finish the request");
    default:
      return absl::OkStatus();
  }
}

void ReplyError(HttpConnection& connection, const absl::Status& status) {
  const int code = absl::IsOutOfRange(status) ? 413 : HttpStatusOf(status);
  const absl::Status shown = code == 413 ? absl::InvalidArgumentError(status.message()) : status;
  connection.Reply(code, ErrorJson(shown), code == 429 || code == 503 ? kRetryAfter : "");
}

// One request from its admission to its end.
class Completion {
 public:
  enum class Progress { kRunning, kEnded, kClientGone, kStopping };

  Completion(const HttpBackend& backend, CompletionRequest request, CompletionHeader header)
      : frontend_(*backend.frontend),
        text_(backend.tokenizer, std::move(request.stop)),
        header_(std::move(header)),
        stream_(request.stream),
        with_token_ids_(request.return_token_ids),
        timeout_ms_(request.timeout_ms),
        generation_(std::move(request.generation)) {
    usage_.prompt_tokens = static_cast<int64_t>(generation_.prompt.size());
  }

  void Serve(HttpConnection& connection, const std::atomic<bool>& stopping) {
    const absl::StatusOr<uint64_t> id =
        frontend_.Submit(std::move(generation_), queue_, timeout_ms_);
    if (!id.ok()) return ReplyError(connection, id.status());
    bool client_is_there = !stream_ || connection.BeginEvents();
    while (client_is_there && finish_ == FinishReason::kNone) {
      for (const TokenEvent& event : queue_->Take(kGlance)) Take(event);
      if (text_.stopped()) frontend_.Cancel(*id, FinishReason::kStop);
      if (stopping && finish_ == FinishReason::kNone) finish_ = FinishReason::kCancelled;
      client_is_there = !connection.PeerGone() &&
                        (!stream_ || finish_ != FinishReason::kNone || SendPart(connection));
    }
    // Unknown by now unless the client went away or the server stops.
    frontend_.Cancel(*id);
    if (client_is_there) stream_ ? EndStream(connection) : ReplyWhole(connection);
  }

 private:
  void Take(const TokenEvent& event) {
    if (finish_ != FinishReason::kNone) return;  // after a stop string
    if (event.token >= 0) {
      part_.token_ids.push_back(event.token);
      ++usage_.completion_tokens;
      part_.text += text_.Add(event.token);
    }
    finish_ = event.finish;
    if (finish_ != FinishReason::kNone && !text_.stopped()) part_.text += text_.Finish();
    if (text_.stopped()) finish_ = FinishReason::kStop;
  }

  bool SendPart(HttpConnection& connection) {
    if (part_.text.empty() && (part_.token_ids.empty() || !with_token_ids_)) return true;
    const std::string json = CompletionJson(header_, part_, with_token_ids_, nullptr);
    part_ = {};
    return connection.SendEvents(SseEvent(json));
  }

  void EndStream(HttpConnection& connection) {
    const absl::Status status = StatusOf(finish_);
    std::string events;
    if (status.ok()) {
      part_.finish = finish_;
      events = SseEvent(CompletionJson(header_, part_, with_token_ids_, &usage_));
    } else {
      if (!SendPart(connection)) return;
      events = SseEvent(ErrorJson(status));
    }
    if (connection.SendEvents(events + SseEvent("[DONE]"))) connection.EndEvents();
  }

  void ReplyWhole(HttpConnection& connection) {
    const absl::Status status = StatusOf(finish_);
    if (!status.ok()) return ReplyError(connection, status);
    part_.finish = finish_;
    connection.Reply(200, CompletionJson(header_, part_, with_token_ids_, &usage_));
  }

  Frontend& frontend_;
  const std::shared_ptr<EventQueue> queue_ = std::make_shared<EventQueue>();
  CompletionText text_;
  const CompletionHeader header_;
  const bool stream_;
  const bool with_token_ids_;
  const int64_t timeout_ms_;
  GenerationRequest generation_;  // until it is submitted
  CompletionPart part_;           // what the client has not been sent
  CompletionUsage usage_;
  FinishReason finish_ = FinishReason::kNone;
};

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

class HttpServer::State {
 public:
  State(HttpServerOptions options, HttpBackend backend)
      : options_(std::move(options)), backend_(std::move(backend)), started_(UnixSeconds()) {
    std::random_device device;
    random_seed_ = uint64_t{device()} << 32 | device();
  }

  ~State() {
    stopping_ = true;
    if (context_ == nullptr) return;
    // The listener looks at civetweb's stop flag only every two seconds, or when somebody connects.
    const std::jthread visitor([this](const std::stop_token& stopped) {
      char error[128];
      while (!stopped.stop_requested()) {
        std::this_thread::sleep_for(kVisit);
        mg_connection* visit =
            mg_connect_client(options_.host.c_str(), port_, 0, error, sizeof error);
        if (visit != nullptr) mg_close_connection(visit);
      }
    });
    mg_stop(context_);
  }

  absl::Status Listen();
  int port() const { return port_; }

 private:
  static int OnRequest(mg_connection* connection);
  static int OnHttpError(mg_connection* connection, int status, const char* message);
  static int OnLog(const mg_connection* connection, const char* message);

  void Route(HttpConnection& connection);
  void Complete(HttpConnection& connection);
  void Models(HttpConnection& connection);
  void Healthy(HttpConnection& connection);
  void Ready(HttpConnection& connection);
  void Operate(HttpConnection& connection);
  uint64_t NextRandom() { return RandomBits(random_seed_, random_counter_++); }

  const HttpServerOptions options_;
  const HttpBackend backend_;
  const int64_t started_;
  uint64_t random_seed_;  // constant after construction
  std::atomic<uint64_t> random_counter_ = 0;
  std::atomic<int> completions_ = 0;  // being served
  std::atomic<bool> stopping_ = false;
  mg_context* context_ = nullptr;
  int port_ = 0;
  std::mutex log_mutex_;
  std::string first_log_;  // guarded by log_mutex_: what went wrong at start
};

// ---- civetweb ----------------------------------------------------------------------------------

absl::Status HttpServer::State::Listen() {
  static std::once_flag once;
  std::call_once(once, [] { mg_init_library(MG_FEATURES_DEFAULT); });
  const bool is_ipv6 = options_.host.find(':') != std::string::npos;
  const std::string address =
      absl::StrCat(is_ipv6 ? "[" : "", options_.host, is_ipv6 ? "]" : "", ":", options_.port);
  const std::string threads = std::to_string(options_.threads);
  const char* settings[] = {"listening_ports",
                            address.c_str(),
                            "num_threads",
                            threads.c_str(),
                            "enable_keep_alive",
                            "yes",
                            "tcp_nodelay",
                            "1",
                            "request_timeout_ms",
                            kRequestTimeoutMs,
                            "keep_alive_timeout_ms",
                            kKeepAliveTimeoutMs,
                            nullptr};
  mg_callbacks callbacks{};
  callbacks.begin_request = OnRequest;
  callbacks.http_error = OnHttpError;
  callbacks.log_message = OnLog;
  context_ = mg_start(&callbacks, this, settings);
  if (context_ == nullptr) {
    const std::lock_guard lock(log_mutex_);
    return absl::UnavailableError(
        absl::StrCat("HTTP server: cannot listen on ", address, ": ", first_log_));
  }
  mg_server_port ports[1] = {};
  if (mg_get_server_ports(context_, 1, ports) == 1) port_ = ports[0].port;
  return absl::OkStatus();
}

int HttpServer::State::OnRequest(mg_connection* connection) {
  HttpConnection http(connection);
  static_cast<State*>(mg_get_user_data(mg_get_context(connection)))->Route(http);
  return 200;  // handled; the number is for civetweb's access log, which is not kept
}

// Requests that civetweb itself refuses, because they are not HTTP.
int HttpServer::State::OnHttpError(mg_connection* connection, int status, const char* message) {
  const std::string json = ErrorJson(
      absl::InvalidArgumentError(message == nullptr || *message == 0 ? "bad request" : message));
  mg_disable_connection_keep_alive(connection);
  mg_printf(connection,
            "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
            "Connection: close\r\n\r\n%s",
            status, mg_get_response_code_text(connection, status), json.size(), json.c_str());
  return 0;
}

int HttpServer::State::OnLog(const mg_connection* connection, const char* message) {
  auto* state = static_cast<State*>(mg_get_user_data(mg_get_context(connection)));
  if (state != nullptr) {
    const std::lock_guard lock(state->log_mutex_);
    if (state->first_log_.empty()) state->first_log_ = message;
  }
  Log(LogLevel::kDebug, "http", message);
  return 1;
}

// ---- routes ------------------------------------------------------------------------------------

void HttpServer::State::Route(HttpConnection& connection) {
  struct Endpoint {
    const char* path;
    const char* method;
    void (State::*serve)(HttpConnection&);
  };
  constexpr Endpoint kEndpoints[] = {{"/v1/completions", "POST", &State::Complete},
                                     {"/v1/models", "GET", &State::Models},
                                     {"/healthz", "GET", &State::Healthy},
                                     {"/readyz", "GET", &State::Ready}};
  const std::string& path = connection.path();
  std::string allowed;
  for (const Endpoint& endpoint : kEndpoints) {
    if (path != endpoint.path) continue;
    if (connection.method() == endpoint.method) return (this->*endpoint.serve)(connection);
    allowed = endpoint.method;
  }
  if (const auto get = backend_.get.find(path); get != backend_.get.end()) {
    if (connection.method() == "GET") {
      const HttpReply reply = get->second();
      return connection.ReplyAs(reply.type, reply.status, reply.body);
    }
    allowed = "GET";
  }
  if (backend_.post.contains(path)) {
    if (connection.method() == "POST") return Operate(connection);
    allowed = "POST";
  }
  if (allowed.empty()) {
    return connection.Reply(
        404,
        ErrorJson(absl::InvalidArgumentError(absl::StrCat("path: ", path, " does not exist"))));
  }
  connection.Reply(405,
                   ErrorJson(absl::InvalidArgumentError(absl::StrCat(
                       "method: ", connection.method(), " ", path, "; allowed is ", allowed))),
                   absl::StrCat("Allow: ", allowed, "\r\n"));
}

void HttpServer::State::Healthy(HttpConnection& connection) {
  connection.Reply(200, R"({"status":"ok"})");
}

void HttpServer::State::Complete(HttpConnection& connection) {
  const absl::StatusOr<std::string> body = connection.ReadBody(options_.max_body_bytes);
  if (!body.ok()) return ReplyError(connection, body.status());
  absl::StatusOr<CompletionRequest> request =
      ParseCompletionRequest(*body, backend_.tokenizer, backend_.model_name, NextRandom());
  if (!request.ok()) return ReplyError(connection, request.status());
  const int limit = options_.threads - kReservedThreads;
  if (completions_.fetch_add(1) >= limit) {
    ReplyError(connection, absl::ResourceExhaustedError(absl::StrCat(
                               "the queue is full: ", limit, " connections are being served")));
  } else {
    char id[32];
    std::snprintf(id, sizeof id, "cmpl-%016llx", static_cast<unsigned long long>(NextRandom()));
    Completion(backend_, std::move(*request), {id, backend_.model_name, UnixSeconds()})
        .Serve(connection, stopping_);
  }
  --completions_;
}

void HttpServer::State::Models(HttpConnection& connection) {
  const nlohmann::ordered_json model = {{"id", backend_.model_name},
                                        {"object", "model"},
                                        {"created", started_},
                                        {"owned_by", "ballast"}};
  const nlohmann::ordered_json list = {{"object", "list"},
                                       {"data", nlohmann::ordered_json::array({model})}};
  using Json = nlohmann::ordered_json;
  connection.Reply(200, list.dump(-1, ' ', false, Json::error_handler_t::replace));
}

void HttpServer::State::Ready(HttpConnection& connection) {
  if (!backend_.frontend->accepting()) {
    return connection.Reply(503, R"({"status":"draining"})", kRetryAfter);
  }
  if (backend_.is_ready && !backend_.is_ready()) {
    return connection.Reply(503, R"({"status":"starting"})", kRetryAfter);
  }
  const std::string note = backend_.note ? backend_.note() : "";
  if (note.empty()) return connection.Reply(200, R"({"status":"ready"})");
  connection.Reply(200, nlohmann::ordered_json{{"status", "ready"}, {"note", note}}.dump());
}

// What operators do: from the server's own machine only.
void HttpServer::State::Operate(HttpConnection& connection) {
  const std::string& path = connection.path();
  if (!connection.from_loopback()) {
    return ReplyError(connection, absl::PermissionDeniedError(
                                      absl::StrCat(path, " is for the server's own machine")));
  }
  const absl::StatusOr<std::string> body = connection.ReadBody(options_.max_body_bytes);
  if (!body.ok()) return ReplyError(connection, body.status());
  const HttpReply reply = backend_.post.at(path)(*body);
  connection.ReplyAs(reply.type, reply.status, reply.body);
}

// ---- HttpServer --------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(HttpServerOptions options,
                                                              HttpBackend backend) {
  if (backend.frontend == nullptr || options.threads < kMinThreads || options.port < 0 ||
      options.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("HTTP server: port ", options.port, " (0 to 65535), threads ", options.threads,
                     " (at least ", kMinThreads, "), a front end is needed"));
  }
  auto state = std::make_unique<State>(std::move(options), std::move(backend));
  BALLAST_RETURN_IF_ERROR(state->Listen());
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(state)));
}

HttpServer::HttpServer(std::unique_ptr<State> state) : state_(std::move(state)) {}
HttpServer::~HttpServer() = default;
int HttpServer::port() const {
  return state_->port();
}

}  // namespace ballast
