#include "monitor/exporter.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <stdexcept>

namespace ballast {
namespace {

// The whole answer to one request on the loopback.
std::string Ask(int port, const std::string& method, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  REQUIRE(fd >= 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  REQUIRE(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  const std::string request = method + " " + path + " HTTP/1.1\r\nHost: x\r\n\r\n";
  REQUIRE(write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size()));
  shutdown(fd, SHUT_WR);
  std::string answer;
  char buffer[4096];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) answer.append(buffer, n);
  close(fd);
  return answer;
}

TEST_CASE("the exporter serves what is rendered under exactly its paths", "[monitor][exporter]") {
  auto exporter = MetricsExporter::Start({}, [] { return std::string("a 1\n"); });
  REQUIRE(exporter.ok());
  const int port = (*exporter)->port();
  REQUIRE(port > 0);
  const std::string answer = Ask(port, "GET", "/metrics");
  REQUIRE(answer.find("HTTP/1.1 200 ") == 0);
  REQUIRE(answer.find("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n") !=
          std::string::npos);
  REQUIRE(answer.find("\r\n\r\na 1\n") != std::string::npos);
  REQUIRE(Ask(port, "GET", "/healthz").find("HTTP/1.1 200 ") == 0);
  for (const char* path : {"/metrics/", "/metrics/x", "/metricsx", "/", "/../etc/passwd"}) {
    INFO(path);
    REQUIRE(Ask(port, "GET", path).find(" 200 ") == std::string::npos);
  }
  REQUIRE(Ask(port, "POST", "/metrics").find(" 200 ") == std::string::npos);
}

TEST_CASE("a collector that throws costs one scrape", "[monitor][exporter][errors]") {
  int calls = 0;
  auto exporter = MetricsExporter::Start({}, [&]() -> absl::StatusOr<std::string> {
    switch (calls++) {
      case 0:
        throw std::runtime_error("no such table");
      case 1:
        throw 42;
      case 2:
        return absl::InternalError("not now");
      default:
        return std::string("b 2\n");
    }
  });
  REQUIRE(exporter.ok());
  const int port = (*exporter)->port();
  const std::string first = Ask(port, "GET", "/metrics");
  REQUIRE(first.find("HTTP/1.1 500 ") == 0);
  REQUIRE(first.find("no such table\n") != std::string::npos);
  REQUIRE(Ask(port, "GET", "/metrics").find("HTTP/1.1 500 ") == 0);
  REQUIRE(Ask(port, "GET", "/metrics").find("not now\n") != std::string::npos);
  REQUIRE(Ask(port, "GET", "/metrics").find("\r\n\r\nb 2\n") != std::string::npos);
}

TEST_CASE("an address that is taken is an error that names it", "[monitor][exporter][errors]") {
  const auto render = [] { return std::string(); };
  auto first = MetricsExporter::Start({}, render);
  REQUIRE(first.ok());
  const auto second = MetricsExporter::Start({.port = (*first)->port()}, render);
  REQUIRE(second.status().code() == absl::StatusCode::kUnavailable);
  const std::string message(second.status().message());
  INFO(message);
  REQUIRE(message.find("127.0.0.1:" + std::to_string((*first)->port())) != std::string::npos);
  REQUIRE_FALSE(MetricsExporter::Start({.port = 70000}, render).ok());
  REQUIRE_FALSE(MetricsExporter::Start({.host = "192.0.2.1"}, render).ok());
  // When the first is gone the port is free again.
  const int port = (*first)->port();
  first->reset();
  REQUIRE(MetricsExporter::Start({.port = port}, render).ok());
}

}  // namespace
}  // namespace ballast
