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
#include "kernels/device_kernels.h"
#include "runtime/decoder.h"
#include "runtime/device_backend.h"
#include "runtime/engine.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"
#include "tests/placement/random_instances.h"
#include "tests/support/single_rank_model.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::TinyModel;

constexpr int32_t kSlots = 8, kMaxTokens = 24, kMaxSequences = 4;
constexpr int32_t kLength = 12;     // of a sequence
constexpr int64_t kTimeoutMs = 50;  // of waits on the device, whose time the emulator makes

void RequireOk(const absl::Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

absl::Status Nothing() {
  return absl::OkStatus();
}

// One of several ranks that share the device and this thread. It has all experts in memory.
class VirtualRank {
 public:
  VirtualRank(const Checkpoint& checkpoint, DType dtype, LocalFabric* fabric, int rank,
              const std::vector<std::byte*>* arenas)
      : transport_(fabric->MakeTransport(rank)), comm_(transport_.get(), {}) {
    const ModelConfig& config = checkpoint.config();
    // First for the experts, which are this rank's alone, then for the arenas of all.
    const auto lend = [this, arenas](size_t bytes) -> std::vector<std::byte*> {
      if (experts_ != nullptr) return *arenas;
      experts_ = std::make_unique<testing::DeviceArray<std::byte>>(bytes);
      std::vector<std::byte*> own(arenas->size());
      own[comm_.rank()] = experts_->data();
      return own;
    };
    auto backend = DeviceBackend::Create({.kernels = &PlainDeviceKernels(),
                                          .path = MlpPath::kPlain,
                                          .max_blocks = 12,  // of all ranks together they fit
                                          .rank = rank,
                                          .lend = lend});
    RequireOk(backend.status());
    backend_ = *std::move(backend);
    EngineOptions options;
    options.dtype = dtype;
    options.scheduler.max_batch_tokens = kMaxTokens;
    options.step_timeout_ms = kTimeoutMs;
    auto decoder = Decoder::Create(
        checkpoint, {.moe = MoeOptionsOf(options, config), .max_logits = kMaxSequences},
        backend_.get());
    RequireOk(decoder.status());
    decoder_ = *std::move(decoder);
    cache_ = std::make_unique<KvCache>(config, dtype, 8 * KvCache::BlockBytes(config, dtype));
    RequireOk(cache_->Allocate(backend_->kernels().memory));
    LoadExperts(checkpoint);
  }

  void Connect(const std::vector<int32_t>& ranks, const Topology& topology) {
    RequireOk(decoder_->moe().Connect(&comm_, ranks, topology));
  }
  // The others are lost: it goes on alone, from wherever it is.
  void GoOnAlone(int32_t rank, const Topology& topology) {
    own_fabric_ = std::make_unique<LocalFabric>(1);
    own_transport_ = own_fabric_->MakeTransport(0);
    own_comm_ = std::make_unique<Communicator>(own_transport_.get(), Communicator::Options{});
    RequireOk(decoder_->moe().Halt());
    RequireOk(decoder_->moe().Connect(own_comm_.get(), std::vector<int32_t>{rank}, topology));
  }
  // A step that the others do not take part in.
  void RequireLate(int32_t missing) {
    std::vector<LayerCounts> counts;
    const auto output = decoder_->Finish(&counts);
    INFO(output.status().message());
    REQUIRE(output.status().code() == absl::StatusCode::kDeadlineExceeded);
    REQUIRE(comm_.missing() == std::vector<int>{missing});
  }
  void Use(const Placement& placement) {
    RequireOk(decoder_->moe().Use(placement, *store_));
    RequireOk(decoder_->moe().Check(placement, *store_));
  }
  void Begin(const Batch& batch) { RequireOk(decoder_->Begin(batch, *cache_, Nothing)); }
  std::vector<float> Finish(std::vector<LayerCounts>* counts) {
    const auto output = decoder_->Finish(counts);
    RequireOk(output.status());
    greedy_.assign(output->greedy.begin(), output->greedy.end());
    return {output->logits.begin(), output->logits.end()};
  }
  const std::vector<int32_t>& greedy() const { return greedy_; }  // of the last batch
  int64_t num_graphs() const { return backend_->graphs().num_launches(); }
  Decoder& decoder() { return *decoder_; }
  KvCache& cache() { return *cache_; }

 private:
  void LoadExperts(const Checkpoint& checkpoint) {
    const int32_t layers = checkpoint.config().num_moe_layers();
    const int32_t experts = checkpoint.config().gate.num_experts;
    auto blocks = backend_->MakeBlocks(decoder_->expert_bytes(), layers * experts);
    RequireOk(blocks.status());
    store_ =
        std::make_unique<ExpertStore>(ExpertStore::Options{.rank = comm_.rank(),
                                                           .num_layers = layers,
                                                           .num_experts = experts,
                                                           .block_bytes = decoder_->expert_bytes(),
                                                           .resident_blocks = layers * experts},
                                      transport_.get(), *std::move(blocks));
    for (int32_t layer = 0; layer < layers; ++layer) {
      for (int32_t e = 0; e < experts; ++e) {
        RequireOk(decoder_->LoadExpert(checkpoint, layer, e, store_->Allocate(layer, e).data()));
        RequireOk(store_->Seal(layer, e));
      }
    }
  }

  std::unique_ptr<Transport> transport_;
  Communicator comm_;
  std::unique_ptr<DeviceBackend> backend_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<testing::DeviceArray<std::byte>> experts_;
  std::vector<int32_t> greedy_;
  std::unique_ptr<LocalFabric> own_fabric_;
  std::unique_ptr<Transport> own_transport_;
  std::unique_ptr<Communicator> own_comm_;
};

// A sequence of one rank: its next `count` tokens as a batch. Of the last some the logits or the
// most probable tokens are wanted.
struct Sequence {
  std::vector<int32_t> tokens, blocks;
  int32_t done = 0;
  Batch Next(int32_t count) {
    Batch batch;
    batch.block_table = blocks;
    batch.num_prefill = count > 1 ? count : 0;
    for (int32_t i = 0; i < count; ++i, ++done) {
      if (i >= count - kMaxSequences) {
        (i % 3 == 1 ? batch.greedy_rows : batch.logit_rows).push_back(i);
      }
      batch.token.push_back(tokens[done]);
      batch.position.push_back(done);
      batch.table_offset.push_back(0);
    }
    return batch;
  }
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
    for (int32_t r = 0; r < num_ranks; ++r) {
      ranks_.push_back(std::make_unique<VirtualRank>(*checkpoint_, dtype, &fabric_, r, &arenas_));
      for (int i = 0; i < kLength; ++i) {
        sequences_[r].tokens.push_back(static_cast<int32_t>(random_.Below(config().vocab_size)));
      }
      sequences_[r].blocks = ranks_[r]->cache().Take(1);
      const auto logits = (*reference)->Logits(sequences_[r].tokens, kLength);
      RequireOk(logits.status());
      expected_.push_back(*logits);
    }
    for (int32_t r = 0; r < num_ranks; ++r) ranks_[r]->Connect(all, topology_);
  }

  // Puts experts anywhere.
  void Flip(int64_t epoch) {
    std::vector<int32_t> rows;
    for (int32_t layer = 0; layer < config().num_moe_layers(); ++layer) {
      const auto row =
          testing::RandomRow(&random_, topology_.num_slots(), config().gate.num_experts);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    const auto placement = Placement::Create(config().num_moe_layers(), config().gate.num_experts,
                                             topology_, rows, epoch);
    RequireOk(placement.status());
    for (auto& rank : ranks_) rank->Use(*placement);
  }

  // All ranks' next tokens, but of the last one where it rests.
  void Step(int32_t count, bool last_rests) {
    std::vector<Batch> batches;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const bool rests = last_rests && r > 0 && r + 1 == ranks_.size();
      batches.push_back(rests ? Batch{} : sequences_[r].Next(count));
      ranks_[r]->Begin(batches.back());
    }
    std::vector<std::vector<LayerCounts>> all_counts;  // [ranks][layers]
    std::vector<uint64_t> hashes;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      CAPTURE(ranks_.size(), r);
      std::vector<LayerCounts> of_layers;
      REQUIRE(ranks_[r]->Finish(&of_layers) ==
              Expected(r, batches[r].position, batches[r].logit_rows));
      const auto of_greedy = Expected(r, batches[r].position, batches[r].greedy_rows);
      std::vector<int32_t> greedy;
      for (auto at = of_greedy.begin(); at != of_greedy.end(); at += config().vocab_size) {
        greedy.push_back(static_cast<int32_t>(std::max_element(at, at + config().vocab_size) - at));
      }
      REQUIRE(ranks_[r]->greedy() == greedy);
      all_counts.push_back(std::move(of_layers));
      hashes.push_back(ranks_[r]->decoder().moe().TakeChoiceHash());
    }
    RequireCounts(batches, all_counts);
    REQUIRE(hashes == std::vector<uint64_t>(hashes.size(), hashes[0]));
  }

  // The ranks but `left` are lost before they begin their next step.
  void LoseAllBut(int32_t left) {
    Sequence& sequence = sequences_[left];
    ranks_[left]->Begin(sequence.Next(1));
    ranks_[left]->RequireLate(1 - left);
    sequence.done -= 1;  // it is computed again
    topology_ = Topology::Uniform(1, kSlots);
    ranks_[left]->GoOnAlone(left, topology_);
    std::swap(ranks_[0], ranks_[left]);
    std::swap(sequences_[0], sequences_[left]);
    std::swap(expected_[0], expected_[left]);
    lost_ = std::move(ranks_.back());
    ranks_.pop_back();
  }

  // So many steps of a rank that never rested were launched as a graph.
  void RequireGraphs(int64_t count) const { REQUIRE(ranks_[0]->num_graphs() == count); }

  Random& random() { return random_; }

 private:
  const ModelConfig& config() const { return checkpoint_->config(); }

  std::vector<float> Expected(size_t rank, const std::vector<int32_t>& position,
                              const std::vector<int32_t>& rows) const {
    const std::ptrdiff_t vocab = config().vocab_size;
    std::vector<float> logits;
    for (const int32_t row : rows) {
      const auto first = expected_[rank].begin() + position[row] * vocab;
      logits.insert(logits.end(), first, first + vocab);
    }
    return logits;
  }
  // All ranks know what the gates of all have chosen, by layer and kind.
  void RequireCounts(const std::vector<Batch>& batches,
                     const std::vector<std::vector<LayerCounts>>& all_counts) {
    for (int32_t layer = 0; layer < config().num_moe_layers(); ++layer) {
      PerKind<std::vector<int32_t>> wanted;
      for (auto& kind : wanted) kind.assign(static_cast<size_t>(config().gate.num_experts), 0);
      int64_t copies = 0;
      for (size_t r = 0; r < ranks_.size(); ++r) {
        const auto ids = ranks_[r]->decoder().moe().Ids(layer, batches[r].num_tokens());
        RequireOk(ids.status());
        REQUIRE(static_cast<int32_t>(ids->size()) == batches[r].num_tokens() * config().gate.top_k);
        copies += static_cast<int64_t>(ids->size());
        // These batches are of one kind.
        const TokenKind kind =
            batches[r].num_prefill > 0 ? TokenKind::kPrefill : TokenKind::kDecode;
        for (const int32_t id : *ids) ++wanted[kind][id];
      }
      for (const std::vector<LayerCounts>& of_rank : all_counts) {
        REQUIRE(of_rank[layer].counts == wanted);
        REQUIRE(of_rank[layer].rank_load == all_counts[0][layer].rank_load);
        REQUIRE(of_rank[layer].rank_load.size() == ranks_.size());
      }
      int64_t load = 0;
      for (const int64_t of_rank : all_counts[0][layer].rank_load) load += of_rank;
      REQUIRE(load == copies);
    }
  }

  Random random_;
  Topology topology_;
  testing::TempFolder folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  testing::DeviceArray<std::byte> memory_;
  std::vector<std::byte*> arenas_;
  LocalFabric fabric_;
  std::vector<std::unique_ptr<VirtualRank>> ranks_;
  std::unique_ptr<VirtualRank> lost_;
  std::vector<Sequence> sequences_;
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
    // A prompt of some tokens, then one token at a time: a graph from the second such step on.
    const int32_t prompt = 1 + static_cast<int32_t>(scene.random().Below(6));
    for (int64_t step = 0; step < 5; ++step) {
      scene.Flip(step);
      scene.Step(step == 0 ? prompt : 1, /*last_rests=*/step == 1);
    }
    scene.RequireGraphs(prompt == 1 ? 4 : 3);
  });
}

TEST_CASE("a rank that is left goes on in the same memory", "[device][decoder][streams]") {
  testing::ForEachSchedule([](int round) {
    if (round % 4 != 0) return;  // a deadline takes the emulator a while
    CAPTURE(round);
    const TinyModel model{.seed = static_cast<uint64_t>(round) + 50,
                          .vocab = 32,
                          .hidden = 16,
                          .num_layers = 2,
                          .num_dense_layers = 0,
                          .num_heads = 2,
                          .num_kv_heads = 1,
                          .head_dim = 8,
                          .expert_inter = 8,
                          .num_experts = 6,
                          .top_k = 2,
                          .context = 64};
    Scene scene(model, DType::kF32, 2, static_cast<uint64_t>(round) + 900);
    scene.Flip(0);
    scene.Step(3, /*last_rests=*/false);
    scene.Step(1, /*last_rests=*/false);
    scene.LoseAllBut(round / 4 % 2);
    scene.Flip(1);
    for (int step = 0; step < 3; ++step) scene.Step(1, /*last_rests=*/false);
  });
}

}  // namespace
}  // namespace ballast
