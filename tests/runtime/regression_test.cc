// Failures of other systems that must not happen here (tests/known_failures.md): what moves with an
// expert, what a rejected plan leaves behind, and sizes that others could not take.
#include <sched.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <memory>

#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "base/status.h"
#include "kernels/gated_mlp.h"
#include "runtime/expert_store.h"
#include "runtime/moe_layer.h"
#include "runtime/rebalancer.h"
#include "runtime/step_protocol.h"
#include "tests/support/run_ranks.h"

namespace ballast {
namespace {

using testing::FirstError;
using testing::RunRanks;

constexpr int64_t kLate = int64_t{1} << 62;

absl::Status Expect(bool condition, const std::string& what) {
  return condition ? absl::OkStatus() : absl::InternalError(what + " does not hold");
}

Placement Make(int32_t experts, const Topology& topology, std::vector<int32_t> row) {
  auto placement = Placement::Create(1, experts, topology, std::move(row), 0);
  REQUIRE(placement.ok());
  return *placement;
}

MigrationPlan PlanTo(const Placement& from, std::vector<int32_t> row, int64_t plan_id) {
  auto plan = MakeMigrationPlan(from, {{0, std::move(row)}}, plan_id);
  REQUIRE(plan.ok());
  return *plan;
}

// A rank with a store of its own, steps without tokens, and a log of the flips.
struct Rank {
  Rank(Transport* transport, Communicator* communicator, const Placement& initial, size_t bytes,
       int32_t staging)
      : comm(communicator),
        store({.rank = transport->rank(),
               .num_layers = 1,
               .num_experts = initial.num_experts(),
               .block_bytes = bytes,
               .resident_blocks = initial.topology().slots_on(transport->rank()),
               .staging_blocks = staging,
               .chunk_bytes = 64},
              transport),
        rebalancer({.rank = transport->rank(), .slice = {.slice_bytes = 64}}, &store, initial,
                   [this](const Placement&) { ++flips; }),
        protocol(transport->rank(), 0, &rebalancer),
        headers(static_cast<size_t>(communicator->size())) {}
  // What the placement gives to this rank, as from a checkpoint; again, if it was before.
  void Fill() {
    const Placement& initial = rebalancer.placement();
    for (int32_t e = 0; e < initial.num_experts(); ++e) {
      if (!initial.Hosts(0, e, store.rank())) continue;
      const auto block = store.Allocate(0, e);
      for (size_t i = 0; i < block.size(); ++i) block[i] = ByteOf(e, i);
      BALLAST_CHECK(store.Seal(0, e).ok());
    }
  }
  static std::byte ByteOf(int32_t expert, size_t i) {
    return static_cast<std::byte>(RandomBits(static_cast<uint64_t>(expert), i));
  }

  absl::StatusOr<StepProtocol::Opening> Step(int64_t now_ns) {
    const StepHeader mine = protocol.Begin({});
    BALLAST_RETURN_IF_ERROR(comm->AllGather(rebalancer.placement().epoch(),
                                            std::as_bytes(std::span(&mine, 1)),
                                            std::as_writable_bytes(std::span(headers))));
    auto opening = protocol.Open(headers, now_ns);
    rebalancer.Slice(SliceOf::kRest);
    return opening;
  }
  // Steps until the plan has ended; how. From step `late` on the leader's patience is at its end.
  absl::StatusOr<Command> RunPlan(int late) {
    for (int step = 0; step < 100'000; ++step) {
      BALLAST_ASSIGN_OR_RETURN(const auto opening, Step(step >= late ? kLate : 0));
      if (opening.ended.has_value()) return opening.ended->done;
    }
    return absl::DeadlineExceededError("the plan does not end");
  }
  // Everything that a plan could have touched.
  std::string State() const {
    std::string state = rebalancer.placement().ToJson();
    for (int32_t e = 0; e < rebalancer.placement().num_experts(); ++e) {
      const std::byte* block = store.Parameters(0, e);
      absl::StrAppend(&state, " ", reinterpret_cast<uintptr_t>(block), " ",
                      store.SealedChecksum(0, e), " ");
      if (block == nullptr) continue;
      state.append(reinterpret_cast<const char*>(block), bytes());
    }
    absl::StrAppend(&state, " flips ", flips);
    return state;
  }
  size_t bytes() const { return store.block_bytes(); }

