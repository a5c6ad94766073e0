#ifndef BALLAST_RUNTIME_VERIFICATION_H_
#define BALLAST_RUNTIME_VERIFICATION_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/control_frames.h"

namespace ballast {

// What is wrong with what the ranks of a server report, one sentence each; empty: nothing.
//   - a copy is not what it was when it was packed
//   - copies of one expert differ between ranks
//   - a rank's tables are not what its slots say
//   - ranks at the same epoch have different placements
// `reports` by rank of the job. Pure.
std::vector<std::string> Compare(const std::map<int, VerifiedFrame>& reports);

// Has all ranks that serve verify themselves at once, and says what came of it: GET /v1/verify.
// THREADS any
class Verification {
 public:
  struct Options {
    int64_t timeout_ms = 60'000;
    std::function<absl::Status(uint64_t id)> ask;  // tells all ranks to verify
    std::function<std::vector<int>()> serving;     // ranks of the job that have to answer
  };
  explicit Verification(Options options) : options_(std::move(options)) {}

  // A rank's report has come. Reports of other checks are ignored.
  void OnVerified(int rank, VerifiedFrame report);

  // Callers at most that wait for a check which somebody else began.
  static constexpr int kMostWaiting = 4;

  // Asks and waits. One check at a time: whoever comes while one is under way gets its answer.
  //   {"ok":true,"copies":n,"findings":["..."],
  //    "ranks":[{"rank":0,"step":..,"epoch":..,"placement":"16 hex digits","copies":n},..]}
  // A rank that leaves or is lost meanwhile need not answer, nor one that comes; one that does not
  // answer in time is a finding.
  // ERRORS of `ask`; kResourceExhausted: kMostWaiting wait already; kUnavailable: Cancel was called
  absl::StatusOr<std::string> Run();
  // Ends what waits.
  void Cancel();

 private:
  struct Check {
    int waiting = 0;  // callers that did not begin it
    std::optional<absl::StatusOr<std::string>> answer;
  };
  absl::StatusOr<std::string> RunAlone();

  const Options options_;
  std::mutex mutex_;
  // State below is protected by mutex_.
  std::condition_variable changed_;
  std::shared_ptr<Check> under_way_;
  uint64_t id_ = 0;
  std::map<int, VerifiedFrame> reports_;
  bool cancelled_ = false;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_VERIFICATION_H_
