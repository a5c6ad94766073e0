// A whole decoder on devices of several nodes: NCCL's fake carries the rows between ranks that are
// threads of this process and share the emulator. The logits are the CPU's bits, whatever the
// placement and the nodes, also after ranks were lost and have come back.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/status.h"
#include "comm/member_transport.h"
#include "runtime/carried_moe_layers.h"
#include "tests/gpu/device_rank.h"
#include "tests/gpu/schedules.h"
#include "tests/support/cuda_shim/emulator.h"
#include "tests/support/fake_nccl.h"
#include "tests/support/run_ranks.h"
#include "tests/support/single_rank_model.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::DeviceRank;
using testing::FakeNccl;
using testing::FirstError;
using testing::RequireOk;
using testing::RunRanks;
using testing::TinyModel;

constexpr int32_t kSlots = 4, kTokens = 9;  // of a step, and of a sequence
constexpr int64_t kLongMs = 60'000;

// The emulator's streams, for the fake.
FakeNccl::Device Emulator() {
  return {.run =
              [](GpuStream stream, std::function<void()> work) {
                const std::lock_guard turn(cuda_shim::Mutex());
                cuda_shim::Enqueue(stream, std::move(work));
              },
          .hold =
              [](GpuStream stream, std::function<bool()> done) {
                const std::lock_guard turn(cuda_shim::Mutex());
                cuda_shim::EnqueueWaitOutside(stream, std::move(done));
              },
          .advance =
              [] {
                const std::lock_guard turn(cuda_shim::Mutex());
                cuda_shim::RunAWhile();
              }};
}

TinyModel SmallModel(int round) {
  return {.seed = static_cast<uint64_t>(round) + 1,
          .vocab = 32,
          .hidden = 16,
          .num_layers = 3,
          .num_dense_layers = 1,
          .num_heads = 2,
          .num_kv_heads = 1,
          .head_dim = 8,
          .dense_inter = 16,
          .expert_inter = 8,
          .num_experts = 6,
          .top_k = 1 + round % 3,
          .num_shared = round % 2,
          .context = 64};
}

Topology OnNodes(const std::vector<int32_t>& node_of_rank) {
  Topology topology;
  topology.node_of_rank = node_of_rank;
  for (size_t r = 0; r <= node_of_rank.size(); ++r) {
    topology.slot_offsets.push_back(static_cast<int32_t>(r) * kSlots);
  }
  return topology;
}

// What a rank found in a step.
struct Found {
  std::vector<float> logits;
  std::vector<LayerCounts> counts;
  uint64_t choice_hash = 0;
  size_t num_ids = 0;
};

// A job of several ranks, each with a sequence, and what the CPU says of them.
class Job {
 public:
  Job(const TinyModel& model, EngineOptions options, const Topology& all_ranks, uint64_t seed)
      : random(seed),
        topology(all_ranks),
        nccl(topology.num_ranks()),
        sequences(topology.node_of_rank.size()),
        fabric_(topology.num_ranks()) {
    nccl.set_device(Emulator());
    testing::WriteCheckpoint(folder_.path(), model);
    auto opened = Checkpoint::Open(folder_.path());
    RequireOk(opened.status());
    checkpoint_ = *std::move(opened);
    auto reference = testing::SingleRankModel::Load(folder_.path(), options.dtype, PlainKernels());
    RequireOk(reference.status());
    options.scheduler.max_batch_tokens = kTokens;
    for (int32_t r = 0; r < topology.num_ranks(); ++r) {
      transports.push_back(fabric_.MakeTransport(r));
      ranks.push_back(std::make_unique<DeviceRank>(
          *checkpoint_, options, transports.back().get(),
          DeviceBackend::Options{.node_of_rank = topology.node_of_rank, .nccl = nccl.api(r)}));
      for (int i = 0; i < kTokens; ++i) {
        sequences[r].tokens.push_back(static_cast<int32_t>(random.Below(config().vocab_size)));
      }
      sequences[r].blocks = ranks[r]->cache().Take(1);
      const auto logits = (*reference)->Logits(sequences[r].tokens, kTokens);
      RequireOk(logits.status());
      expected_.push_back(*logits);
    }
  }

  const ModelConfig& config() const { return checkpoint_->config(); }
  int32_t num_ranks() const { return topology.num_ranks(); }

