// NCCL and the CUDA runtime for ranks that are threads of one process: host memory stands for
// devices, and sends find their receives as in NCCL.
#ifndef BALLAST_TESTS_SUPPORT_FAKE_NCCL_H_
#define BALLAST_TESTS_SUPPORT_FAKE_NCCL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/nccl_api.h"

namespace ballast::testing {

// The machine that all ranks share. What it keeps to, as NCCL does:
//   - a communicator settles when all of its ranks have joined;
//   - a group reaches its stream when it has settled (some polls later), not before;
//   - work of a stream is done in its order; a group is done when every one of its messages has
//     found its counterpart, in the order of the calls for each pair of ranks;
//   - a message whose two lengths differ is an error in the background of both ranks;
//   - a call on a communicator that has not settled is a wrong use; so is plain shrinking while
//     something runs;
//   - nothing ever ends by a time-out: what is left waiting stays so.
// Streams advance when somebody asks (Settled, Happened). THREADS any
class FakeNccl {
 public:
  // What goes wrong on one rank.
  struct Faults {
    absl::Status device = {};     // of CurrentDevice
    absl::Status unique_id = {};  // of MakeUniqueId
    NcclResult init = NcclResult::kSuccess;
    int lost_after_groups = -1;  // then a remote error is in the background, once; -1: never
    NcclResult shrink = NcclResult::kSuccess;
    bool abort_hangs = false;   // until Release
    bool shrink_hangs = false;  // the same, before it has done anything
  };
  // What a rank's process has asked for.
  struct Seen {
    int inits = 0;
    int groups = 0;
    int messages = 0;  // sends and receives
    int copies = 0;
    int finalizes = 0;
    int aborts = 0;
    int shrinks_with_abort = 0;
    int plain_shrinks = 0;
    std::vector<int> max_ctas = {};  // of each communicator, in order
  };

  // A device whose streams the ranks use instead of the fake's. THREADS any
  struct Device {
    // Runs `work` in the order of the stream. It calls nothing of the fake's.
    std::function<void(GpuStream stream, std::function<void()> work)> run;
    // What comes on the stream from now on comes after `done` has said yes.
    std::function<void(GpuStream stream, std::function<bool()> done)> hold;
    std::function<void()> advance;  // its streams go on a little
  };

  explicit FakeNccl(int num_ranks);
  ~FakeNccl();

  int num_ranks() const;
  // How many times Settled says no after each call that begins something.
  void set_polls_in_progress(int polls);
  void set_device(Device device);    // before the ranks start
  Faults& faults(int rank);          // before the ranks start
  GpuIdentity& gpu(int rank);        // before the ranks start; all different at first
  const Seen& seen(int rank) const;  // after they have ended
  NcclApi* api(int rank);            // the process of `rank`
  GpuStream stream(int rank);        // one of that process
  void Release();                    // ends what hangs
  int hanging_shrinks() const;       // 0: those that hung have returned

  // Communicators and events that nobody has freed.
  int live_communicators() const;
  int live_events() const;
  // Calls on what was freed before.
  int uses_after_free() const;

 private:
  struct Impl;
  class Api;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_FAKE_NCCL_H_
