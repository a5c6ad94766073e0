#include "deploy/http_client.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/status.h"

namespace ballast {

absl::StatusOr<HttpClient> HttpClient::Connect(const std::string& host, int port, int timeout_ms) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  if (inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("host: '", host, "' is no IPv4 address"));
  }
  HttpClient client(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval timeout{timeout_ms / 1000, timeout_ms % 1000 * 1000};
  setsockopt(client.fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
  setsockopt(client.fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
  const int on = 1;
  setsockopt(client.fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(client.fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot connect to ", host, ":", port, ": ", std::strerror(errno)));
  }
  return client;
}

HttpClient::HttpClient(HttpClient&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), buffer_(std::move(other.buffer_)) {}

HttpClient& HttpClient::operator=(HttpClient&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(buffer_, other.buffer_);
  return *this;
}

HttpClient::~HttpClient() {
  Close();
}

void HttpClient::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

std::string FormatRequest(const std::string& method, const std::string& path,
                          const std::string& body, const std::string& headers) {
  return absl::StrCat(method, " ", path,
                      " HTTP/1.1\r\nHost: ballast\r\nContent-Length: ", body.size(), "\r\n",
                      headers, "\r\n", body);
}

absl::StatusOr<HttpResponse> HttpClient::Request(const std::string& method, const std::string& path,
                                                 const std::string& body,
                                                 const std::string& headers) {
  BALLAST_RETURN_IF_ERROR(Send(FormatRequest(method, path, body, headers)));
  return Receive();
}

absl::Status HttpClient::Send(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return absl::UnavailableError(absl::StrCat("send: ", std::strerror(errno)));
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return absl::OkStatus();
}

absl::Status HttpClient::Fill() {
  char bytes[16384];
  while (true) {
    const ssize_t got = recv(fd_, bytes, sizeof bytes, 0);
    if (got > 0) {
      buffer_.append(bytes, static_cast<size_t>(got));
      return absl::OkStatus();
    }
    if (got == 0) return absl::UnavailableError("the server closed the connection");
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return absl::DeadlineExceededError("the server does not answer");
    }
    if (errno != EINTR) return absl::UnavailableError(std::strerror(errno));
  }
}

absl::StatusOr<std::string> HttpClient::TakeLine() {
  size_t end = 0;
  while ((end = buffer_.find("\r\n")) == std::string::npos) BALLAST_RETURN_IF_ERROR(Fill());
  std::string line = buffer_.substr(0, end);
  buffer_.erase(0, end + 2);
  return line;
}

absl::StatusOr<std::string> HttpClient::TakeBytes(size_t count) {
  while (buffer_.size() < count) BALLAST_RETURN_IF_ERROR(Fill());
  std::string bytes = buffer_.substr(0, count);
  buffer_.erase(0, count);
  return bytes;
}

absl::StatusOr<HttpResponse> HttpClient::ReceiveHead() {
  HttpResponse response;
  BALLAST_ASSIGN_OR_RETURN(const std::string status_line, TakeLine());
  if (!status_line.starts_with("HTTP/1.1 ") || status_line.size() < 12) {
    return absl::InvalidArgumentError(absl::StrCat("not HTTP: ", status_line));
  }
  response.status = std::atoi(status_line.c_str() + 9);
  while (true) {
    BALLAST_ASSIGN_OR_RETURN(const std::string line, TakeLine());
    if (line.empty()) break;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat("no header: ", line));
    }
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    const size_t value = line.find_first_not_of(' ', colon + 1);
    response.headers[name] = value == std::string::npos ? "" : line.substr(value);
  }
  if (response.status == 100) return ReceiveHead();
  return response;
}

absl::StatusOr<std::string> HttpClient::ReceiveChunk() {
  BALLAST_ASSIGN_OR_RETURN(const std::string size_line, TakeLine());
  const size_t size = std::strtoull(size_line.c_str(), nullptr, 16);
  BALLAST_ASSIGN_OR_RETURN(std::string chunk, TakeBytes(size));
  BALLAST_RETURN_IF_ERROR(TakeLine().status());
  return chunk;
}

absl::StatusOr<HttpResponse> HttpClient::Receive() {
  BALLAST_ASSIGN_OR_RETURN(HttpResponse response, ReceiveHead());
  if (response.headers["transfer-encoding"] == "chunked") {
    while (true) {
      BALLAST_ASSIGN_OR_RETURN(const std::string chunk, ReceiveChunk());
      if (chunk.empty()) return response;
      response.body += chunk;
    }
  }
  if (const auto length = response.headers.find("content-length");
      length != response.headers.end()) {
    BALLAST_ASSIGN_OR_RETURN(response.body,
                             TakeBytes(std::strtoull(length->second.c_str(), nullptr, 10)));
    return response;
  }
  while (Fill().ok()) {
  }
  response.body = std::exchange(buffer_, "");
  return response;
}

}  // namespace ballast
