// A whole decoder on the device, on one rank and on several that share it: the logits are the CPU's
// bits, whatever the placement.
#include <algorithm>
#include <catch2/catch.hpp>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/random.h"
#include "comm/transport.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/device_rank.h"
#include "tests/gpu/schedules.h"
#include "tests/support/single_rank_model.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::TinyModel;

using testing::RequireOk;

constexpr int32_t kSlots = 8, kMaxTokens = 24;

// One of several ranks that share the device and this thread.
class VirtualRank {
 public:
  VirtualRank(const Checkpoint& checkpoint, const EngineOptions& options, LocalFabric* fabric,
              int rank, const std::vector<std::byte*>* arenas)
      : transport_(fabric->MakeTransport(rank)),
        comm_(transport_.get(), {}),
        device_(checkpoint, options, transport_.get(),
                {.max_blocks = 12,  // of all ranks together they fit
                 .lend = [arenas](Communicator*, size_t) { return *arenas; }}) {}

  void Connect(const std::vector<int32_t>& ranks, const Topology& topology) {
    RequireOk(moe().Connect(&comm_, ranks, topology));
  }
  void Use(const Placement& placement) {
    RequireOk(moe().Use(placement, device_.store()));
    RequireOk(moe().Check(placement, device_.store()));
  }
  void Begin(const Batch& batch) {
    RequireOk(device_.decoder().Begin(batch, cache(), testing::NothingBetweenLayers));
  }
  std::vector<float> Finish(std::vector<LayerCounts>* counts) {
    const auto output = device_.decoder().Finish(counts);
    RequireOk(output.status());
    greedy_.assign(output->greedy.begin(), output->greedy.end());
    return {output->logits.begin(), output->logits.end()};
  }
  const std::vector<int32_t>& greedy() const { return greedy_; }  // of the last batch
  MoeLayers& moe() { return device_.moe(); }
  KvCache& cache() { return device_.cache(); }

 private:
  std::unique_ptr<Transport> transport_;
  Communicator comm_;
  testing::DeviceRank device_;
  std::vector<int32_t> greedy_;
};

// Ranks of one model, a sequence each, and what the CPU says of it.
class Scene {
 public:
  Scene(const TinyModel& model, DType dtype, int32_t num_ranks, uint64_t seed)
      : random_(seed),
        topology_(Topology::Uniform(num_ranks, kSlots)),
        // As large as any arena of these tests.
        memory_(static_cast<size_t>(num_ranks) << 20),
        fabric_(num_ranks),
        sequences_(static_cast<size_t>(num_ranks)) {
    testing::WriteCheckpoint(folder_.path(), model);
    auto checkpoint = Checkpoint::Open(folder_.path());
    RequireOk(checkpoint.status());
    checkpoint_ = *std::move(checkpoint);
    auto reference = testing::SingleRankModel::Load(folder_.path(), dtype, PlainKernels());
    RequireOk(reference.status());
    memory_.Fill(0);
    std::vector<int32_t> all;
    for (int32_t r = 0; r < num_ranks; ++r) {
      all.push_back(r);
      arenas_.push_back(memory_.data() + (static_cast<size_t>(r) << 20));
    }
    EngineOptions options;
    options.dtype = dtype;
    options.scheduler.max_batch_tokens = kMaxTokens;
    for (int32_t r = 0; r < num_ranks; ++r) {
      ranks_.push_back(std::make_unique<VirtualRank>(*checkpoint_, options, &fabric_, r, &arenas_));
      for (int i = 0; i < 9; ++i) {
        sequences_[r].tokens.push_back(static_cast<int32_t>(random_.Below(config().vocab_size)));
      }
      sequences_[r].blocks = ranks_[r]->cache().Take(1);
      const auto logits = (*reference)->Logits(sequences_[r].tokens, 9);
      RequireOk(logits.status());
      expected_.push_back(*logits);
    }
    for (int32_t r = 0; r < num_ranks; ++r) ranks_[r]->Connect(all, topology_);
  }

  // Puts experts anywhere.
  void Flip(int64_t epoch) {
    const Placement placement = testing::ExpertsAnywhere(config(), topology_, epoch, &random_);
    for (auto& rank : ranks_) rank->Use(placement);
  }

