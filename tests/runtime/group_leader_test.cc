#include "runtime/group_leader.h"

#include <catch2/catch.hpp>

#include "base/log.h"
#include "tests/runtime/group_sim.h"

namespace ballast {
namespace {

using testing::SimOutcome;
using testing::Simulate;

struct Sent {
  std::vector<std::pair<int32_t, HaltFrame>> halts;
  std::vector<std::pair<int32_t, ResumeFrame>> resumes;
};

Sent TakeAll(GroupLeader& leader) {
  Sent sent;
  while (auto send = leader.Take()) {
    if (const auto* halt = std::get_if<HaltFrame>(&send->frame)) {
      sent.halts.emplace_back(send->rank, *halt);
    } else {
      sent.resumes.emplace_back(send->rank, std::get<ResumeFrame>(send->frame));
    }
  }
  return sent;
}

std::vector<int32_t> RanksOf(const auto& sends) {
  std::vector<int32_t> ranks;
  for (const auto& [rank, frame] : sends) ranks.push_back(rank);
  return ranks;
}

HaltedFrame At(int64_t generation, int64_t step, int64_t epoch, int64_t staged = 0) {
  HaltedFrame frame;
  frame.generation = generation;
  frame.step = step;
  frame.epoch = epoch;
  frame.staged_plan_id = staged;
  return frame;
}

const absl::Status kGone = absl::UnavailableError("gone");

GroupLeader Leader(int32_t ranks) {
  return GroupLeader({.report_deadline_ns = 100, .trouble_grace_ns = 20},
                     std::vector<int32_t>(ranks, 4), std::vector<int32_t>(ranks, 0));
}

TEST_CASE("the others halt and resume without a lost rank", "[runtime][group]") {
  GroupLeader leader = Leader(4);
  leader.OnLost(2, kGone, 10);
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{2});
  CHECK(leader.halting());
  const Sent halt = TakeAll(leader);
  CHECK(RanksOf(halt.halts) == std::vector<int32_t>{0, 1, 3});
  CHECK(halt.halts[0].second.generation == 1);
  CHECK_FALSE(halt.halts[0].second.want_placement);
  leader.OnHalted(0, At(1, 50, 7), 11);
  leader.OnHalted(3, At(1, 52, 7), 12);
  leader.OnHalted(2, At(1, 52, 7), 12);  // from the grave
  leader.OnHalted(1, At(0, 52, 7), 12);  // of another time
  CHECK(TakeAll(leader).resumes.empty());
  leader.OnHalted(1, At(1, 51, 7), 13);
  const Sent resume = TakeAll(leader);
  CHECK_FALSE(leader.halting());
  CHECK(RanksOf(resume.resumes) == std::vector<int32_t>{0, 1, 3});
  const ResumeFrame& frame = resume.resumes[0].second;
  CHECK(frame.members ==
        std::vector<ResumeFrame::Member>{{0, 0, 0, 0}, {1, 1, 0, 0}, {3, 3, 0, 0}});
  CHECK(frame.step == 52);
  CHECK(frame.epoch == 7);
  CHECK(frame.commit_plan_id == 0);
}

TEST_CASE("a plan that is in force anywhere counts for all", "[runtime][group]") {
  GroupLeader leader = Leader(3);
  leader.OnLost(1, kGone, 0);
  TakeAll(leader);
  leader.OnHalted(0, At(1, 9, 4, /*staged=*/6), 1);
  leader.OnHalted(2, At(1, 9, 5), 1);
  const Sent resume = TakeAll(leader);
  REQUIRE(resume.resumes.size() == 2);
  CHECK(resume.resumes[0].second.commit_plan_id == 6);
  CHECK(resume.resumes[0].second.epoch == 5);
  // Staged everywhere but in force nowhere: it is given up.
  leader.OnLost(2, kGone, 2);
  TakeAll(leader);
  leader.OnHalted(0, At(2, 9, 6, /*staged=*/7), 3);
  CHECK(TakeAll(leader).resumes[0].second.commit_plan_id == 0);
}

TEST_CASE("a rank that cannot follow is given up", "[runtime][group]") {
  GroupLeader leader = Leader(4);
  leader.OnLost(1, kGone, 0);
  leader.TakeLost();
  TakeAll(leader);
  leader.OnHalted(0, At(1, 9, 5), 1);
  leader.OnHalted(2, At(1, 9, 4, /*staged=*/0), 1);
  leader.OnHalted(3, At(1, 9, 5), 1);
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{2});
  CHECK(leader.generation() == 2);
  CHECK(RanksOf(TakeAll(leader).halts) == std::vector<int32_t>{0, 3});
}

