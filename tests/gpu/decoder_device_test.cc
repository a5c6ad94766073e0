// A whole decoder on the device, on one rank and on several that share it: the logits are the CPU's
// bits, whatever the placement.
#include <array>
#include <catch2/catch.hpp>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "comm/transport.h"
#include "kernels/device_kernels.h"
#include "runtime/decoder.h"
#include "runtime/device_backend.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"
#include "tests/placement/random_instances.h"
#include "tests/support/single_rank_model.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::TinyModel;

constexpr int32_t kSlots = 8, kMaxTokens = 24, kMaxSequences = 4;

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
    auto backend = DeviceBackend::Create(
        {.kernels = &PlainDeviceKernels(),
         .path = MlpPath::kPlain,
         .max_blocks = 12,  // of all ranks together they fit
         .lend = [arenas](Communicator*, size_t) { return *arenas; },
         .experts =
             [this] {
               return ExpertArena{experts_->data(), store_->block_bytes(),
                                  static_cast<int32_t>(experts_->size() / store_->block_bytes())};
             }});
    RequireOk(backend.status());
    backend_ = *std::move(backend);
    auto decoder = Decoder::Create(
        checkpoint, {.dtype = dtype, .max_tokens = kMaxTokens, .max_logits = kMaxSequences},
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
  void Use(const Placement& placement) {
    RequireOk(decoder_->moe().Use(placement, *store_));
    RequireOk(decoder_->moe().Check(placement, *store_));
  }
  void Begin(const Batch& batch) { RequireOk(decoder_->Begin(batch, *cache_, Nothing)); }
  std::vector<float> Finish(std::vector<LayerCounts>* counts) {
    const auto logits = decoder_->Finish(counts);
    RequireOk(logits.status());
    return {logits->begin(), logits->end()};
  }
  Decoder& decoder() { return *decoder_; }
  KvCache& cache() { return *cache_; }

 private:
  void LoadExperts(const Checkpoint& checkpoint) {
    const int32_t layers = checkpoint.config().num_moe_layers();
    const int32_t experts = checkpoint.config().gate.num_experts;
    store_ =
        std::make_unique<ExpertStore>(ExpertStore::Options{.rank = comm_.rank(),
                                                           .num_layers = layers,
                                                           .num_experts = experts,
                                                           .block_bytes = decoder_->expert_bytes(),
                                                           .resident_blocks = layers * experts},
                                      transport_.get());
    std::vector<std::byte> blocks(store_->block_bytes() * layers * experts);
    for (int32_t layer = 0; layer < layers; ++layer) {
      for (int32_t e = 0; e < experts; ++e) {
        store_->Allocate(layer, e);
        std::byte* const block = blocks.data() + store_->BlockOf(layer, e) * store_->block_bytes();
        RequireOk(decoder_->LoadExpert(checkpoint, layer, e, block));
      }
    }
    experts_ = std::make_unique<testing::DeviceArray<std::byte>>(blocks);
  }

  std::unique_ptr<Transport> transport_;
  Communicator comm_;
  std::unique_ptr<DeviceBackend> backend_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<ExpertStore> store_;
  std::unique_ptr<testing::DeviceArray<std::byte>> experts_;
};

// A sequence of one rank: its next `count` tokens as a batch, all of whose logits are wanted.
struct Sequence {
  std::vector<int32_t> tokens, blocks;
  int32_t done = 0;
  Batch Next(int32_t count) {
    Batch batch;
    batch.block_table = blocks;
    batch.num_prefill = count > 1 ? count : 0;
    for (int32_t i = 0; i < count; ++i, ++done) {
      if (i >= count - kMaxSequences) batch.logit_rows.push_back(i);
      batch.token.push_back(tokens[done]);
      batch.position.push_back(done);
      batch.table_offset.push_back(0);
    }
    return batch;
  }
};

