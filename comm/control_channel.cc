#include "comm/control_channel.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <thread>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr uint32_t kFrameMagic = 0x314c4342;  // "BCL1"
constexpr uint32_t kIntroMagic = 0x31494342;  // "BCI1"
constexpr size_t kHeaderBytes = 8;
constexpr size_t kIntroBytes = 16;  // magic u32, rank i32, token u64
constexpr size_t kMaxUnsentBytes = 256u << 20;
constexpr size_t kReceiveBytes = 64u << 10;
constexpr size_t kMaxStrangers = 64;  // connections that have not introduced themselves
constexpr int kConnectRetryMs = 20;

absl::Status PeerGone(const char* what, int error) {
  return absl::UnavailableError(absl::StrCat(
      "control channel: ", what, ": ", error == 0 ? "closed by the peer" : std::strerror(error)));
}

absl::Status SystemError(const std::string& what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

// Milliseconds until `deadline_ns`, rounded up, at least 0.
int RemainingMs(int64_t deadline_ns) {
  const int64_t left = deadline_ns - NowNs();
  return left <= 0 ? 0 : static_cast<int>((left + 999'999) / 1'000'000);
}

int64_t DeadlineNs(int timeout_ms) {
  return NowNs() + int64_t{timeout_ms} * 1'000'000;
}

void MakeNonBlocking(int fd) {
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // fails, harmlessly, where not TCP
}

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

absl::StatusOr<Addresses> Resolve(const std::string& host, int port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* list = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("control channel: host '", host, "': ", gai_strerror(error)));
  }
  return Addresses(list);
}

int PortOf(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return -1;
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                   : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

}  // namespace

// ---- ControlChannel ----------------------------------------------------------------------------

ControlChannel::ControlChannel(int fd) : fd_(fd) {
  MakeNonBlocking(fd);
}

ControlChannel::~ControlChannel() {
  close(fd_);
}

void ControlChannel::Shutdown() {
  shutdown(fd_, SHUT_RDWR);
}

absl::StatusOr<std::pair<std::unique_ptr<ControlChannel>, std::unique_ptr<ControlChannel>>>
ControlChannel::MakePair() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) return SystemError("socketpair");
  return std::make_pair(std::make_unique<ControlChannel>(fds[0]),
                        std::make_unique<ControlChannel>(fds[1]));
}

absl::Status ControlChannel::Send(std::span<const std::byte> payload) {
  if (payload.size() > kMaxFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("control channel: a frame of ", payload.size(),
                                                   " bytes; at most ", kMaxFrameBytes));
  }
  const std::lock_guard lock(send_mutex_);
  const size_t unsent = out_.size() - out_at_;
  if (unsent + kHeaderBytes + payload.size() > kMaxUnsentBytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "control channel: ", unsent, " bytes wait to be sent; the peer does not read"));
  }
  const uint32_t header[2] = {kFrameMagic, static_cast<uint32_t>(payload.size())};
  const auto head = std::as_bytes(std::span(header));
  out_.insert(out_.end(), head.begin(), head.end());
  out_.insert(out_.end(), payload.begin(), payload.end());
  return FlushLocked();
}

absl::Status ControlChannel::Flush() {
  const std::lock_guard lock(send_mutex_);
  return FlushLocked();
}

