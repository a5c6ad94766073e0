#include "runtime/group_leader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/check.h"

namespace ballast {

GroupLeader::GroupLeader(const Options& options, std::vector<int32_t> slots,
                         std::vector<int32_t> node)
    : options_(options),
      slots_(std::move(slots)),
      node_(std::move(node)),
      lost_(slots_.size(), false),
      reports_(slots_.size()) {
  BALLAST_CHECK(slots_.size() == node_.size() && !slots_.empty());
  for (int32_t r = 0; r < static_cast<int32_t>(slots_.size()); ++r) members_.push_back(r);
  last_members_ = members_;
}

bool GroupLeader::is_member(int32_t rank) const {
  return std::binary_search(members_.begin(), members_.end(), rank);
}

void GroupLeader::OnLost(int32_t rank, absl::Status why, int64_t now_ns) {
  if (lost_[rank]) return;
  lost_[rank] = true;
  newly_lost_.push_back({rank, std::move(why)});
  if (!is_member(rank)) return;
  std::erase(members_, rank);
  Halt(now_ns);
}

void GroupLeader::OnTrouble(int32_t rank, const TroubleFrame& trouble, int64_t now_ns) {
  if (halting_ || trouble.generation != generation_ || !is_member(rank)) return;
  std::set<int32_t> missing;
  for (const int32_t r : trouble.missing) {
    if (r != 0 && r != rank && is_member(r)) missing.insert(r);
  }
  if (complaints_.empty()) {
    if (missing.empty()) return Halt(now_ns);
    deadline_ns_ = now_ns + options_.trouble_grace_ns;
  }
  complaints_[rank] = std::move(missing);
}

// Whose fault the complaints are.
std::vector<GroupLeader::Lost> GroupLeader::Culprits() const {
  std::vector<Lost> silent;
  std::optional<Lost> most_missed;
  size_t most = 0;
  for (const int32_t r : members_) {
    std::vector<int32_t> waiting;
    for (const auto& [other, missing] : complaints_) {
      if (missing.contains(r)) waiting.push_back(other);
    }
    if (waiting.empty()) continue;
    const Lost lost = {r, absl::DeadlineExceededError(absl::StrCat(
                              waiting.size() > 1 ? "ranks " : "rank ", absl::StrJoin(waiting, ", "),
                              " waited for it in vain"))};
    if (!complaints_.contains(r)) silent.push_back(lost);
    if (waiting.size() > most) most_missed = lost;
    most = std::max(most, waiting.size());
  }
  if (silent.empty()) silent.push_back(*std::move(most_missed));
  return silent;
}

bool GroupLeader::Leave(int32_t rank, int64_t now_ns) {
  BALLAST_CHECK(rank > 0);
  if (!is_member(rank)) return false;
  std::erase(members_, rank);
  Halt(now_ns);
  // It halts too, and then hears that it is not among those who go on.
  outbox_.push_back({rank, HaltFrame{generation_, false}});
  return true;
}

bool GroupLeader::Return(int32_t rank, int64_t now_ns) {
  BALLAST_CHECK(rank > 0);
  if (is_member(rank) || lost_[rank]) return false;
  members_.insert(std::lower_bound(members_.begin(), members_.end(), rank), rank);
  Halt(now_ns);
  return true;
}

void GroupLeader::Halt(int64_t now_ns) {
  ++generation_;
  halting_ = true;
  complaints_.clear();
  deadline_ns_ = now_ns + options_.report_deadline_ns;
  std::fill(reports_.begin(), reports_.end(), std::nullopt);
  const bool any_comes =
      !std::includes(last_members_.begin(), last_members_.end(), members_.begin(), members_.end());
  for (const int32_t r : members_) {
    outbox_.push_back({r, HaltFrame{generation_, any_comes && r == 0}});
  }
}

void GroupLeader::OnHalted(int32_t rank, const HaltedFrame& report, int64_t now_ns) {
  if (!halting_ || report.generation != generation_ || !is_member(rank)) return;
  reports_[rank] = report;
  const bool all =
      std::ranges::all_of(members_, [this](int32_t r) { return reports_[r].has_value(); });
  if (all) Resume(now_ns);
}

void GroupLeader::OnTick(int64_t now_ns) {
  if (!wake_ns().has_value() || now_ns < deadline_ns_) return;
  // All of them before any is lost: a loss begins a generation that nobody has complained and
  // nobody has reported in yet.
  std::vector<Lost> overdue;
  if (!halting_) overdue = Culprits();
  for (const int32_t r : members_) {
    if (!halting_ || reports_[r].has_value()) continue;
    overdue.push_back({r, absl::DeadlineExceededError("it did not report")});
  }
  for (Lost& lost : overdue) OnLost(lost.rank, std::move(lost.why), now_ns);
}

void GroupLeader::Resume(int64_t now_ns) {
  ResumeFrame resume;
  resume.generation = generation_;
  const auto old_rank = [this](int32_t r) {
    const auto at = std::lower_bound(last_members_.begin(), last_members_.end(), r);
    return at == last_members_.end() || *at != r ? -1
                                                 : static_cast<int32_t>(at - last_members_.begin());
  };
  for (const int32_t r : members_) {
    const int32_t old = old_rank(r);
    resume.members.push_back({r, old, old < 0 ? slots_[r] : 0, node_[r]});
    if (old < 0) continue;  // where it stands is long past
    resume.step = std::max(resume.step, reports_[r]->step);
    resume.epoch = std::max(resume.epoch, reports_[r]->epoch);
  }
  for (const ResumeFrame::Member& member : resume.members) {
    if (member.old_rank < 0 || reports_[member.rank]->epoch == resume.epoch) continue;
    // A flip is commanded after every rank has staged the plan. One that has not cannot follow.
    const int64_t staged = reports_[member.rank]->staged_plan_id;
    if (staged == 0 || (resume.commit_plan_id != 0 && staged != resume.commit_plan_id)) {
      OnLost(member.rank,
             absl::FailedPreconditionError("it has not staged the plan that is in force elsewhere"),
             now_ns);
      return;
    }
    resume.commit_plan_id = staged;
  }
  const HaltedFrame& mine = *reports_[0];
  const std::vector<std::byte>& placement =
      mine.epoch == resume.epoch ? mine.placement : mine.staged_placement;
  for (const ResumeFrame::Member& member : resume.members) {
    Send send{member.rank, resume};
    if (member.old_rank < 0) std::get<ResumeFrame>(send.frame).placement = placement;
    outbox_.push_back(std::move(send));
  }
  // Those that left wait from now on.
  for (const int32_t r : last_members_) {
    if (!is_member(r) && !lost_[r]) outbox_.push_back({r, resume});
  }
  last_members_ = members_;
  halting_ = false;
}

std::optional<GroupLeader::Send> GroupLeader::Take() {
  if (sent_ == outbox_.size()) {
    outbox_.clear();
    sent_ = 0;
    return std::nullopt;
  }
  return std::move(outbox_[sent_++]);
}

std::optional<int64_t> GroupLeader::wake_ns() const {
  if (!halting_ && complaints_.empty()) return std::nullopt;
  return deadline_ns_;
}

}  // namespace ballast
