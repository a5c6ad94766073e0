// What the runtime does with a device beside kernels: memory, copies, streams, events.
#include "kernels/device_memory.h"

#include <catch2/catch.hpp>
#include <vector>

#include "tests/gpu/schedules.h"

namespace ballast::cuda {
namespace {

std::vector<std::byte> Bytes(size_t count, int first) {
  std::vector<std::byte> bytes;
  for (size_t i = 0; i < count; ++i) bytes.push_back(static_cast<std::byte>(first + i));
  return bytes;
}

TEST_CASE("memory of every kind begins with zeros and keeps what is written", "[device][memory]") {
  for (Memory* memory : {&HostMemory(), &DeviceMemory(), &PinnedMemory()}) {
    Buffer buffer(memory);
    REQUIRE(buffer.EnsureSize(300).ok());
    std::vector<std::byte> read(300, std::byte{1});
    REQUIRE(memory->Read(read, buffer.data(), nullptr).ok());
    REQUIRE(read == std::vector<std::byte>(300));
    std::vector<std::byte> wrote = Bytes(200, 7);
    REQUIRE(buffer.Assign(wrote, nullptr).ok());
    REQUIRE(buffer.size() == 300);
    const std::vector<std::byte> expected = wrote;
    wrote.assign(200, std::byte{0});  // it may change at once
    read.resize(200);
    REQUIRE(memory->Read(read, buffer.data(), nullptr).ok());
    REQUIRE(read == expected);
    REQUIRE(buffer.EnsureSize(301).ok());
    REQUIRE(buffer.size() >= 301);
    Buffer other = std::move(buffer);
    REQUIRE(buffer.data() == nullptr);
    REQUIRE(memory->Read(read, other.data(), nullptr).ok());
  }
}

TEST_CASE("a stream is in order and waits for the events of others", "[device][memory][streams]") {
  ballast::testing::ForEachSchedule([](int round) {
    auto first = OwnedStream::Create(OwnedStream::Priority::kHigh);
    auto second = OwnedStream::Create(OwnedStream::Priority::kLow);
    auto event = Event::Create();
    REQUIRE((first.ok() && second.ok() && event.ok()));
    REQUIRE(*event->IsDone());  // it was never recorded
    Buffer from(&PinnedMemory()), to(&PinnedMemory()), a(&DeviceMemory()), b(&DeviceMemory());
    for (Buffer* buffer : {&from, &to, &a, &b}) REQUIRE(buffer->EnsureSize(4096).ok());
    const std::vector<std::byte> bytes = Bytes(4096, round);
    REQUIRE(from.Assign(bytes, nullptr).ok());
    REQUIRE(Copy(a.data(), from.data(), 4096, first->get()).ok());
    REQUIRE(event->Record(first->get()).ok());
    REQUIRE(event->HoldBack(second->get()).ok());
    REQUIRE(Copy(b.data(), a.data(), 4096, second->get()).ok());
    REQUIRE(Copy(to.data(), b.data(), 4096, second->get()).ok());
    for (bool done = false; !done;) {
      const auto is_done = IsDone(second->get());
      REQUIRE(is_done.ok());
      done = *is_done;
    }
    REQUIRE(*event->IsDone());
    REQUIRE(std::vector<std::byte>(to.data(), to.data() + 4096) == bytes);
    REQUIRE(Wait(first->get()).ok());
  });
}

}  // namespace
}  // namespace ballast::cuda
