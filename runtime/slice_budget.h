#ifndef BALLAST_RUNTIME_SLICE_BUDGET_H_
#define BALLAST_RUNTIME_SLICE_BUDGET_H_

#include <cstdint>

#include "runtime/copy_store.h"

namespace ballast {

// What a slice of a migration is cut from.
enum class SliceOf : uint8_t {
  kStep,  // a step that is under way waits for the slice
  kRest,  // nobody waits
};

// How long a slice of a migration may hold the step thread, and how much it may move.
//
// Bandwidth: a bucket of tokens for each direction, so that between any two moments
//
//   bytes sent (received) <= bytes_per_second * time between them + kBurst * bytes_per_second
//                            + one chunk
//
// Share: time in slices of steps is earned by time that passes and spent as it is measured,
//
//   credit' = min(credit, 0) + step_share * time since the slice before - time in this slice
//
// What is not spent is not saved, so no step pays for the quiet before it; what is overspent is
// paid back first. Slices of kRest cost nothing. As the share is above 0, each gets its turn.
// Pure: moments are passed in, in any order of calls but never going back.
class SliceBudget {
 public:
  static constexpr double kBurst = 0.01;  // seconds
  struct Options {
    int64_t slice_bytes = 1 << 20;  // most that one slice moves each way
    double bytes_per_second = 0.0;  // each way; 0: no limit
    double step_share = 0.05;       // in (0, 1]
  };
  explicit SliceBudget(const Options& options) : options_(options) {}

  // A plan begins: nothing is owed, and nothing earned.
  void Restart(int64_t now_ns);
  // Begins a slice: the most that it may move. Nothing both ways: not its turn.
  TransferBudget Open(int64_t now_ns, SliceOf of);
  // Whether the slice has time for more.
  bool HasTime(int64_t now_ns) const;
  // Ends the slice that Open began.
  void Close(int64_t now_ns, int64_t sent, int64_t received);

 private:
  Options options_;
  SliceOf of_ = SliceOf::kRest;
  int64_t opened_ns_ = 0;  // the slice before
  int64_t filled_ns_ = 0;  // until when the buckets were filled
  double credit_ns_ = 0.0;
  double send_bytes_ = 0.0, receive_bytes_ = 0.0;  // in the buckets
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_SLICE_BUDGET_H_
