#include "comm/control_channel.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <string>
#include <thread>

namespace ballast {
namespace {

std::vector<std::byte> Bytes(const std::string& text) {
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

// The next frame, waiting for it.
absl::StatusOr<std::vector<std::byte>> Receive(ControlChannel& channel) {
  while (true) {
    auto frame = channel.TryReceive();
    if (!frame.ok()) return frame.status();
    if (frame->has_value()) return std::move(**frame);
    auto readable = channel.WaitReadable(10'000);
    if (!readable.ok()) return readable.status();
    if (!*readable) return absl::DeadlineExceededError("no frame");
  }
}

int ConnectRaw(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  REQUIRE(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  return fd;
}

TEST_CASE("frames arrive whole and in order", "[comm][unit]") {
  auto pair = ControlChannel::MakePair();
  REQUIRE(pair.ok());
  REQUIRE(pair->first->TryReceive()->has_value() == false);
  REQUIRE(*pair->first->WaitReadable(1) == false);
  for (const char* text : {"one", "", "three"}) REQUIRE(pair->second->Send(Bytes(text)).ok());
  for (const char* text : {"one", "", "three"}) REQUIRE(*Receive(*pair->first) == Bytes(text));
}

TEST_CASE("what the socket does not take goes out later", "[comm][unit]") {
  auto pair = ControlChannel::MakePair();
  REQUIRE(pair.ok());
  const auto big = Bytes(std::string(8u << 20, 'x'));
  REQUIRE(pair->first->Send(big).ok());
  REQUIRE(pair->first->Send(Bytes("last")).ok());
  REQUIRE(pair->first->HasUnsent());
  std::thread flusher([&] {
    while (pair->first->HasUnsent() && pair->first->WaitReadable(5).ok()) {
    }
  });
  REQUIRE(*Receive(*pair->second) == big);
  REQUIRE(*Receive(*pair->second) == Bytes("last"));
  flusher.join();
}

TEST_CASE("a peer that never reads meets a limit", "[comm][unit][errors]") {
  auto pair = ControlChannel::MakePair();
  REQUIRE(pair.ok());
  const std::vector<std::byte> frame(ControlChannel::kMaxFrameBytes);
  absl::Status status;
  int sent = 0;
  while (status.ok() && sent < 10) {
    status = pair->first->Send(frame);
    ++sent;
  }
  REQUIRE(status.code() == absl::StatusCode::kResourceExhausted);
  REQUIRE(sent == 5);  // four, less what the socket took, are within 256 MiB
  const std::vector<std::byte> longer(ControlChannel::kMaxFrameBytes + 1);
  REQUIRE(pair->first->Send(longer).code() == absl::StatusCode::kInvalidArgument);
}

TEST_CASE("a closed peer is a death after its last frame", "[comm][unit][errors]") {
  auto pair = ControlChannel::MakePair();
  REQUIRE(pair.ok());
  REQUIRE(pair->second->Send(Bytes("will")).ok());
  pair->second.reset();
  REQUIRE(*Receive(*pair->first) == Bytes("will"));
  REQUIRE(Receive(*pair->first).status().code() == absl::StatusCode::kUnavailable);
  REQUIRE(pair->first->Send(Bytes("anyone")).code() == absl::StatusCode::kUnavailable);
}

TEST_CASE("bytes that are not frames are refused", "[comm][unit][errors]") {
  int fds[2];
  REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
  ControlChannel channel(fds[0]);
  SECTION("wrong magic") {
    REQUIRE(write(fds[1], "GET / HTTP/1.1\r\n", 16) == 16);
  }
  SECTION("a frame that is too long") {
    REQUIRE(write(fds[1], "BCL1\xff\xff\xff\xff", 8) == 8);
  }
  REQUIRE(Receive(channel).status().code() == absl::StatusCode::kInvalidArgument);
  close(fds[1]);
}

TEST_CASE("ranks introduce themselves and strangers do not count", "[comm][unit]") {
  auto listener = ControlListener::Create("127.0.0.1");
  REQUIRE(listener.ok());
  const int port = (*listener)->port();
  constexpr uint64_t kToken = 0x1234567890abcdef;
  const int silent = ConnectRaw(port);
  const int rude = ConnectRaw(port);
  REQUIRE(write(rude, "GET / HTTP/1.1\r\n", 16) == 16);
  // The leader's own rank connects before it accepts.
  auto own = ConnectToLeader("127.0.0.1", port, kToken, 0, 5'000);
  REQUIRE(own.ok());
  auto wrong_token = ConnectToLeader("127.0.0.1", port, kToken + 1, 1, 5'000);
  auto wrong_rank = ConnectToLeader("127.0.0.1", port, kToken, 2, 5'000);
  auto twice = ConnectToLeader("127.0.0.1", port, kToken, 0, 5'000);
  absl::StatusOr<std::unique_ptr<ControlChannel>> late = absl::UnknownError("");
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    late = ConnectToLeader("localhost", port, kToken, 1, 5'000);
  });
  auto channels = (*listener)->AcceptRanks(2, kToken, 10'000);
  other.join();
  REQUIRE(channels.ok());
  REQUIRE(late.ok());
  REQUIRE((*channels)[0]->Send(Bytes("to rank 0")).ok());
  REQUIRE((*channels)[1]->Send(Bytes("to rank 1")).ok());
  REQUIRE(*Receive(**own) == Bytes("to rank 0"));
  REQUIRE(*Receive(**late) == Bytes("to rank 1"));
  for (auto* refused : {&wrong_token, &wrong_rank, &twice}) {
    REQUIRE(Receive(***refused).status().code() == absl::StatusCode::kUnavailable);
  }
  close(silent);
  close(rude);
}

TEST_CASE("missing ranks are named at the deadline", "[comm][unit][errors]") {
  auto listener = ControlListener::Create("127.0.0.1");
  REQUIRE(listener.ok());
  auto one = ConnectToLeader("127.0.0.1", (*listener)->port(), 7, 1, 5'000);
  REQUIRE(one.ok());
  const auto channels = (*listener)->AcceptRanks(3, 7, 100);
  REQUIRE(channels.status().code() == absl::StatusCode::kDeadlineExceeded);
  REQUIRE(std::string(channels.status().message()).ends_with("missing: 0 2"));
}

TEST_CASE("a leader that is not there is a deadline", "[comm][unit][errors]") {
  int port = 0;
  {
    auto listener = ControlListener::Create("127.0.0.1");
    REQUIRE(listener.ok());
    port = (*listener)->port();
  }
  REQUIRE(ConnectToLeader("127.0.0.1", port, 7, 1, 60).status().code() ==
          absl::StatusCode::kDeadlineExceeded);
  REQUIRE(ConnectToLeader("no.such.host.invalid", port, 7, 1, 60).status().code() ==
          absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace ballast