TEST_CASE("a silent rank is lost alone, whatever stands after it", "[runtime][group]") {
  GroupLeader leader = Leader(5);
  leader.OnLost(4, kGone, 0);
  leader.TakeLost();
  TakeAll(leader);
  for (const int32_t r : {0, 2, 3}) leader.OnHalted(r, At(1, 1, 0), 50);
  leader.OnTick(100);
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{1});
  CHECK(leader.members() == std::vector<int32_t>{0, 2, 3});
  CHECK(leader.generation() == 2);
}

TroubleFrame Missing(std::vector<int32_t> ranks, int64_t generation = 0) {
  return {.generation = generation, .missing = std::move(ranks)};
}

TEST_CASE("the same ranks begin anew where nobody can be suspected", "[runtime][group]") {
  // Rank 0 is not: it may have stood still.
  const TroubleFrame trouble = GENERATE(Missing({}), Missing({0}), Missing({0, 1, 1, 9}));
  GroupLeader leader = Leader(3);
  leader.OnTrouble(1, trouble, 10);
  CHECK(leader.halting());
  CHECK(leader.generation() == 1);
  CHECK(RanksOf(TakeAll(leader).halts) == std::vector<int32_t>{0, 1, 2});
  leader.OnTrouble(2, Missing({1}), 20);     // of the generation before
  leader.OnTrouble(2, Missing({1}, 1), 20);  // under way already
  CHECK(leader.generation() == 1);
  for (const int32_t r : {0, 1, 2}) leader.OnHalted(r, At(1, 7, 3), 30);
  CHECK_FALSE(leader.halting());
  CHECK(leader.members() == std::vector<int32_t>{0, 1, 2});
  CHECK(leader.TakeLost().empty());
}

// Rank 2 has stopped after it had sent rank 3, but not 0 and 1, what they waited for.
TEST_CASE("a rank that is merely kept waiting is not lost", "[runtime][group][trouble]") {
  GroupLeader leader = Leader(4);
  leader.OnTrouble(3, Missing({0, 1, 2}), 1000);
  CHECK_FALSE(leader.halting());
  CHECK(leader.wake_ns() == 1020);
  leader.OnTrouble(0, Missing({2}), 1005);
  leader.OnTrouble(1, Missing({2}), 1010);
  CHECK(leader.wake_ns() == 1020);  // the first complaint's
  leader.OnTick(1019);
  CHECK_FALSE(leader.halting());
  leader.OnTick(1020);
  const std::vector<GroupLeader::Lost> lost = leader.TakeLost();
  REQUIRE(RanksOf(lost) == std::vector<int32_t>{2});
  CHECK(lost[0].why.message() == "ranks 0, 1, 3 waited for it in vain");
  CHECK(leader.wake_ns() == 1120);
  CHECK(RanksOf(TakeAll(leader).halts) == std::vector<int32_t>{0, 1, 3});
}

TEST_CASE("of two ranks the one that is stopped is lost", "[runtime][group][trouble]") {
  GroupLeader leader = Leader(2);
  leader.OnTrouble(0, Missing({1, 1}), 5);
  leader.OnTick(24);
  CHECK(leader.TakeLost().empty());
  leader.OnTick(25);
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{1});
  CHECK(leader.members() == std::vector<int32_t>{0});
}

TEST_CASE("all that are stopped together are lost together", "[runtime][group][trouble]") {
  GroupLeader leader = Leader(5);
  leader.OnTrouble(0, Missing({4, 2}), 0);
  leader.OnTrouble(1, Missing({0, 3}), 1);  // has what ranks 2 and 4 sent last
  leader.OnTrouble(4, Missing({1}), 2);     // alive after all
  leader.OnTrouble(3, Missing({2}, 1), 2);  // of another time
  leader.OnTick(20);
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{2, 3});
}

