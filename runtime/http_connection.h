#ifndef BALLAST_RUNTIME_HTTP_CONNECTION_H_
#define BALLAST_RUNTIME_HTTP_CONNECTION_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

struct mg_connection;

namespace ballast {

// One request on a connection of civetweb, seen from the thread that serves it.
class HttpConnection {
 public:
  explicit HttpConnection(mg_connection* connection);

  const std::string& method() const { return method_; }
  const std::string& path() const { return path_; }  // decoded, without the query
  bool from_loopback() const;

  // The body.
  // ERRORS kOutOfRange: longer than `max_bytes`; kUnavailable: it never came whole. The connection
  //        closes after the reply to either.
  absl::StatusOr<std::string> ReadBody(size_t max_bytes);

  // Answers with a JSON text. `headers`: more header lines, each ending with "\r\n".
  void Reply(int status, const std::string& json, const std::string& headers = "");
  // Answers with bytes of a type of their own (a Content-Type).
  void ReplyAs(const char* type, int status, const std::string& body,
               const std::string& headers = "");

  // Answers with a stream of server-sent events: (BeginEvents SendEvents* EndEvents).
  // Each returns false when the client is gone.
  bool BeginEvents();
  bool SendEvents(const std::string& events);
  bool EndEvents();

  // Whether the client closed its connection (or its sending half). Cheap.
  bool PeerGone();

 private:
  bool Write(const std::string& bytes);
  // The answer cannot be told from the next one any more.
  void CloseAfterwards();

  mg_connection* connection_;
  std::string method_;
  std::string path_;
  bool chunked_;  // HTTP/1.1, whose clients understand chunks
  bool keep_alive_;
  int socket_ = -1;  // looked up at the first PeerGone
  bool looked_up_ = false;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_HTTP_CONNECTION_H_
