#ifndef BALLAST_RUNTIME_VERIFIER_H_
#define BALLAST_RUNTIME_VERIFIER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "runtime/control_frames.h"
#include "runtime/expert_store.h"

namespace ballast {

// Rereads the parameters of a rank's experts while it serves, and compares them with the checksums
// that they had when they were packed: what does not match is not what the model says.
//
// It goes through all copies in order of (layer, expert), one slice at a time, over and over: one
// pass in every `period_ns`, or as fast as it is called while a pass is asked for. A copy that
// comes or leaves on the way belongs to the next pass. A copy in a device's memory is read by the
// device, which is looked after a while later. THREADS one (the step thread). Pure but for
// the store's memory: the clock is the caller's.
class Verifier {
 public:
  struct Options {
    int32_t num_layers = 0;
    int32_t num_experts = 0;
    int64_t period_ns = 0;  // 0: only when asked
    size_t slice_bytes = 64 << 10;
  };
  // `store` must live longer.
  Verifier(const Options& options, const ExpertStore* store);

  // Reads a slice, if one is due.
  void Advance(int64_t now_ns);
  // When the next slice is due; INT64_MAX: never.
  int64_t due_ns() const { return due_ns_; }

  // The copy that is being read is begun again: its memory may have moved.
  void Forget() { reading_ = {}; }
  // A pass from the beginning, at once: in every call of Advance a slice until it is complete.
  void Hurry();
  // The same, for somebody who waits for what it reads.
  void Ask();
  // What the pass that was asked for has read, once, when it is complete.
  std::optional<std::vector<VerifiedCopy>> TakePass() { return std::exchange(finished_, {}); }

  // Copies that do not match, since the last call.
  std::vector<VerifiedCopy> TakeCorrupted() { return std::exchange(corrupted_, {}); }
  // Copies read so far.
  int64_t copies_read() const { return copies_read_; }

 private:
  void NextCopy();
  void EndCopy(uint64_t found);
  void Schedule(int64_t now_ns, size_t read);

  const Options options_;
  const ExpertStore* const store_;
  int32_t layer_ = 0, expert_ = -1;                    // the copy being read
  BlockMemory::Reading reading_;                       // of it; block -1: none yet
  std::vector<VerifiedCopy> pass_;                     // what this pass has read
  std::optional<std::vector<VerifiedCopy>> finished_;  // a pass that was asked for
  std::vector<VerifiedCopy> corrupted_;
  bool hurried_ = false, asked_ = false;
  int64_t due_ns_ = 0;
  int64_t copies_read_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_VERIFIER_H_