// Rank 3 has stopped; what it sent rank 2 last is on the way for good, but not what came after that
// to the others.
TEST_CASE("who waits for one that is kept waiting does not blame it", "[runtime][group][trouble]") {
  GroupLeader leader = Leader(4);
  leader.OnTrouble(0, Missing({2}), 0);
  leader.OnTrouble(2, Missing({3}), 10);
  leader.OnTrouble(1, Missing({2}), 12);
  leader.OnTick(20);
  const std::vector<GroupLeader::Lost> lost = leader.TakeLost();
  REQUIRE(RanksOf(lost) == std::vector<int32_t>{3});
  CHECK(lost[0].why.message() == "rank 2 waited for it in vain");
}

TEST_CASE("of ranks that wait for each other the most missed is lost",
          "[runtime][group][trouble]") {
  GroupLeader link = Leader(4);
  link.OnTrouble(3, Missing({1, 2}), 0);
  link.OnTrouble(1, Missing({2}), 1);
  link.OnTrouble(2, Missing({1}), 2);
  link.OnTrouble(0, Missing({1, 2}), 3);
  link.OnTick(20);
  CHECK(RanksOf(link.TakeLost()) == std::vector<int32_t>{1});

  GroupLeader alone = Leader(4);  // rank 3 hears nobody and is heard by nobody
  alone.OnTrouble(3, Missing({0, 1, 2}), 0);
  for (const int32_t r : {0, 1, 2}) alone.OnTrouble(r, Missing({3}), 1);
  alone.OnTick(20);
  const std::vector<GroupLeader::Lost> lost = alone.TakeLost();
  REQUIRE(RanksOf(lost) == std::vector<int32_t>{3});
  CHECK(lost[0].why.message() == "ranks 0, 1, 2 waited for it in vain");

  GroupLeader two = Leader(2);
  two.OnTrouble(0, Missing({1}), 0);
  two.OnTrouble(1, Missing({0}), 1);
  CHECK_FALSE(two.halting());
  two.OnTick(20);
  CHECK(RanksOf(two.TakeLost()) == std::vector<int32_t>{1});
}

TEST_CASE("a halt ends the complaints and a leader that was away waits anew",
          "[runtime][group][trouble]") {
  GroupLeader leader = Leader(4);
  leader.OnTrouble(3, Missing({1, 2}), 0);
  leader.WaitAnew(15);
  CHECK(leader.wake_ns() == 35);
  leader.OnTick(34);
  CHECK_FALSE(leader.halting());
  leader.OnLost(2, kGone, 34);
  CHECK(leader.wake_ns() == 134);
  leader.OnTick(60);
  const std::vector<GroupLeader::Lost> lost = leader.TakeLost();
  REQUIRE(RanksOf(lost) == std::vector<int32_t>{2});
  CHECK(lost[0].why == kGone);
  for (const int32_t r : {0, 1, 3}) leader.OnHalted(r, At(1, 1, 0), 61);
  CHECK_FALSE(leader.halting());
  CHECK_FALSE(leader.wake_ns().has_value());
  leader.OnTick(200);
  CHECK(leader.members() == std::vector<int32_t>{0, 1, 3});
}

TEST_CASE("a loss on the way, also a silent one, begins again", "[runtime][group]") {
  GroupLeader leader = Leader(4);
  leader.OnLost(1, kGone, 0);
  CHECK(leader.wake_ns() == 100);
  leader.OnHalted(0, At(1, 1, 0), 50);
  leader.OnLost(3, kGone, 60);
  CHECK(leader.generation() == 2);
  TakeAll(leader);
  leader.OnHalted(2, At(1, 1, 0), 70);  // an answer to the first
  leader.OnHalted(0, At(2, 1, 0), 70);
  leader.OnTick(159);
  CHECK(leader.halting());
  CHECK(leader.members() == std::vector<int32_t>{0, 2});
  leader.OnTick(160);
  CHECK(leader.members() == std::vector<int32_t>{0});
  CHECK(RanksOf(leader.TakeLost()) == std::vector<int32_t>{1, 3, 2});
  TakeAll(leader);
  leader.OnHalted(0, At(3, 1, 0), 161);
  CHECK_FALSE(leader.halting());
  CHECK_FALSE(leader.wake_ns().has_value());
  CHECK(TakeAll(leader).resumes[0].second.members ==
        std::vector<ResumeFrame::Member>{{0, 0, 0, 0}});
}