  Communicator* comm;
  ExpertStore store;
  int flips = 0;
  Rebalancer rebalancer;
  StepProtocol protocol;
  std::vector<StepHeader> headers;
};

// SOURCE vllm-ascend#9151: a plan that was rejected still changed answers.
TEST_CASE("a plan rejected at any stage changes no byte", "[runtime][rebalancer][errors]") {
  SetLogLevel(LogLevel::kOff);
  const Placement initial =
      Make(5, Topology::Uniform(3, 3), {0, 1, kNoExpert, 2, 3, kNoExpert, 4, kNoExpert, kNoExpert});
  const MigrationPlan good = PlanTo(initial, {0, 1, 4, 2, 3, 0, 4, 1, 2}, 1);
  REQUIRE(good.moves.size() == 4);
  MigrationPlan other_epoch = good, no_source = good, other_target = good;
  other_epoch.base_epoch = 6;
  no_source.moves[0].from_rank = 1;
  other_target.target_fingerprint ^= 1;
  struct Stage {
    const char* name;
    MigrationPlan plan;
    int32_t staging = 4;  // rank 2 gets two experts
    bool corrupt = false;
    int late = 1'000'000;
  };
  const std::vector<Stage> stages = {{"another epoch", other_epoch},
                                     {"a source that has it not", no_source},
                                     {"another target", other_target},
                                     {"too little memory", good, 1},
                                     {"a checksum", good, 4, true},
                                     {"no time to begin", good, 4, false, 0},
                                     {"no time in the middle", good, 4, false, 3}};
  for (const Stage& stage : stages) {
    CAPTURE(stage.name);
    REQUIRE(FirstError(RunRanks(3, [&](Transport* transport, Communicator* comm, int rank) {
              Rank self(transport, comm, initial, 1000, stage.staging);
              self.Fill();
              if (stage.corrupt && rank == 2) self.store.Allocate(0, 4)[999] ^= std::byte{1};
              const std::string before = self.State();
              self.rebalancer.OnPlan(stage.plan);
              BALLAST_ASSIGN_OR_RETURN(const Command done, self.RunPlan(stage.late));
              BALLAST_RETURN_IF_ERROR(Expect(done == Command::kAbort, "an abort"));
              BALLAST_RETURN_IF_ERROR(Expect(self.State() == before, "the state before"));
              if (stage.staging == 1) return absl::OkStatus();
              // Nothing is left that would be in the way of the next.
              if (stage.corrupt && rank == 2) self.store.Allocate(0, 4)[999] ^= std::byte{1};
              MigrationPlan next = good;
              next.plan_id = 2;
              self.rebalancer.OnPlan(next);
              BALLAST_ASSIGN_OR_RETURN(const Command then, self.RunPlan(1'000'000));
              BALLAST_RETURN_IF_ERROR(Expect(then == Command::kFlip, "a flip"));
              return Expect(self.State() != before && self.flips == 1, "the state after");
            })) == "");
  }
}

// Packs three experts that differ in one tensor each, sends them to the other rank, and computes
// with the copies.
absl::Status RunSentinels(Transport* transport, Communicator* comm, std::vector<float>* outputs) {
  constexpr int kHidden = 8, kInter = 16;
  const Placement initial =
      *Placement::Create(1, 4, Topology::Uniform(2, 4), {0, 1, 2, 3, -1, -1, -1, -1}, 0);
  BALLAST_ASSIGN_OR_RETURN(const auto mlp,
                           GatedMlp::Create(PlainKernels(), kHidden, kInter, DType::kF32));
  Rank self(transport, comm, initial, mlp->packed_bytes(), 4);
  if (comm->rank() == 0) {
    for (int32_t e = 0; e < 4; ++e) {
      // Expert 1 has another gate, 2 another up, 3 another down projection than expert 0.
      std::vector<std::vector<float>> tensors(3, std::vector<float>(kHidden * kInter, 0.25f));
      if (e > 0) tensors[e - 1].back() = 4.0f;
      BALLAST_RETURN_IF_ERROR(mlp->Pack(tensors[0].data(), tensors[1].data(), tensors[2].data(),
                                        DType::kF32, self.store.Allocate(0, e).data()));
      BALLAST_CHECK(self.store.Seal(0, e).ok());
    }
  }
  self.rebalancer.OnPlan(*MakeMigrationPlan(initial, {{0, {0, 1, 2, 3, 0, 1, 2, 3}}}, 1));
  BALLAST_ASSIGN_OR_RETURN(const Command done, self.RunPlan(1'000'000));
  BALLAST_RETURN_IF_ERROR(Expect(done == Command::kFlip, "a flip"));
  AlignedBuffer x(kRowBlock * kHidden * sizeof(float)), y(x.size());
  for (int i = 0; i < kHidden; ++i) x.as<float>()[i] = 1.0f + static_cast<float>(i);
  for (int32_t e = 0; e < 4; ++e) {
    BALLAST_RETURN_IF_ERROR(
        mlp->Run(x.data(), 1, self.store.Parameters(0, e), y.as<float>(), nullptr));
    outputs->insert(outputs->end(), y.as<float>(), y.as<float>() + kHidden);
  }
  return absl::OkStatus();
}

// SOURCE vllm#47588: scales stayed behind when an expert moved.
TEST_CASE("every tensor of an expert moves with it", "[runtime][store]") {
  std::vector<float> outputs[2];
  REQUIRE(FirstError(RunRanks(2, [&](Transport* transport, Communicator* comm, int rank) {
            return RunSentinels(transport, comm, &outputs[rank]);
          })) == "");
  REQUIRE(outputs[0] == outputs[1]);
  // Each tensor shows in the output.
  const auto of = [&](size_t e) {
    return std::vector<float>(outputs[1].begin() + static_cast<std::ptrdiff_t>(e * 8),
                              outputs[1].begin() + static_cast<std::ptrdiff_t>(e * 8 + 8));
  };
  for (size_t e = 1; e < 4; ++e) REQUIRE(of(e) != of(0));
}

// SOURCE vllm#47206: a loader that ran after the placement was made reset its tables.
TEST_CASE("parameters may be loaded again at any time and the tables stay", "[runtime][store]") {
  const Placement initial = Make(3, Topology::Uniform(2, 3), {0, 1, 2, 2, -1, -1});
  REQUIRE(FirstError(RunRanks(2, [&](Transport* transport, Communicator* comm, int) {
            Rank self(transport, comm, initial, 512, 3);
            self.Fill();
            const std::string before = self.State();
            self.Fill();
            BALLAST_RETURN_IF_ERROR(Expect(self.State() == before, "one load is two"));
            self.rebalancer.OnPlan(*MakeMigrationPlan(initial, {{0, {2, 1, -1, 0, 1, 2}}}, 1));
            BALLAST_ASSIGN_OR_RETURN(const Command done, self.RunPlan(1'000'000));
            BALLAST_RETURN_IF_ERROR(Expect(done == Command::kFlip, "a flip"));
            const std::string after = self.State();
            self.Fill();
            return Expect(self.State() == after, "a load after a flip changes nothing");
          })) == "");
}

// SOURCE vllm#18343, EPLB#22: two copies of an expert on one rank were handled as one, and one of
// them kept old parameters.
TEST_CASE("two copies on one rank are one block that comes and goes once", "[runtime][store]") {
  const Placement initial = Make(3, Topology::Uniform(2, 4), {0, 0, 1, -1, 2, -1, -1, -1});
  // Expert 2 enters rank 0 twice at once, and rank 1 gets expert 0 twice; then one of the two goes,
  // then the other.
  const std::vector<std::vector<int32_t>> rows = {
      {2, 0, 1, 2, 0, 0, 2, -1}, {-1, 0, 1, 2, 0, -1, 2, -1}, {0, -1, 1, -1, 2, -1, -1, -1}};
  REQUIRE(FirstError(RunRanks(2, [&](Transport* transport, Communicator* comm, int rank) {
            Rank self(transport, comm, initial, 512, 4);
            self.Fill();
            for (size_t i = 0; i < rows.size(); ++i) {
              self.rebalancer.OnPlan(*MakeMigrationPlan(self.rebalancer.placement(), {{0, rows[i]}},
                                                        static_cast<int64_t>(i) + 1));
              BALLAST_ASSIGN_OR_RETURN(const Command done, self.RunPlan(1'000'000));
              BALLAST_RETURN_IF_ERROR(Expect(done == Command::kFlip, "a flip"));
              BALLAST_RETURN_IF_ERROR(Expect(self.store.copies_received() == 1, "one copy"));
              for (int32_t e = 0; e < 3; ++e) {
                const std::byte* block = self.store.Parameters(0, e);
                BALLAST_RETURN_IF_ERROR(
                    Expect((block != nullptr) == self.rebalancer.placement().Hosts(0, e, rank),
                           "a block where there is a copy"));
                for (size_t at = 0; block != nullptr && at < self.bytes(); ++at) {
                  BALLAST_RETURN_IF_ERROR(Expect(block[at] == Rank::ByteOf(e, at), "each byte"));
                }
              }
            }
            return absl::OkStatus();
          })) == "");
}

}  // namespace
}  // namespace ballast
