// A device as the runtime uses it: its memory, streams, events and copies. Built where CUDA is.
#ifndef BALLAST_KERNELS_DEVICE_MEMORY_H_
#define BALLAST_KERNELS_DEVICE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "kernels/stream.h"

struct CUevent_st;

namespace ballast::cuda {

// The memory of the device that is current. Write from the heap goes through the driver's own
// pinned memory, so small ones do not wait for the device.
Memory& DeviceMemory();
// The host's, pinned: copies between it and a device run beside what the host does.
Memory& PinnedMemory();

// Device `index mod the number of devices` is this thread's from now on. ERRORS kUnavailable: there
// is none; kFailedPrecondition: it is older than what the kernels are for (sm_80)
absl::Status UseDevice(int32_t index);

// Bytes of the memory of the device that is current; 0 where there is none.
int64_t AllMemory();

// From and to the device, or within it; the host's memory should be pinned.
// STREAM asynchronous. ERRORS kInternal
absl::Status Copy(void* to, const void* from, size_t bytes, Stream stream);

// Until all that was put on the stream is done. ERRORS kInternal: some of it failed
absl::Status Wait(Stream stream);
absl::StatusOr<bool> IsDone(Stream stream);

// A stream that waits for no other.
class OwnedStream {
 public:
  enum class Priority { kNormal, kLow };  // kLow: gets what others leave
  static absl::StatusOr<OwnedStream> Create(Priority priority);
  OwnedStream(OwnedStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  OwnedStream& operator=(OwnedStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~OwnedStream();
  Stream get() const { return stream_; }

 private:
  explicit OwnedStream(Stream stream) : stream_(stream) {}
  Stream stream_;
};

// A mark on a stream.
class Event {
 public:
  static absl::StatusOr<Event> Create();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event();
  absl::Status Record(Stream stream);
  // Whether the stream has come to it; true where it was never recorded.
  absl::StatusOr<bool> IsDone() const;
  // What comes on the stream from now on is done after it.
  absl::Status HoldBack(Stream stream) const;

 private:
  explicit Event(CUevent_st* event) : event_(event) {}
  CUevent_st* event_;
};

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_DEVICE_MEMORY_H_