TEST_CASE("a rank leaves, is told so, and comes back with empty slots", "[runtime][group]") {
  GroupLeader leader = Leader(3);
  CHECK(leader.Leave(1, 0));
  CHECK_FALSE(leader.Leave(1, 0));
  CHECK(RanksOf(TakeAll(leader).halts) == std::vector<int32_t>{0, 2, 1});
  leader.OnHalted(1, At(1, 5, 2), 1);
  leader.OnHalted(0, At(1, 5, 2), 1);
  leader.OnHalted(2, At(1, 5, 2), 1);
  CHECK(RanksOf(TakeAll(leader).resumes) == std::vector<int32_t>{0, 2, 1});
  CHECK(leader.Return(1, 2));
  CHECK_FALSE(leader.Return(1, 2));
  const Sent halt = TakeAll(leader);
  CHECK(RanksOf(halt.halts) == std::vector<int32_t>{0, 1, 2});
  CHECK(halt.halts[0].second.want_placement);
  CHECK_FALSE(halt.halts[1].second.want_placement);
  HaltedFrame zero = At(2, 8, 3);
  zero.placement = {std::byte{'p'}};
  leader.OnHalted(0, zero, 3);
  leader.OnHalted(1, At(2, 5, 9), 3);  // where it stands does not count
  leader.OnHalted(2, At(2, 8, 3), 3);
  const Sent resume = TakeAll(leader);
  REQUIRE(resume.resumes.size() == 3);
  const ResumeFrame& frame = resume.resumes[1].second;
  CHECK(frame.members ==
        std::vector<ResumeFrame::Member>{{0, 0, 0, 0}, {1, -1, 4, 0}, {2, 1, 0, 0}});
  CHECK(frame.epoch == 3);
  CHECK(frame.placement == zero.placement);
  CHECK(resume.resumes[0].second.placement.empty());
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t kSimulations = 600;
#else
constexpr int64_t kSimulations = 3000;
#endif

TEST_CASE("simulated servers come through whatever happens to them", "[runtime][group][sim]") {
  SetLogLevel(LogLevel::kError);
  SimOutcome all;
  for (int64_t seed = 1; seed <= kSimulations; ++seed) {
    const SimOutcome one = Simulate(static_cast<uint64_t>(seed));
    CAPTURE(seed);
    REQUIRE(one.failure == "");
    all.steps += one.steps;
    all.flips += one.flips;
    all.aborts += one.aborts;
    all.deaths += one.deaths;
    all.regroupings += one.regroupings;
    all.reloads += one.reloads;
    all.returns += one.returns;
    all.moved += one.moved;
    all.commits_by_regrouping += one.commits_by_regrouping;
    all.stops += one.stops;
    all.cuts += one.cuts;
    all.complaints += one.complaints;
  }
  // All that is to be tested has happened.
  CHECK(all.steps * 3000 > 30'000 * kSimulations);
  CHECK(all.flips * 3000 > 3'000 * kSimulations);
  CHECK(all.aborts * 3000 > 100 * kSimulations);
  CHECK(all.deaths * 3000 > 1'000 * kSimulations);
  CHECK(all.regroupings * 3000 > 2'000 * kSimulations);
  CHECK(all.reloads * 3000 > 1'000 * kSimulations);
  CHECK(all.returns * 3000 > 500 * kSimulations);
  CHECK(all.moved * 3000 > 500 * kSimulations);
  CHECK(all.commits_by_regrouping * 3000 > 5 * kSimulations);
  CHECK(all.stops * 3000 > 500 * kSimulations);
  CHECK(all.cuts * 3000 > 200 * kSimulations);
  CHECK(all.complaints * 3000 > 1'000 * kSimulations);
}

}  // namespace
}  // namespace ballast
