#include "runtime/group_member.h"

#include <span>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

std::vector<std::byte> BytesOf(const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

std::string TextOf(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

HaltedFrame ReportTo(const HaltFrame& halt, int64_t step, const Rebalancer& rebalancer) {
  HaltedFrame report;
  report.generation = halt.generation;
  report.step = step;
  report.epoch = rebalancer.placement().epoch();
  const auto staged = rebalancer.staged_placement();
  if (staged.has_value()) report.staged_plan_id = rebalancer.vote().plan_id;
  if (halt.want_placement) {
    report.placement = BytesOf(rebalancer.placement().ToJson());
    if (staged.has_value()) report.staged_placement = BytesOf(staged->ToJson());
  }
  return report;
}

Group GroupOf(const ResumeFrame& resume, int32_t rank) {
  Group group;
  group.generation = resume.generation;
  for (const ResumeFrame::Member& member : resume.members) {
    if (member.rank == rank) group.member = static_cast<int32_t>(group.ranks.size());
    group.ranks.push_back(member.rank);
  }
  return group;
}

absl::StatusOr<Regrouped> Follow(const ResumeFrame& resume, const Group& group,
                                 Rebalancer* rebalancer) {
  BALLAST_CHECK(group.member >= 0);
  const bool comes = resume.members[static_cast<size_t>(group.member)].old_rank < 0;
  if (comes) {
    BALLAST_ASSIGN_OR_RETURN(Placement placement, Placement::FromJson(TextOf(resume.placement)));
    rebalancer->Adopt(std::move(placement));
  }
  std::vector<GroupMember> members;
  for (const ResumeFrame::Member& m : resume.members) {
    members.push_back({.old_rank = m.old_rank, .slots = m.slots, .node = m.node});
  }
  return rebalancer->Regroup(comes ? 0 : resume.commit_plan_id, resume.epoch, members,
                             group.member);
}

}  // namespace ballast