  // All ranks' next tokens, but of the last one where it rests.
  void Step(int32_t count, bool last_rests) {
    std::vector<Batch> batches;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const bool rests = last_rests && r > 0 && r + 1 == ranks_.size();
      batches.push_back(rests ? Batch{} : sequences_[r].Next(count));
      ranks_[r]->Begin(batches.back());
    }
    int64_t copies = 0;
    for (const Batch& batch : batches) copies += batch.num_tokens() * config().gate.top_k;
    std::vector<uint64_t> hashes;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      CAPTURE(ranks_.size(), r);
      std::vector<LayerCounts> of_layers;
      REQUIRE(ranks_[r]->Finish(&of_layers) == Expected(r, batches[r], batches[r].logit_rows));
      const auto of_greedy = Expected(r, batches[r], batches[r].greedy_rows);
      std::vector<int32_t> greedy;
      for (auto at = of_greedy.begin(); at != of_greedy.end(); at += config().vocab_size) {
        greedy.push_back(static_cast<int32_t>(std::max_element(at, at + config().vocab_size) - at));
      }
      REQUIRE(ranks_[r]->greedy() == greedy);
      for (const LayerCounts& layer : of_layers) RequireCounts(layer, copies);
      MoeLayers& moe = ranks_[r]->moe();
      hashes.push_back(moe.TakeChoiceHash());
      const auto ids = moe.Ids(config().num_moe_layers() - 1);
      RequireOk(ids.status());
      REQUIRE(static_cast<int32_t>(ids->size()) == batches[r].num_tokens() * config().gate.top_k);
    }
    REQUIRE(hashes == std::vector<uint64_t>(hashes.size(), hashes[0]));
  }

  Random& random() { return random_; }

 private:
  const ModelConfig& config() const { return checkpoint_->config(); }

  std::vector<float> Expected(size_t rank, const Batch& batch,
                              const std::vector<int32_t>& rows) const {
    return testing::LogitsOf(expected_[rank], batch, rows, config().vocab_size);
  }
  void RequireCounts(const LayerCounts& layer, int64_t copies) const {
    int64_t counted = 0, load = 0;
    for (const auto& kind : layer.counts) counted += std::accumulate(kind.begin(), kind.end(), 0);
    for (const int64_t of_rank : layer.rank_load) load += of_rank;
    REQUIRE(counted == copies);
    REQUIRE(load == copies);
    REQUIRE(layer.rank_load.size() == ranks_.size());
  }

  Random random_;
  const Topology topology_;
  testing::TempFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  testing::DeviceArray<std::byte> memory_;
  std::vector<std::byte*> arenas_;
  LocalFabric fabric_;
  std::vector<std::unique_ptr<VirtualRank>> ranks_;
  std::vector<testing::Sequence> sequences_;
  std::vector<std::vector<float>> expected_;
};

TEST_CASE("a decoder step on the device has the CPU's bits", "[device][decoder][streams]") {
  testing::ForEachSchedule([](int round) {
    const TinyModel model{.seed = static_cast<uint64_t>(round) + 1,
                          .vocab = 32,
                          .hidden = 16,
                          .num_layers = 2,
                          .num_dense_layers = round % 2,
                          .num_heads = 2,
                          .num_kv_heads = 1,
                          .head_dim = 8,
                          .dense_inter = 16,
                          .expert_inter = 8,
                          .num_experts = 6,
                          .top_k = 2,
                          .num_shared = round % 3,
                          .context = 64,
                          .qk_norm = round % 2 == 0,
                          .attention_bias = round % 4 == 0,
                          .tied_embeddings = round % 3 == 0};
    CAPTURE(round);
    Scene scene(model, round % 5 == 4 ? DType::kBF16 : DType::kF32, 1 + round % 3,
                static_cast<uint64_t>(round) + 700);
    // A prompt of some tokens, then one token at a time.
    for (int64_t step = 0; step < 3; ++step) {
      scene.Flip(step);
      scene.Step(step == 0 ? 1 + static_cast<int32_t>(scene.random().Below(6)) : 1,
                 /*last_rests=*/step == 1);
    }
  });
}

}  // namespace
}  // namespace ballast