absl::Status ControlChannel::FlushLocked() {
  while (out_at_ < out_.size()) {
    const ssize_t sent =
        send(fd_, out_.data() + out_at_, out_.size() - out_at_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (sent < 0) return PeerGone("send", errno);
    out_at_ += static_cast<size_t>(sent);
  }
  // Sent bytes are dropped once they are the larger part, so that each byte moves once on average.
  if (out_at_ == out_.size() || out_at_ > out_.size() / 2) {
    out_.erase(out_.begin(), out_.begin() + static_cast<ptrdiff_t>(out_at_));
    out_at_ = 0;
  }
  return absl::OkStatus();
}

size_t ControlChannel::unsent_bytes() const {
  const std::lock_guard lock(send_mutex_);
  return out_.size() - out_at_;
}

bool ControlChannel::HasFrame() const {
  const size_t have = in_.size() - in_at_;
  if (have < kHeaderBytes) return false;
  uint32_t header[2];
  std::memcpy(header, in_.data() + in_at_, kHeaderBytes);
  return header[0] != kFrameMagic || header[1] > kMaxFrameBytes || have >= kHeaderBytes + header[1];
}

absl::StatusOr<std::optional<std::vector<std::byte>>> ControlChannel::TakeFrame() {
  if (!HasFrame()) return std::nullopt;
  uint32_t header[2];
  std::memcpy(header, in_.data() + in_at_, kHeaderBytes);
  if (header[0] != kFrameMagic) {
    return absl::InvalidArgumentError("control channel: the peer does not speak this protocol");
  }
  if (header[1] > kMaxFrameBytes) {
    return absl::InvalidArgumentError(absl::StrCat("control channel: a frame of ", header[1],
                                                   " bytes; at most ", kMaxFrameBytes));
  }
  const auto begin = in_.begin() + static_cast<ptrdiff_t>(in_at_ + kHeaderBytes);
  std::vector<std::byte> payload(begin, begin + header[1]);
  in_at_ += kHeaderBytes + header[1];
  if (in_at_ == in_.size()) {
    in_.clear();
    in_at_ = 0;
  }
  return payload;
}

absl::StatusOr<std::optional<std::vector<std::byte>>> ControlChannel::TryReceive() {
  // A failure to send means a dead peer; what it said before its death is still delivered, and the
  // end of the stream then reports the death.
  Flush().IgnoreError();
  while (true) {
    BALLAST_ASSIGN_OR_RETURN(auto frame, TakeFrame());
    if (frame.has_value()) return frame;
    in_.erase(in_.begin(), in_.begin() + static_cast<ptrdiff_t>(in_at_));
    in_at_ = 0;
    const size_t have = in_.size();
    in_.resize(have + kReceiveBytes);
    const ssize_t got = recv(fd_, in_.data() + have, kReceiveBytes, MSG_DONTWAIT);
    const int error = got < 0 ? errno : 0;
    in_.resize(have + static_cast<size_t>(std::max<ssize_t>(got, 0)));
    if (got > 0 || error == EINTR) continue;
    if (error == EAGAIN || error == EWOULDBLOCK) return std::nullopt;
    return PeerGone("receive", error);
  }
}

absl::StatusOr<bool> ControlChannel::WaitReadable(int timeout_ms) {
  const int64_t deadline = DeadlineNs(timeout_ms);
  while (!HasFrame()) {
    pollfd entry{fd_, static_cast<short>(POLLIN | (HasUnsent() ? POLLOUT : 0)), 0};
    const int ready = poll(&entry, 1, RemainingMs(deadline));
    if (ready < 0 && errno != EINTR) return SystemError("control channel: poll");
    if (ready > 0 && (entry.revents & ~POLLOUT) != 0) return true;
    if (ready > 0) BALLAST_RETURN_IF_ERROR(Flush());
    if (ready <= 0 && RemainingMs(deadline) == 0) return false;
  }
  return true;
}

// ---- ControlListener ---------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<ControlListener>> ControlListener::Create(const std::string& host) {
  BALLAST_ASSIGN_OR_RETURN(const Addresses addresses, Resolve(host, 0, AI_PASSIVE));
  const int fd = socket(addresses->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return SystemError("control listener: socket");
  if (bind(fd, addresses->ai_addr, addresses->ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0) {
    const absl::Status status = SystemError(absl::StrCat("control listener: host '", host, "'"));
    close(fd);
    return status;
  }
  return std::unique_ptr<ControlListener>(new ControlListener(fd, PortOf(fd)));
}

ControlListener::~ControlListener() {
  close(fd_);
}

namespace {

// A connection that has not yet said who it is. Owns the socket until Release.
struct Stranger {
  explicit Stranger(int socket_fd) : fd(socket_fd) { MakeNonBlocking(fd); }
  Stranger(Stranger&& other) noexcept
      : fd(std::exchange(other.fd, -1)), intro(other.intro), received(other.received) {}
  Stranger& operator=(Stranger&& other) noexcept {
    std::swap(fd, other.fd);
    std::swap(intro, other.intro);
    std::swap(received, other.received);
    return *this;
  }
  ~Stranger() {
    if (fd >= 0) close(fd);
  }
  int Release() { return std::exchange(fd, -1); }

  // Reads on; false when the connection ended.
  bool Read() {
    const ssize_t got = recv(fd, intro.data() + received, intro.size() - received, MSG_DONTWAIT);
    if (got > 0) received += static_cast<size_t>(got);
    return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
  }
  bool complete() const { return received == intro.size(); }

  // The rank that it says it is, or -1 when it does not know the token.
  int32_t Rank(uint64_t token) const {
    ByteReader reader(intro);
    const auto magic = reader.Get<uint32_t>();
    const auto rank = reader.Get<int32_t>();
    return magic == kIntroMagic && reader.Get<uint64_t>() == token ? rank : -1;
  }

  int fd;
  std::array<std::byte, kIntroBytes> intro{};
  size_t received = 0;
};

}  // namespace

absl::StatusOr<std::vector<std::unique_ptr<ControlChannel>>> ControlListener::AcceptRanks(
    int num_ranks, uint64_t token, int timeout_ms) {
  const int64_t deadline = DeadlineNs(timeout_ms);
  std::vector<std::unique_ptr<ControlChannel>> channels(static_cast<size_t>(num_ranks));
  std::vector<Stranger> strangers;
  int missing = num_ranks;
  while (missing > 0) {
    std::vector<pollfd> entries = {{fd_, POLLIN, 0}};
    for (const Stranger& stranger : strangers) entries.push_back({stranger.fd, POLLIN, 0});
    const int ready = poll(entries.data(), entries.size(), RemainingMs(deadline));
    if (ready < 0 && errno != EINTR) return SystemError("control listener: poll");
    if (ready <= 0 && RemainingMs(deadline) == 0) break;
    for (size_t i = strangers.size(); ready > 0 && i-- > 0;) {
      if (entries[i + 1].revents == 0) continue;
      Stranger& stranger = strangers[i];
      if (stranger.Read() && !stranger.complete()) continue;
      const int32_t rank = stranger.complete() ? stranger.Rank(token) : -1;
      if (rank >= 0 && rank < num_ranks && channels[static_cast<size_t>(rank)] == nullptr) {
        channels[static_cast<size_t>(rank)] = std::make_unique<ControlChannel>(stranger.Release());
        --missing;
      }
      strangers.erase(strangers.begin() + static_cast<ptrdiff_t>(i));
    }
    if (ready > 0 && entries[0].revents != 0) {
      const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd >= 0) strangers.emplace_back(fd);
      if (strangers.size() > kMaxStrangers) strangers.erase(strangers.begin());
    }
  }
  if (missing == 0) return channels;
  std::string names;
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (channels[static_cast<size_t>(rank)] == nullptr) absl::StrAppend(&names, " ", rank);
  }
  return absl::DeadlineExceededError(
      absl::StrCat("control listener: after ", timeout_ms, " ms these ranks are missing:", names));
}

