#include "runtime/rebalancer.h"

#include <sched.h>

#include <algorithm>
#include <catch2/catch.hpp>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"
#include "runtime/expert_store.h"
#include "tests/support/run_ranks.h"

namespace ballast {
namespace {

using testing::FirstError;
using testing::RunRanks;

constexpr int32_t kExperts = 4, kRanks = 2, kSlots = 3;
constexpr size_t kBlockBytes = 512;

Placement Initial() {
  auto placement =
      Placement::Contiguous(1, kExperts, Topology::Uniform(kRanks, kSlots), /*fill_spare=*/false);
  REQUIRE(placement.ok());
  return *placement;
}

// Expert 0 goes to rank 1 as well.
MigrationPlan Plan(const Placement& from, int64_t plan_id, CopySource source = CopySource::kRanks) {
  auto plan = MakeMigrationPlan(from, {{0, {0, 1, kNoExpert, 2, 3, 0}}}, plan_id, source);
  REQUIRE(plan.ok());
  return *plan;
}

// One rank with its store and rebalancer.
struct Rank {
  Rank(Transport* transport, const Placement& initial, Rebalancer::Options options = {})
      : store({.rank = transport->rank(),
               .num_layers = 1,
               .num_experts = kExperts,
               .block_bytes = kBlockBytes,
               .resident_blocks = kSlots,
               .staging_blocks = kSlots,
               .chunk_bytes = 128,
               .read =
                   [](int32_t, int32_t e, std::span<std::byte> block) {
                     std::ranges::fill(block, static_cast<std::byte>(e + 1));
                     return absl::OkStatus();
                   }},
              transport) {
    for (int32_t e = 0; e < kExperts; ++e) {
      if (!initial.Hosts(0, e, transport->rank())) continue;
      for (std::byte& b : store.Allocate(0, e)) b = static_cast<std::byte>(e + 1);
      BALLAST_CHECK(store.Seal(0, e).ok());
    }
    options.rank = transport->rank();
    rebalancer = std::make_unique<Rebalancer>(
        options, &store, initial, [this](const Placement& p) { table_epoch = p.epoch(); });
  }
  ExpertStore store;
  int64_t table_epoch = 0;  // of the table that a flip would have made
  std::unique_ptr<Rebalancer> rebalancer;
};

absl::Status Expect(bool condition, const char* what) {
  return condition ? absl::OkStatus() : absl::InternalError(std::string(what) + " does not hold");
}

// Every rank hears the votes of all; the leader judges, and all do what it says at the same step.
absl::StatusOr<Command> RunStep(Communicator* comm, Rebalancer* rebalancer, int64_t now_ns) {
  const PlanVote mine = rebalancer->vote();
  std::vector<PlanVote> votes(static_cast<size_t>(comm->size()));
  const int64_t epoch = rebalancer->placement().epoch();
  BALLAST_RETURN_IF_ERROR(comm->AllGather(epoch, std::as_bytes(std::span(&mine, 1)),
                                          std::as_writable_bytes(std::span(votes))));
  PlanCommand command;
  if (comm->rank() == 0) command = rebalancer->Judge(votes, now_ns);
  std::vector<PlanCommand> commands(static_cast<size_t>(comm->size()));
  BALLAST_RETURN_IF_ERROR(comm->AllGather(epoch, std::as_bytes(std::span(&command, 1)),
                                          std::as_writable_bytes(std::span(commands))));
  BALLAST_ASSIGN_OR_RETURN(const auto outcome, rebalancer->Execute(commands[0]));
  rebalancer->Slice(SliceOf::kRest);
  return outcome.done;
}

// Steps until a plan has ended; which way.
absl::StatusOr<Command> RunToTheEnd(Communicator* comm, Rebalancer* rebalancer) {
  for (int step = 0; step < 100'000; ++step) {
    BALLAST_ASSIGN_OR_RETURN(const Command done, RunStep(comm, rebalancer, 0));
    if (done != Command::kNone) return done;
  }
  return absl::DeadlineExceededError("the plan does not end");
}

// Hands a plan to this rank, as the others do to theirs, and sees how it ends.
absl::Status EndsIn(Command end, const MigrationPlan& plan, Communicator* comm,
                    Rebalancer* rebalancer) {
  rebalancer->OnPlan(plan);
  BALLAST_ASSIGN_OR_RETURN(const Command done, RunToTheEnd(comm, rebalancer));
  return Expect(done == end, end == Command::kFlip ? "a flip" : "an abort");
}

// Steps until nobody is busy.
absl::Status Settle(Communicator* comm, Rebalancer* rebalancer) {
  for (int step = 0; step < 100'000; ++step) {
    const uint8_t mine = rebalancer->busy();
    std::vector<uint8_t> all(static_cast<size_t>(comm->size()));
    BALLAST_RETURN_IF_ERROR(comm->AllGather(0, std::as_bytes(std::span(&mine, 1)),
                                            std::as_writable_bytes(std::span(all))));
    if (std::ranges::all_of(all, [](uint8_t busy) { return busy == 0; })) return absl::OkStatus();
    rebalancer->Slice(SliceOf::kRest);
  }
  return absl::DeadlineExceededError("the ranks stay busy");
}

TEST_CASE("all ranks flip at one step once all have staged", "[runtime][rebalancer]") {
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial);
            self.rebalancer->OnPlan(Plan(initial, 1));
            BALLAST_ASSIGN_OR_RETURN(const Command done, RunToTheEnd(comm, self.rebalancer.get()));
            BALLAST_RETURN_IF_ERROR(Expect(done == Command::kFlip, "a flip"));
            BALLAST_RETURN_IF_ERROR(Expect(self.rebalancer->placement().epoch() == 1, "epoch 1"));
            BALLAST_RETURN_IF_ERROR(Expect(self.table_epoch == 1, "the table"));
            BALLAST_RETURN_IF_ERROR(Expect(!self.rebalancer->busy(), "rest"));
            const std::byte* copy = self.store.Parameters(0, 0);
            return Expect(copy != nullptr && copy[kBlockBytes - 1] == std::byte{1},
                          rank == 0 ? "the original" : "the copy");
          })) == "");
}

