#ifndef BALLAST_RUNTIME_HTTP_SERVER_H_
#define BALLAST_RUNTIME_HTTP_SERVER_H_

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "runtime/frontend.h"
#include "runtime/tokenizer.h"

namespace ballast {

struct HttpServerOptions {
  std::string host = "127.0.0.1";  // a numeric address
  int port = 8080;                 // 0: the system chooses
  int threads = 128;               // connections served at a time; at least 8
  size_t max_body_bytes = 4u << 20;
};

struct HttpReply {
  int status = 200;
  std::string body;
  const char* type = "application/json";
};

// What stands behind the server. The functions are called from many threads at a time and have to
// outlive the server.
struct HttpBackend {
  Frontend* frontend = nullptr;  // outlives the server
  Tokenizer tokenizer = Tokenizer::None();
  std::string model_name = {};
  std::function<bool()> is_ready = {};     // empty: always
  std::function<std::string()> note = {};  // what GET /readyz adds, if anything; empty: nothing
  // What answers GET of other paths, and POST of those that operators use: these are for the
  // server's own machine only.
  std::map<std::string, std::function<HttpReply()>> get = {};
  std::map<std::string, std::function<HttpReply(const std::string& body)>> post = {};
};

// The HTTP side: POST /v1/completions, GET /v1/models, GET /healthz, GET /readyz, and what the
// backend adds. Errors have OpenAI's form.
//
// A client that goes away frees its sequence, also between tokens and while it waits for a whole
// answer. A few threads are kept for the endpoints that answer at once: completions beyond
// `threads` less those are refused as a full queue is.
// THREADS any
class HttpServer {
 public:
  // Listens from here on.
  // ERRORS kUnavailable, with host and port: cannot listen there; kInvalidArgument: options
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(HttpServerOptions options,
                                                           HttpBackend backend);
  // Ends the completions that are under way and closes. To let them finish, drain the front end
  // first.
  ~HttpServer();

  int port() const;

 private:
  class State;
  explicit HttpServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_HTTP_SERVER_H_