  // A step of one rank. THREADS its own
  absl::Status Step(int rank, const Placement& placement, const Batch& batch, Found* found,
                    const std::function<absl::Status()>& between_layers) {
    DeviceRank& device = *ranks[rank];
    BALLAST_RETURN_IF_ERROR(device.moe().Use(placement, device.store()));
    BALLAST_RETURN_IF_ERROR(device.moe().Check(placement, device.store()));
    BALLAST_RETURN_IF_ERROR(device.decoder().Begin(batch, device.cache(), between_layers));
    BALLAST_ASSIGN_OR_RETURN(const BatchOutput output, device.decoder().Finish(&found->counts));
    found->logits.assign(output.logits.begin(), output.logits.end());
    found->choice_hash = device.moe().TakeChoiceHash();
    BALLAST_ASSIGN_OR_RETURN(const auto ids,
                             device.moe().Ids(config().num_moe_layers() - 1, batch.num_tokens()));
    found->num_ids = ids.size();
    return absl::OkStatus();
  }

  // What all of `members` found in a step is what the CPU says, and the same.
  void RequireFound(const std::vector<int32_t>& members, const std::vector<Batch>& batches,
                    const std::vector<Found>& found) const {
    const int64_t top_k = config().gate.top_k;
    int64_t copies = 0;
    for (const int32_t r : members) copies += batches[r].num_tokens() * top_k;
    for (const int32_t r : members) {
      CAPTURE(r);
      REQUIRE(found[r].logits == testing::LogitsOf(expected_[r], batches[r], batches[r].logit_rows,
                                                   config().vocab_size));
      REQUIRE(found[r].choice_hash == found[members[0]].choice_hash);
      REQUIRE(static_cast<int64_t>(found[r].num_ids) == batches[r].num_tokens() * top_k);
      for (const LayerCounts& layer : found[r].counts) {
        int64_t counted = 0;
        for (const auto& kind : layer.counts) {
          counted += std::accumulate(kind.begin(), kind.end(), 0);
        }
        REQUIRE(counted == copies);
        REQUIRE(layer.rank_load.size() == members.size());
        REQUIRE(std::accumulate(layer.rank_load.begin(), layer.rank_load.end(), int64_t{0}) ==
                copies);
      }
    }
  }

  Random random;
  const Topology topology;
  FakeNccl nccl;
  std::vector<std::unique_ptr<Transport>> transports;
  std::vector<std::unique_ptr<DeviceRank>> ranks;
  std::vector<testing::Sequence> sequences;

 private:
  testing::TempFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  LocalFabric fabric_;
  std::vector<std::vector<float>> expected_;
};