TEST_CASE("one failed vote aborts everywhere and the next plan succeeds", "[runtime][rebalancer]") {
  SetLogLevel(LogLevel::kError);
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial);
            Rebalancer& rebalancer = *self.rebalancer;
            // The only holder's memory is damaged: the receiver finds out.
            if (rank == 0) self.store.Allocate(0, 0)[100] ^= std::byte{4};
            BALLAST_RETURN_IF_ERROR(EndsIn(Command::kAbort, Plan(initial, 1), comm, &rebalancer));
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.placement() == initial, "the old placement"));
            BALLAST_RETURN_IF_ERROR(Expect(self.table_epoch == 0, "the old table"));
            BALLAST_RETURN_IF_ERROR(Settle(comm, &rebalancer));
            if (rank == 0) self.store.Allocate(0, 0)[100] ^= std::byte{4};
            return EndsIn(Command::kFlip, Plan(initial, 2), comm, &rebalancer);
          })) == "");
}

TEST_CASE("what a damaged holder cannot give the checkpoint gives", "[runtime][rebalancer]") {
  SetLogLevel(LogLevel::kOff);
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial);
            Rebalancer& rebalancer = *self.rebalancer;
            if (rank == 0) self.store.Allocate(0, 0)[100] ^= std::byte{4};
            BALLAST_RETURN_IF_ERROR(EndsIn(Command::kAbort, Plan(initial, 1), comm, &rebalancer));
            BALLAST_RETURN_IF_ERROR(Settle(comm, &rebalancer));
            BALLAST_RETURN_IF_ERROR(
                EndsIn(Command::kFlip, Plan(initial, 2, CopySource::kFile), comm, &rebalancer));
            return Expect(rank == 0 || self.store.Parameters(0, 0)[100] == std::byte{1},
                          "the undamaged copy");
          })) == "");
}