void RequireTheCpusLogits(const TinyModel& model, DType dtype, int32_t num_ranks, int round) {
  testing::TempFolder folder;
  testing::WriteCheckpoint(folder.path(), model);
  const auto checkpoint = Checkpoint::Open(folder.path());
  RequireOk(checkpoint.status());
  auto reference = testing::SingleRankModel::Load(folder.path(), dtype, PlainKernels());
  RequireOk(reference.status());
  const ModelConfig& config = (*checkpoint)->config();
  const size_t vocab = static_cast<size_t>(config.vocab_size);
  Random random(static_cast<uint64_t>(round) + 700);

  // As large as any arena of these tests.
  testing::DeviceArray<std::byte> memory(static_cast<size_t>(num_ranks) << 20);
  memory.Fill(0);
  std::vector<std::byte*> arenas;
  for (int32_t r = 0; r < num_ranks; ++r)
    arenas.push_back(memory.data() + (static_cast<size_t>(r) << 20));
  LocalFabric fabric(num_ranks);
  std::vector<std::unique_ptr<VirtualRank>> ranks;
  std::vector<Sequence> sequences(static_cast<size_t>(num_ranks));
  std::vector<std::vector<float>> expected;
  std::vector<int32_t> all;
  for (int32_t r = 0; r < num_ranks; ++r) {
    all.push_back(r);
    ranks.push_back(std::make_unique<VirtualRank>(**checkpoint, dtype, &fabric, r, &arenas));
    for (int i = 0; i < 9; ++i) {
      sequences[r].tokens.push_back(static_cast<int32_t>(random.Below(config.vocab_size)));
    }
    sequences[r].blocks = ranks[r]->cache().Take(1);
    const auto logits = (*reference)->Logits(sequences[r].tokens, 9);
    RequireOk(logits.status());
    expected.push_back(*logits);
  }
  const Topology topology = Topology::Uniform(num_ranks, kSlots);
  for (int32_t r = 0; r < num_ranks; ++r) ranks[r]->Connect(all, topology);
  // A prompt of some tokens, then one token at a time; the last rank rests now and then.
  const int32_t counts[] = {1 + static_cast<int32_t>(random.Below(6)), 1, 1};
  for (int64_t step = 0; step < 3; ++step) {
    std::vector<int32_t> row;
    for (int32_t layer = 0; layer < config.num_moe_layers(); ++layer) {
      const auto of_layer =
          testing::RandomRow(&random, topology.num_slots(), config.gate.num_experts);
      row.insert(row.end(), of_layer.begin(), of_layer.end());
    }
    const auto placement =
        Placement::Create(config.num_moe_layers(), config.gate.num_experts, topology, row, step);
    RequireOk(placement.status());
    for (int32_t r = 0; r < num_ranks; ++r) ranks[r]->Use(*placement);
    std::vector<Batch> batches;
    int64_t tokens = 0;
    for (int32_t r = 0; r < num_ranks; ++r) {
      const bool rests = step == 1 && r > 0 && r == num_ranks - 1;
      batches.push_back(rests ? Batch{} : sequences[r].Next(counts[step]));
      tokens += batches.back().num_tokens();
      ranks[r]->Begin(batches.back());
    }
    std::vector<uint64_t> hashes;
    for (int32_t r = 0; r < num_ranks; ++r) {
      CAPTURE(round, num_ranks, step, r);
      std::vector<LayerCounts> of_layers;
      const std::vector<float> logits = ranks[r]->Finish(&of_layers);
      std::vector<float> wanted;
      for (const int32_t row_of_batch : batches[r].logit_rows) {
        const auto first = expected[r].begin() +
                           static_cast<std::ptrdiff_t>(batches[r].position[row_of_batch] * vocab);
        wanted.insert(wanted.end(), first, first + static_cast<std::ptrdiff_t>(vocab));
      }
      REQUIRE(logits == wanted);
      for (const LayerCounts& layer : of_layers) {
        int64_t copies = 0, load = 0;
        for (const auto& kind : layer.counts) {
          for (const int32_t count : kind) copies += count;
        }
        for (const int64_t of_rank : layer.rank_load) load += of_rank;
        REQUIRE(copies == tokens * config.gate.top_k);
        REQUIRE(load == copies);
        REQUIRE(static_cast<int32_t>(layer.rank_load.size()) == num_ranks);
      }
      hashes.push_back(ranks[r]->decoder().moe().TakeChoiceHash());
      const auto ids = ranks[r]->decoder().moe().Ids(config.num_moe_layers() - 1);
      RequireOk(ids.status());
      REQUIRE(static_cast<int32_t>(ids->size()) == batches[r].num_tokens() * config.gate.top_k);
    }
    REQUIRE(hashes == std::vector<uint64_t>(hashes.size(), hashes[0]));
  }
}

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
    RequireTheCpusLogits(model, round % 5 == 4 ? DType::kBF16 : DType::kF32, 1 + round % 3, round);
  });
}

}  // namespace
}  // namespace ballast
