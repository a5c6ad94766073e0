#ifndef BALLAST_RUNTIME_GROUP_LEADER_H_
#define BALLAST_RUNTIME_GROUP_LEADER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "runtime/control_frames.h"

namespace ballast {

// Decides who serves: one group of ranks per generation. The leader's half of a regrouping; the
// other half is in group_member.h. Pure: no clock, no I/O, no threads.
//
// When a rank is lost, or one is to leave or to come, all that will be members are told to halt
// under the next generation. Each abandons the step it is in and reports where it stands. When all
// have reported, they are told to resume: who they are now, and whether the plan that was under way
// counts. It counts if it is in force anywhere: the command to flip is given only after every rank
// has staged the plan, so all can follow. Otherwise nobody has it in force, and it is given up.
//
// A loss on the way (also one that shows itself only by silence) begins the next generation. Rank 0
// is where this runs: its loss ends the service.
//
// Who waits in vain does not know whose fault it is: where one rank stops in the middle of an
// exchange, those that have all of its messages go on to the next one, wait there for all that
// still wait for it, and may run out of patience first. So complaints are gathered for a while: who
// is waited for and does not complain is the one that has stopped.
//
// Call order: any; after each call, TakeLost, then Take until there is nothing.
class GroupLeader {
 public:
  struct Options {
    int64_t report_deadline_ns = 10'000'000'000;  // from the order to halt to the last report
    // From the first complaint to the judgement: ranks that wait for each other run out of patience
    // no further apart.
    int64_t trouble_grace_ns = 500'000'000;
  };
  // All of `ranks` serve from the start, as generation 0. `slots` and `node` say what a rank
  // brings when it comes back. SHAPES slots, node [num_ranks]
  GroupLeader(const Options& options, std::vector<int32_t> slots, std::vector<int32_t> node);

  // The rank will not be heard of again: its channel broke, or it was silent for too long. A rank
  // that is no member is only noted. What counts is `why` it was lost first.
  void OnLost(int32_t rank, absl::Status why, int64_t now_ns);
  // A rank cannot go on. Where its complaint is the first of the generation and names no member but
  // rank 0, which lives as long as this does, the same ranks begin the next generation at once.
  // Otherwise, when the grace has passed since the first complaint, all are lost that any of them
  // names and that have not complained. Nobody is spared because a complaint does not name it: what
  // that rank waited for may have been sent just before the end. Where all have complained they
  // wait for each other, so a link is broken, and the one that most wait for is lost; of several,
  // the lowest. Complaints of other generations are ignored.
  void OnTrouble(int32_t rank, const TroubleFrame& trouble, int64_t now_ns);
  // A rank says where it stands. Reports of other generations are ignored.
  void OnHalted(int32_t rank, const HaltedFrame& report, int64_t now_ns);
  // REQUIRES rank > 0. False where that changes nothing or the rank is lost.
  bool Leave(int32_t rank, int64_t now_ns);
  bool Return(int32_t rank, int64_t now_ns);
  // The leader itself was away, and may not have heard the others: the wait for them begins anew.
  void WaitAnew(int64_t now_ns) {
    deadline_ns_ = now_ns + (halting_ ? options_.report_deadline_ns : options_.trouble_grace_ns);
  }
  // Time has passed.
  void OnTick(int64_t now_ns);

  // Ranks that were lost since the last call.
  struct Lost {
    int32_t rank;
    absl::Status why;
  };
  std::vector<Lost> TakeLost() { return std::exchange(newly_lost_, {}); }
  // What is to be sent, in order. A rank that is not among the members of a ResumeFrame is to wait
  // until it is told to halt again.
  struct Send {
    int32_t rank;
    std::variant<HaltFrame, ResumeFrame> frame;
  };
  std::optional<Send> Take();
  // The next moment at which OnTick has something to do; nullopt: none.
  std::optional<int64_t> wake_ns() const;

  int64_t generation() const { return generation_; }
  bool halting() const { return halting_; }
  const std::vector<int32_t>& members() const { return members_; }  // ascending
  bool is_member(int32_t rank) const;
  bool is_lost(int32_t rank) const { return lost_[rank]; }

 private:
  void Halt(int64_t now_ns);
  std::vector<Lost> Culprits() const;
  void Resume(int64_t now_ns);

  const Options options_;
  const std::vector<int32_t> slots_, node_;
  std::vector<bool> lost_;
  std::vector<Lost> newly_lost_;
  std::vector<int32_t> members_;       // of the generation that is coming, or in force
  std::vector<int32_t> last_members_;  // of the last generation that resumed
  std::vector<std::optional<HaltedFrame>> reports_;  // of this generation
  std::vector<Send> outbox_;                         // [sent_, size) waits to be taken
  size_t sent_ = 0;
  int64_t generation_ = 0;
  std::map<int32_t, std::set<int32_t>> complaints_;  // who waits for whom; none while halting
  int64_t deadline_ns_ = 0;  // of the reports while halting, else of the complaints
  bool halting_ = false;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_GROUP_LEADER_H_