TEST_CASE("a plan that does not fit the placement becomes a failed vote",
          "[runtime][rebalancer][errors]") {
  SetLogLevel(LogLevel::kOff);
  const Placement initial = Initial();
  MigrationPlan other_epoch = Plan(initial, 1), no_source = other_epoch, no_layer = other_epoch;
  MigrationPlan other_target = other_epoch;
  other_epoch.base_epoch = 5;
  no_source.moves[0] = {0, 2, 0, 5};
  no_layer.moves[0].layer = 7;
  other_target.target_fingerprint ^= 1;
  for (const MigrationPlan& bad : {other_epoch, no_source, no_layer, other_target}) {
    REQUIRE(
        FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int) {
          Rank self(transport, initial);
          self.rebalancer->OnPlan(bad);
          BALLAST_RETURN_IF_ERROR(
              Expect(self.rebalancer->vote().vote == Vote::kFailed, "a failed vote"));
          BALLAST_ASSIGN_OR_RETURN(const Command done, RunToTheEnd(comm, self.rebalancer.get()));
          BALLAST_RETURN_IF_ERROR(Expect(done == Command::kAbort, "an abort"));
          BALLAST_RETURN_IF_ERROR(Settle(comm, self.rebalancer.get()));
          self.rebalancer->OnPlan(Plan(initial, 2));
          BALLAST_ASSIGN_OR_RETURN(const Command next, RunToTheEnd(comm, self.rebalancer.get()));
          return Expect(next == Command::kFlip, "a flip");
        })) == "");
  }
}

TEST_CASE("the leader judges by the votes on its own plan", "[runtime][rebalancer]") {
  SetLogLevel(LogLevel::kOff);
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(0);
  const Placement initial = Initial();
  Rank leader(transport.get(), initial, {.plan_deadline_ms = 1000});
  const auto judge = [&](PlanVote a, PlanVote b, int64_t now_ns) {
    return leader.rebalancer->Judge(std::vector<PlanVote>{a, b}, now_ns).command;
  };
  REQUIRE(judge({1, Vote::kStaged}, {1, Vote::kStaged}, 0) == Command::kNone);
  leader.rebalancer->OnPlan(Plan(initial, 4));
  REQUIRE(judge({4, Vote::kStaged}, {4, Vote::kStaged}, 0) == Command::kFlip);
  REQUIRE(judge({4, Vote::kStaged}, {4, Vote::kStaging}, 0) == Command::kNone);
  REQUIRE(judge({4, Vote::kStaged}, {0, Vote::kNone}, 0) == Command::kNone);
  REQUIRE(judge({4, Vote::kStaged}, {3, Vote::kStaged}, 0) == Command::kNone);
  REQUIRE(judge({4, Vote::kStaged}, {4, Vote::kFailed}, 0) == Command::kAbort);
  // A failed vote on an older plan is not about this one.
  REQUIRE(judge({4, Vote::kStaged}, {3, Vote::kFailed}, 0) == Command::kNone);
  const int64_t late = int64_t{1} << 62;
  REQUIRE(judge({4, Vote::kStaged}, {4, Vote::kStaging}, late) == Command::kAbort);
  REQUIRE(judge({4, Vote::kStaged}, {4, Vote::kStaged}, late) == Command::kFlip);
  REQUIRE(leader.rebalancer->Execute({4, Command::kFlip}).status().code() ==
          absl::StatusCode::kInternal);
}

TEST_CASE("a plan that arrives after its abort is taken in and dropped", "[runtime][rebalancer]") {
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial, {.plan_deadline_ms = 0});
            Rebalancer& rebalancer = *self.rebalancer;
            if (rank == 0) {
              rebalancer.OnPlan(Plan(initial, 1));
              rebalancer.Slice(SliceOf::kRest);
            }
            BALLAST_ASSIGN_OR_RETURN(Command done, RunStep(comm, &rebalancer, int64_t{1} << 62));
            BALLAST_RETURN_IF_ERROR(Expect(done == Command::kAbort, "an abort"));
            if (rank == 1) rebalancer.OnPlan(Plan(initial, 1));
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.vote().plan_id == 0, "no vote"));
            BALLAST_RETURN_IF_ERROR(Settle(comm, &rebalancer));
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.placement() == initial, "the old placement"));
            return EndsIn(Command::kFlip, Plan(initial, 2), comm, &rebalancer);
          })) == "");
}

// ---- regrouping
// ----------------------------------------------------------------------------------

