#include "runtime/http_connection.h"

#include <arpa/inet.h>
#include <civetweb.h>
#include <dirent.h>
#include <netinet/in.h>
#include <poll.h>
#include <strings.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "base/status.h"

namespace ballast {
namespace {

constexpr size_t kReadBytes = 64u << 10;

struct Endpoint {
  std::string address;
  int port = 0;
};

// An address as civetweb writes it.
Endpoint ToEndpoint(const sockaddr_storage& storage) {
  char text[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(storage);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    return {text, ntohs(v4.sin_port)};
  }
  if (storage.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(storage);
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    return {text, ntohs(v6.sin6_port)};
  }
  return {};
}

// The socket of a request, or -1. civetweb does not tell it, but no two connections share both
// ports and the client's address. The number stays ours while the request is served.
int FindSocket(const mg_request_info& info) {
  struct CloseDir {
    void operator()(DIR* dir) const { closedir(dir); }
  };
  const std::unique_ptr<DIR, CloseDir> dir(opendir("/proc/self/fd"));
  if (dir == nullptr) return -1;
  while (const dirent* entry = readdir(dir.get())) {
    if (entry->d_name[0] == '.') continue;
    const int fd = std::atoi(entry->d_name);
    sockaddr_storage peer{}, own{};
    socklen_t peer_length = sizeof peer, own_length = sizeof own;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_length) != 0) continue;
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&own), &own_length) != 0) continue;
    const Endpoint client = ToEndpoint(peer);
    if (client.port == info.remote_port && ToEndpoint(own).port == info.server_port &&
        client.address == info.remote_addr) {
      return fd;
    }
  }
  return -1;
}

bool HeaderIs(mg_connection* connection, const char* name, const char* value) {
  const char* header = mg_get_header(connection, name);
  return header != nullptr && strcasecmp(header, value) == 0;
}

}  // namespace

HttpConnection::HttpConnection(mg_connection* connection) : connection_(connection) {
  const mg_request_info& info = *mg_get_request_info(connection);
  if (info.request_method != nullptr) method_ = info.request_method;
  if (info.local_uri != nullptr) path_ = info.local_uri;
  chunked_ = info.http_version != nullptr && std::string_view(info.http_version) == "1.1";
  keep_alive_ = chunked_ && !HeaderIs(connection, "Connection", "close");
  if (!keep_alive_) CloseAfterwards();
}

void HttpConnection::CloseAfterwards() {
  keep_alive_ = false;
  mg_disable_connection_keep_alive(connection_);
}

bool HttpConnection::from_loopback() const {
  const std::string_view address = mg_get_request_info(connection_)->remote_addr;
  return address.starts_with("127.") || address == "::1" || address.starts_with("::ffff:127.");
}

absl::StatusOr<std::string> HttpConnection::ReadBody(size_t max_bytes) {
  const long long announced = mg_get_request_info(connection_)->content_length;
  const auto too_long = [&] {
    CloseAfterwards();
    return absl::OutOfRangeError(
        absl::StrCat("body: longer than ", max_bytes, " bytes, which is the limit"));
  };
  if (announced > static_cast<long long>(max_bytes)) return too_long();
  if (HeaderIs(connection_, "Expect", "100-continue")) Write("HTTP/1.1 100 Continue\r\n\r\n");
  std::string body;
  while (true) {
    const size_t have = body.size();
    body.resize(have + kReadBytes);
    const int got = mg_read(connection_, body.data() + have, kReadBytes);
    body.resize(have + static_cast<size_t>(std::max(got, 0)));
    if (body.size() > max_bytes) return too_long();
    if (got > 0) continue;
    if (got == 0 && static_cast<long long>(body.size()) >= announced) return body;
    CloseAfterwards();
    return absl::UnavailableError("body: it ended before its announced length");
  }
}

bool HttpConnection::Write(const std::string& bytes) {
  const bool written = bytes.empty() || mg_write(connection_, bytes.data(), bytes.size()) ==
                                            static_cast<int>(bytes.size());
  if (!written) CloseAfterwards();
  return written;
}

void HttpConnection::Reply(int status, const std::string& json, const std::string& headers) {
  ReplyAs("application/json", status, json, headers);
}

void HttpConnection::ReplyAs(const char* type, int status, const std::string& body,
                             const std::string& headers) {
  std::string head = absl::StrCat(
      "HTTP/1.1 ", status, " ", mg_get_response_code_text(connection_, status),
      "\r\nContent-Type: ", type, "\r\nContent-Length: ", body.size(),
      "\r\nConnection: ", keep_alive_ ? "keep-alive" : "close", "\r\n", headers, "\r\n");
  // One packet where it is small; no second copy where it is large.
  if (body.size() <= kReadBytes) {
    Write(head + body);
  } else if (Write(head)) {
    Write(body);
  }
}

bool HttpConnection::BeginEvents() {
  return Write(absl::StrCat(
      "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n",
      chunked_ ? "Transfer-Encoding: chunked\r\n" : "",
      "Connection: ", keep_alive_ ? "keep-alive" : "close", "\r\n\r\n"));
}

bool HttpConnection::SendEvents(const std::string& events) {
  if (!chunked_ || events.empty()) return Write(events);
  return Write(absl::StrCat(absl::Hex(events.size()), "\r\n", events, "\r\n"));
}

bool HttpConnection::EndEvents() {
  return Write(chunked_ ? "0\r\n\r\n" : "");
}

bool HttpConnection::PeerGone() {
  if (!looked_up_) {
    socket_ = FindSocket(*mg_get_request_info(connection_));
    looked_up_ = true;
  }
  if (socket_ < 0) return false;
  pollfd entry{socket_, POLLRDHUP, 0};
  const bool gone =
      poll(&entry, 1, 0) > 0 && (entry.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
  if (gone) CloseAfterwards();
  return gone;
}

}  // namespace ballast