std::vector<int32_t> AllOf(int32_t count) {
  std::vector<int32_t> all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// Of four.
std::vector<int32_t> Without(int32_t rank) {
  std::vector<int32_t> others = AllOf(4);
  std::erase(others, rank);
  return others;
}

// Equal nodes, uneven ones, nodes that take turns, and one rank alone on its node.
const std::vector<std::vector<int32_t>> kNodes = {{0, 0, 1, 1}, {0, 1, 1}, {0, 1, 0, 1},
                                                  {0, 0, 0, 1}, {0, 1},    {0, 1, 2, 0, 2}};

TEST_CASE("a decoder step on several nodes has the CPU's bits", "[device][decoder][nodes]") {
  testing::ForEachSchedule([](int round) {
    CAPTURE(round);
    EngineOptions options;
    options.dtype = round % 3 == 2 ? DType::kBF16 : DType::kF32;
    options.split = kAllSplitModes[round % std::size(kAllSplitModes)];
    Job job(SmallModel(round), options, OnNodes(kNodes[round % kNodes.size()]),
            static_cast<uint64_t>(round) + 300);
    job.nccl.set_polls_in_progress(round % 2);
    constexpr int kSteps = 3;
    std::vector<Placement> placements;
    std::vector<std::vector<Batch>> batches(kSteps);
    std::vector<std::vector<Found>> found(kSteps);
    for (int step = 0; step < kSteps; ++step) {
      placements.push_back(testing::ExpertsAnywhere(job.config(), job.topology, step, &job.random));
      found[step].resize(static_cast<size_t>(job.num_ranks()));
      // A prompt of some tokens, then one token at a time; some ranks have none.
      for (int32_t r = 0; r < job.num_ranks(); ++r) {
        const bool rests = step == 1 && r % 2 == round % 2;
        const int32_t count = step == 0 ? 1 + static_cast<int32_t>(job.random.Below(6)) : 1;
        batches[step].push_back(rests ? Batch{} : job.sequences[r].Next(count));
      }
    }
    const std::vector<int32_t> all = AllOf(job.num_ranks());
    const auto statuses =
        RunRanks(job.num_ranks(), [&](Transport*, Communicator* comm, int r) -> absl::Status {
          BALLAST_RETURN_IF_ERROR(job.ranks[r]->moe().Connect(comm, all, job.topology));
          for (int step = 0; step < kSteps; ++step) {
            BALLAST_RETURN_IF_ERROR(job.Step(r, placements[step], batches[step][r], &found[step][r],
                                             testing::NothingBetweenLayers));
          }
          return absl::OkStatus();
        });
    REQUIRE(FirstError(statuses) == "");
    for (int step = 0; step < kSteps; ++step) {
      CAPTURE(step);
      job.RequireFound(all, batches[step], found[step]);
    }
  });
}

// All experts on one rank, alone on its node or not, and all tokens there are: what comes to it,
// what it gets by its node for others, and what goes back could not be more.
TEST_CASE("the fullest step fits into the memory that was announced", "[device][decoder][nodes]") {
  cuda_shim::Reseed(77);
  const int32_t holder = GENERATE(0, 2);
  const std::vector<int32_t> node_of_rank =
      GENERATE(std::vector<int32_t>{0, 1, 1, 1}, std::vector<int32_t>{0, 0, 1, 1});
  const TinyModel model = SmallModel(2);
  Topology topology{.slot_offsets = {0}, .node_of_rank = node_of_rank};
  for (int32_t r = 0; r < 4; ++r) {
    topology.slot_offsets.push_back(topology.slot_offsets.back() +
                                    (r == holder ? model.num_experts : 0));
  }
  EngineOptions options;
  Job job(model, options, topology, 90);
  const Placement placement = testing::ExpertsAnywhere(job.config(), job.topology, 0, &job.random);
  std::vector<Batch> batches;
  for (int32_t r = 0; r < 4; ++r) batches.push_back(job.sequences[r].Next(kTokens));
  const std::vector<int32_t> all = AllOf(4);
  const size_t before = static_cast<size_t>(cuda::FreeMemory());
  std::vector<Found> found(4);
  REQUIRE(FirstError(RunRanks(4, [&](Transport*, Communicator* comm, int r) -> absl::Status {
            BALLAST_RETURN_IF_ERROR(job.ranks[r]->moe().Connect(comm, all, job.topology));
            return job.Step(r, placement, batches[r], &found[r], testing::NothingBetweenLayers);
          })) == "");
  job.RequireFound(all, batches, found);
  options.scheduler.max_batch_tokens = kTokens;
  REQUIRE(before - static_cast<size_t>(cuda::FreeMemory()) ==
          4 * CarriedMoeLayers::MemoryBytes(MoeOptionsOf(options, job.config()), topology));
}

// How a rank is lost, and how the others hear of it. Later it comes back, and rank 1 leaves.
enum class Loss { kLeftAlone, kInAnExchange, kTold, kToldBetweenLayers };

// A generation of `members`: one step, in which nobody is lost. THREADS a member's
absl::Status GoOn(Job* job, int rank, const std::vector<int32_t>& members, int64_t generation,
                  const Placement& placement, const Batch& batch, Found* found) {
  MemberTransport transport(job->transports[rank].get(), members, generation);
  Communicator comm(&transport, {.deadline_ms = kLongMs});
  BALLAST_RETURN_IF_ERROR(job->ranks[rank]->moe().Connect(&comm, members, placement.topology()));
  return job->Step(rank, placement, batch, found, testing::NothingBetweenLayers);
}

// Four ranks on two nodes, of which one is lost in the second step; the next generation is without
// it, and in the one after it is back and rank 1 has gone.
class LossScene {
 public:
  LossScene(Loss how, int who, bool with_halt)
      : loss(how),
        lost(who),
        halts(with_halt),
        left(Without(who)),
        job_(SmallModel(1), OptionsFor(how), OnNodes(kNodeOfRank), 40 + static_cast<uint64_t>(who)),
        batches_(4),
        found_(4, std::vector<Found>(4)),
        ends_(4),
        missing_(4) {
    // The first step has two layers of four groups each: in the second one half of the first layer.
    if (in_exchange()) job_.nccl.faults(lost).lost_after_groups = 9;
    int64_t epoch = 0;
    for (const auto& members : {all_, all_, left, back_}) {
      std::vector<int32_t> nodes;
      for (const int32_t r : members) nodes.push_back(kNodeOfRank[r]);
      placements_.push_back(
          testing::ExpertsAnywhere(job_.config(), OnNodes(nodes), epoch++, &job_.random));
    }
    for (const int32_t r : all_) {
      batches_[0].push_back(job_.sequences[r].Next(3));
      batches_[1].push_back(job_.sequences[r].Next(2));
      batches_[2].push_back(batches_[1].back());  // once more; the lost one will be behind
      batches_[3].push_back(r == lost ? batches_[1].back() : job_.sequences[r].Next(1));
    }
  }

  bool are_told() const { return loss == Loss::kTold || loss == Loss::kToldBetweenLayers; }
  bool in_exchange() const {
    return loss == Loss::kInAnExchange || loss == Loss::kToldBetweenLayers;
  }

  // THREADS the rank's
  absl::Status Live(int r) {
    BALLAST_RETURN_IF_ERROR(UntilTheLoss(r));
    if (halts) BALLAST_RETURN_IF_ERROR(Halt(r));
    if (r != lost) {
      BALLAST_RETURN_IF_ERROR(
          GoOn(&job_, r, left, 1, placements_[2], batches_[2][r], &found_[2][r]));
    }
    if (r == 1) return absl::OkStatus();
    return GoOn(&job_, r, back_, 2, placements_[3], batches_[3][r], &found_[3][r]);
  }

  void RequireSteps() const {
    job_.RequireFound(all_, batches_[0], found_[0]);
    job_.RequireFound(left, batches_[2], found_[2]);
    job_.RequireFound(back_, batches_[3], found_[3]);
  }
  // That the survivors know whom they have lost.
  void RequireNamed() const {
    std::vector<int> waited_for;
    for (const int32_t r : left) {
      CAPTURE(r, lost, ends_[r].message());
      REQUIRE((are_told() ? absl::IsAborted(ends_[r]) : absl::IsDeadlineExceeded(ends_[r])));
      if (loss == Loss::kLeftAlone) REQUIRE(std::ranges::count(missing_[r], lost) > 0);
      waited_for.insert(waited_for.end(), missing_[r].begin(), missing_[r].end());
    }
    if (are_told()) return;
    // One may wait for others that are kept waiting. Those say so.
    std::erase_if(waited_for, [&](int r) { return std::ranges::count(left, r) > 0; });
    REQUIRE(!waited_for.empty());
    REQUIRE(std::ranges::count(waited_for, lost) == std::ssize(waited_for));
  }
  // Shrunk once, and made anew when the lost one was back. That one would have shrunk, too. Who had
  // to end an exchange to come to rest has nothing to shrink.
  void RequireJoined() {
    if (halts) return RequireEnded();
    for (const int32_t r : left) {
      CAPTURE(r, lost);
      const FakeNccl::Seen& seen = job_.nccl.seen(r);
      REQUIRE(seen.plain_shrinks + seen.shrinks_with_abort == 1);
      if (loss == Loss::kLeftAlone) REQUIRE(seen.plain_shrinks == 1);
      if (in_exchange()) REQUIRE(seen.shrinks_with_abort == 1);
      REQUIRE(seen.inits == (r == 1 ? 1 : 2));
    }
    REQUIRE(job_.nccl.seen(lost).inits == 2);
    RequireEnded();
  }
  void RequireEnded() {
    if (halts && in_exchange()) REQUIRE(job_.nccl.seen(left[0]).shrinks_with_abort == 0);
    REQUIRE(job_.nccl.uses_after_free() == 0);
    job_.ranks.clear();
    REQUIRE(job_.nccl.live_communicators() == 0);
  }

  const Loss loss;
  const int lost;
  const bool halts;  // before the next generation, as an engine does, which may free memory then
  const std::vector<int32_t> left;

 private:
  static inline const std::vector<int32_t> kNodeOfRank = {0, 0, 1, 1};

  static EngineOptions OptionsFor(Loss how) {
    EngineOptions options;
    const bool deadline = how == Loss::kLeftAlone || how == Loss::kInAnExchange;
    options.step_timeout_ms = deadline ? 5'000 : kLongMs;
    return options;
  }

  // After it nothing runs, whoever is gone.
  absl::Status Halt(int r) {
    BALLAST_RETURN_IF_ERROR(job_.ranks[r]->moe().Halt());
    BALLAST_ASSIGN_OR_RETURN(const bool idle, cuda::IsDone(job_.ranks[r]->stream()));
    return idle ? absl::OkStatus() : absl::InternalError("it has not come to rest");
  }

  absl::Status UntilTheLoss(int r) {
    MemberTransport transport(job_.transports[r].get(), all_, 0);
    Communicator comm(&transport,
                      {.deadline_ms = OptionsFor(loss).step_timeout_ms, .interrupted = [&] {
                         return told_ ? absl::AbortedError("told to halt") : absl::OkStatus();
                       }});
    BALLAST_RETURN_IF_ERROR(job_.ranks[r]->moe().Connect(&comm, all_, job_.topology));
    BALLAST_RETURN_IF_ERROR(
        job_.Step(r, placements_[0], batches_[0][r], &found_[0][r], testing::NothingBetweenLayers));
    ends_[r] = job_.Step(r, placements_[1], batches_[1][r], &found_[1][r], [&]() -> absl::Status {
      if (r == lost && !in_exchange()) return absl::CancelledError("gone");
      // What is under way to the lost one stays so.
      if (loss == Loss::kToldBetweenLayers) return absl::AbortedError("told to halt");
      return absl::OkStatus();
    });
    if (r == lost && loss == Loss::kTold) told_ = true;
    missing_[r] = comm.missing();
    return absl::OkStatus();
  }

  const std::vector<int32_t> all_ = AllOf(4), back_ = Without(1);
  Job job_;
  std::vector<Placement> placements_;  // of the steps
  std::vector<std::vector<Batch>> batches_;
  std::vector<std::vector<Found>> found_;
  std::vector<absl::Status> ends_;  // of the second step
  std::vector<std::vector<int>> missing_;
  std::atomic<bool> told_ = false;
};

TEST_CASE("a rank that is lost on the way is named and the others go on",
          "[device][decoder][nodes][errors]") {
  const Loss loss =
      GENERATE(Loss::kLeftAlone, Loss::kInAnExchange, Loss::kTold, Loss::kToldBetweenLayers);
  const int lost = GENERATE(0, 3);
  const bool halts = GENERATE(false, true);
  if (halts && (loss == Loss::kLeftAlone || loss == Loss::kInAnExchange)) return;  // they take long
  cuda_shim::Reseed(static_cast<uint64_t>(lost) + 5);
  LossScene scene(loss, lost, halts);
  REQUIRE(FirstError(
              RunRanks(4, [&](Transport*, Communicator*, int r) { return scene.Live(r); })) == "");
  scene.RequireSteps();
  scene.RequireNamed();
  scene.RequireJoined();
}

// Its own slots would not do, so a regrouping gives it more than any rank had at the start.
TEST_CASE("a rank that is left alone has room for all experts", "[device][decoder][nodes]") {
  cuda_shim::Reseed(91);
  Job job(SmallModel(1), EngineOptions{}, OnNodes({0, 1}), 91);
  const Placement together = testing::ExpertsAnywhere(job.config(), job.topology, 0, &job.random);
  const Placement alone = testing::ExpertsAnywhere(
      job.config(), Topology::Uniform(1, job.config().gate.num_experts), 1, &job.random);
  const std::vector<Batch> first = {job.sequences[0].Next(3), job.sequences[1].Next(3)};
  std::vector<Found> found(2), later(1);
  REQUIRE(FirstError(RunRanks(2, [&](Transport*, Communicator*, int r) {
            return GoOn(&job, r, AllOf(2), 0, together, first[r], &found[r]);
          })) == "");
  job.RequireFound(AllOf(2), first, found);
  RequireOk(job.ranks[0]->moe().Halt());
  const std::vector<Batch> next = {job.sequences[0].Next(2)};
  RequireOk(GoOn(&job, 0, {0}, 1, alone, next[0], &later[0]));
  job.RequireFound({0}, next, later);
}

TEST_CASE("several nodes without NCCL are refused", "[device][nodes][errors]") {
  const auto make = [](const std::vector<int32_t>& node_of_rank) {
    return DeviceBackend::Create(
               {.kernels = &PlainDeviceKernels(), .node_of_rank = node_of_rank, .nccl = nullptr})
        .status();
  };
  REQUIRE(make({}).ok());
  REQUIRE(make({0, 0, 0}).ok());
  const absl::Status refused = make({0, 0, 1});
  REQUIRE(absl::IsFailedPrecondition(refused));
  REQUIRE(std::string(refused.message()).find("BALLAST_WITH_NCCL") != std::string::npos);
}

}  // namespace
}  // namespace ballast
