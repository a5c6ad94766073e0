#ifndef BALLAST_DEPLOY_HTTP_CLIENT_H_
#define BALLAST_DEPLOY_HTTP_CLIENT_H_

#include <map>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace ballast {

struct HttpResponse {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
};

// A blocking HTTP/1.1 client on one connection, for `ballast record`, the demo and tests. Movable,
// not copyable.
// ERRORS kUnavailable: the connection broke; kDeadlineExceeded: nothing came for the time-out;
//        kInvalidArgument: the answer is not HTTP
class HttpClient {
 public:
  // `host` is a numeric IPv4 address.
  static absl::StatusOr<HttpClient> Connect(const std::string& host, int port, int timeout_ms);
  HttpClient(HttpClient&& other) noexcept;
  HttpClient& operator=(HttpClient&& other) noexcept;
  ~HttpClient();

  // Sends a request and receives the whole answer. The connection stays open if the server agrees.
  absl::StatusOr<HttpResponse> Request(const std::string& method, const std::string& path,
                                       const std::string& body = "",
                                       const std::string& headers = "");

  // The parts of Request, for streams and for what is no valid request.
  absl::Status Send(std::string_view bytes);
  absl::StatusOr<HttpResponse> ReceiveHead();  // no body yet
  // The next chunk of a chunked body; empty at its end.
  absl::StatusOr<std::string> ReceiveChunk();
  absl::StatusOr<HttpResponse> Receive();
  void Close();

 private:
  explicit HttpClient(int fd) : fd_(fd) {}
  absl::Status Fill();  // receives more bytes into buffer_
  absl::StatusOr<std::string> TakeLine();
  absl::StatusOr<std::string> TakeBytes(size_t count);

  int fd_;
  std::string buffer_;  // received and not taken
};

// The text of a request.
std::string FormatRequest(const std::string& method, const std::string& path,
                          const std::string& body, const std::string& headers);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_HTTP_CLIENT_H_