// ---- the ranks' side ---------------------------------------------------------------------------

namespace {

// A connected socket, or -1 when nobody answers at `address` before the deadline.
int TryConnect(const addrinfo& address, int64_t deadline) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -1;
  int error = connect(fd, address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    pollfd entry{fd, POLLOUT, 0};
    socklen_t length = sizeof error;
    error = ETIMEDOUT;
    if (poll(&entry, 1, RemainingMs(deadline)) > 0) {
      getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    }
  }
  if (error == 0) return fd;
  close(fd);
  return -1;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ControlChannel>> ConnectToLeader(const std::string& host, int port,
                                                                uint64_t token, int rank,
                                                                int timeout_ms) {
  const int64_t deadline = DeadlineNs(timeout_ms);
  BALLAST_ASSIGN_OR_RETURN(const Addresses addresses, Resolve(host, port, 0));
  int fd = -1;
  while (true) {
    for (const addrinfo* a = addresses.get(); a != nullptr && fd < 0; a = a->ai_next) {
      fd = TryConnect(*a, deadline);
    }
    if (fd >= 0) break;
    if (RemainingMs(deadline) == 0) {
      return absl::DeadlineExceededError(absl::StrCat("rank ", rank, ": no leader at ", host, ":",
                                                      port, " within ", timeout_ms, " ms"));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(kConnectRetryMs));
  }
  ByteWriter intro;
  intro.Put(kIntroMagic);
  intro.Put(int32_t{rank});
  intro.Put(token);
  BALLAST_CHECK(intro.bytes().size() == kIntroBytes);
  // The buffer of a new connection always has room for these few bytes.
  const ssize_t sent = send(fd, intro.bytes().data(), kIntroBytes, MSG_NOSIGNAL);
  auto channel = std::make_unique<ControlChannel>(fd);
  if (sent != static_cast<ssize_t>(kIntroBytes)) return PeerGone("introduction", errno);
  return channel;
}

}  // namespace ballast
