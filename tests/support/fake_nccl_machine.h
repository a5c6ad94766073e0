// What stands behind fake_nccl.h: streams, communicators and messages of all ranks.
#ifndef BALLAST_TESTS_SUPPORT_FAKE_NCCL_MACHINE_H_
#define BALLAST_TESTS_SUPPORT_FAKE_NCCL_MACHINE_H_

#include <atomic>
#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl_api.h"
#include "tests/support/fake_nccl.h"

namespace ballast::testing::fake_nccl {

struct Comm;
struct Event {
  std::atomic<int> pending = 0;
  bool freed = false;
};

// A message of a group: its bytes and where it goes or comes from.
struct Part {
  bool is_send;
  int peer;
  const std::byte* from;
  std::byte* to;
  size_t bytes;
};

// Work of a stream: the messages of a group, a copy or an event.
struct Op {
  Comm* comm = nullptr;  // of a group
  std::vector<Part> parts = {};
  bool posted = false;
  size_t open = 0;  // parts without their counterpart
  Event* event = nullptr;
  // Of a group on a device's stream: whether that has come to it, and may go on after it.
  std::atomic<bool> reached = true, done = false;
};
struct Stream {
  GpuStream handle = nullptr;  // what the ranks know it by
  std::deque<std::shared_ptr<Op>> ops = {};
};

// Messages from one rank to another that have not met.
struct Box {
  struct Entry {
    std::shared_ptr<Op> op;
    Part part;
  };
  std::deque<Entry> sends, recvs;
};

// The ranks of one communicator.
struct Clique {
  std::string name;
  std::vector<Comm*> members;  // nullptr: has not joined
  std::map<std::pair<int, int>, Box> boxes;
  size_t num_joined = 0;
  size_t num_finalized = 0;
};

struct Comm {
  int process = 0;
  int rank = 0;
  Clique* clique = nullptr;
  bool freed = false;
  bool finalized = false;
  int num_shrinks = 0;
  bool shrinking = false;                   // an abort hands out the child all the same, as it is
  NcclResult error = NcclResult::kSuccess;  // in the background
  std::string error_text = {};
  // What was begun: through when `ready`, and so many polls later; then `finish`.
  bool busy = false;
  int polls = 0;
  std::function<bool()> ready = {};
  std::function<void()> finish = {};
};

// The status of a call that gives `result`, as the library would make it.
absl::Status Result(NcclResult result, const char* call, const std::string& text = "");

// All ranks' streams and communicators. THREADS one at a time: fake_nccl.cc holds a lock
class FakeMachine {
 public:
  // Begins a communicator's life; the clique of that name settles when all have joined.
  Comm* Join(const std::string& name, int size, int rank, int process);
  void Begin(Comm* comm, std::function<bool()> ready, std::function<void()> finish);
  // ERRORS as NCCL: a call that may not come now
  absl::Status CheckReady(Comm* comm, const char* call);
  // Appends to a stream.
  void Put(GpuStream stream, std::shared_ptr<Op> op);
  // Whether a stream has work of `comm`.
  bool Running(const Comm* comm) const;
  // Takes away all that runs for `comm`, as if its kernels had ended.
  void Drop(Comm* comm);
  // Does what the streams can do now.
  void Advance();

  FakeNccl::Device device;  // empty: streams are the fake's own
  int polls_in_progress = 0;
  std::vector<GpuIdentity> gpus;  // by process
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Comm>> comms;  // freed ones stay, so that late calls show
  std::vector<std::unique_ptr<Event>> events;
  int uses_after_free = 0;

 private:
  Stream& StreamOf(GpuStream handle);
  void Post(const std::shared_ptr<Op>& op);
  bool Match(Clique& clique);
  void CheckDevices(Clique& clique);

  std::map<std::string, Clique> cliques_;
};

}  // namespace ballast::testing::fake_nccl

#endif  // BALLAST_TESTS_SUPPORT_FAKE_NCCL_MACHINE_H_