TEST_CASE("a plan for an epoch gone by is noted and nothing else", "[runtime][rebalancer]") {
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(0);
  const Placement initial = Initial();
  Rank self(transport.get(), initial);
  const MigrationPlan plan = Plan(initial, 7);
  self.rebalancer->Adopt(*initial.With({}, 3));
  self.rebalancer->OnPlan(plan);
  CHECK(self.rebalancer->last_plan_id() == 7);
  CHECK(self.rebalancer->vote().vote == Vote::kNone);
  CHECK(!self.rebalancer->busy());
  CHECK(!self.store.staging());
}

// Nobody goes on before all have come.
absl::Status Meet(Communicator* comm) {
  const uint8_t mine = 1;
  std::vector<uint8_t> all(static_cast<size_t>(comm->size()));
  return comm->AllGather(0, std::as_bytes(std::span(&mine, 1)),
                         std::as_writable_bytes(std::span(all)));
}

// Both ranks go on as before, or the first alone.
const std::vector<GroupMember> kBoth = {{.old_rank = 0}, {.old_rank = 1}};
const std::vector<GroupMember> kFirst = {{.old_rank = 0}};

TEST_CASE("a staged plan that counts is part of the new group's placement",
          "[runtime][rebalancer][group]") {
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial);
            Rebalancer& rebalancer = *self.rebalancer;
            rebalancer.OnPlan(Plan(initial, 4));
            while (rebalancer.vote().vote == Vote::kStaging) rebalancer.Slice(SliceOf::kRest);
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.vote().vote == Vote::kStaged, "staged"));
            BALLAST_RETURN_IF_ERROR(Meet(comm));
            // Rank 0 had been told to flip already.
            if (rank == 0) {
              BALLAST_RETURN_IF_ERROR(rebalancer.Execute({4, Command::kFlip}).status());
            }
            BALLAST_ASSIGN_OR_RETURN(const Regrouped regrouped,
                                     rebalancer.Regroup(4, 1, kBoth, rank));
            BALLAST_RETURN_IF_ERROR(Expect(regrouped.reloads.empty(), "no reloads"));
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.placement().epoch() == 2, "epoch 2"));
            BALLAST_RETURN_IF_ERROR(
                Expect(rebalancer.placement().num_replicas(0, 0) == 2, "the plan's copy"));
            BALLAST_RETURN_IF_ERROR(Expect(!rebalancer.busy(), "rest"));
            return Expect(self.store.Parameters(0, 0) != nullptr, "expert 0 everywhere");
          })) == "");
}

TEST_CASE("a staged plan that does not count is given up by the new group",
          "[runtime][rebalancer][group]") {
  const Placement initial = Initial();
  REQUIRE(FirstError(RunRanks(kRanks, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, initial);
            Rebalancer& rebalancer = *self.rebalancer;
            rebalancer.OnPlan(Plan(initial, 4));
            while (rebalancer.vote().vote == Vote::kStaging) rebalancer.Slice(SliceOf::kRest);
            BALLAST_RETURN_IF_ERROR(Meet(comm));
            BALLAST_RETURN_IF_ERROR(rebalancer.Regroup(0, 0, kBoth, rank).status());
            BALLAST_RETURN_IF_ERROR(Expect(rebalancer.placement().epoch() == 1, "epoch 1"));
            BALLAST_RETURN_IF_ERROR(
                Expect(rebalancer.placement().fingerprint() == initial.fingerprint(), "as before"));
            BALLAST_RETURN_IF_ERROR(Expect(!rebalancer.busy(), "rest"));
            return Expect((self.store.Parameters(0, 0) != nullptr) == (rank == 0), "no copy");
          })) == "");
}

TEST_CASE("a rank that cannot follow the others says so and must not go on",
          "[runtime][rebalancer][group][errors]") {
  LocalFabric fabric(kRanks);
  const auto transport = fabric.MakeTransport(0);
  const Placement initial = Initial();
  const auto fault = [&](int64_t commit, int64_t epoch) {
    Rank self(transport.get(), initial);
    const auto regrouped = self.rebalancer->Regroup(commit, epoch, kFirst, 0);
    REQUIRE(regrouped.status().code() == absl::StatusCode::kInternal);
    return std::string(regrouped.status().message());
  };
  CHECK(fault(4, 1) == "rank 0 is at epoch 0 and has not staged plan 4, which leads to epoch 1");
  CHECK(fault(0, -1) == "rank 0 is at epoch 0, the others are at -1");
}

}  // namespace
}  // namespace ballast
