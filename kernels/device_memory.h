// A device as the runtime uses it: its memory, streams, events and copies. Built where CUDA is.
#ifndef BALLAST_KERNELS_DEVICE_MEMORY_H_
#define BALLAST_KERNELS_DEVICE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "kernels/stream.h"

struct CUevent_st;
struct CUgraphExec_st;

namespace ballast::cuda {

// The memory of the device that is current. Write from the heap goes through the driver's own
// pinned memory, so small ones do not wait for the device.
Memory& DeviceMemory();
// The host's, pinned: copies between it and a device run beside what the host does.
Memory& PinnedMemory();

// Device `index` is this thread's from now on. Before the first call of CUDA: kernels are loaded at
// once, since a load in mid-step would wait for kernels that wait for others.
// ERRORS kUnavailable: there is none of that number; kFailedPrecondition: it is older than what the
//        kernels are for (sm_80), or CUDA_DEVICE_MAX_CONNECTIONS leaves too few queues
absl::Status UseDevice(int32_t index);

// Bytes of the memory of the device that is current and that nobody has taken; 0: there is none.
int64_t FreeMemory();

// From and to the device, or within it; the host's memory should be pinned.
// STREAM asynchronous. ERRORS kInternal
absl::Status Copy(void* to, const void* from, size_t bytes, Stream stream);

// Until all that was put on the stream is done. ERRORS kInternal: some of it failed
absl::Status Wait(Stream stream);
absl::StatusOr<bool> IsDone(Stream stream);

// A stream that waits for no other.
class OwnedStream {
 public:
  enum class Priority { kHigh, kLow };  // kLow: gets what others leave
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

// Work that a stream was given once, to be launched again and again.
class Graph {
 public:
  // Runs `work`, which puts on `stream` what the graph is to hold, and nothing on others; none of
  // it is done then. ERRORS those of `work`; kInternal: it cannot be captured
  static absl::StatusOr<Graph> Capture(Stream stream, const std::function<absl::Status()>& work);
  Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }
  ~Graph();
  absl::Status Launch(Stream stream) const;

 private:
  explicit Graph(CUgraphExec_st* graph) : graph_(graph) {}
  CUgraphExec_st* graph_;
};

}  // namespace ballast::cuda

#endif  // BALLAST_KERNELS_DEVICE_MEMORY_H_
