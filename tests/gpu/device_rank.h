// One rank of a model whose decoder is on the device, for tests of whole steps.
#ifndef BALLAST_TESTS_GPU_DEVICE_RANK_H_
#define BALLAST_TESTS_GPU_DEVICE_RANK_H_

#include <catch2/catch.hpp>
#include <memory>
#include <utility>
#include <vector>

#include "base/random.h"
#include "comm/transport.h"
#include "kernels/device_kernels.h"
#include "runtime/decoder.h"
#include "runtime/device_backend.h"
#include "runtime/engine.h"
#include "tests/placement/random_instances.h"

namespace ballast::testing {

inline void RequireOk(const absl::Status& status) {
  INFO(status.message());
  REQUIRE(status.ok());
}

inline absl::Status NothingBetweenLayers() {
  return absl::OkStatus();
}

inline constexpr int32_t kMostLogits = 4;  // of a batch

// It has all experts in memory, whatever the placement. THREADS the test's, while it is made
class DeviceRank {
 public:
  // `backend` is asked for all but its kernels and path.
  DeviceRank(const Checkpoint& checkpoint, const EngineOptions& options, Transport* transport,
             DeviceBackend::Options backend_options) {
    const ModelConfig& config = checkpoint.config();
    backend_options.kernels = &PlainDeviceKernels();
    backend_options.path = MlpPath::kPlain;
    auto backend = DeviceBackend::Create(std::move(backend_options));
    RequireOk(backend.status());
    backend_ = *std::move(backend);
    auto decoder = Decoder::Create(
        checkpoint, {.moe = MoeOptionsOf(options, config), .max_logits = kMostLogits},
        backend_.get());
    RequireOk(decoder.status());
    decoder_ = *std::move(decoder);
    const DType dtype = options.dtype;
    cache_ = std::make_unique<KvCache>(config, dtype, 8 * KvCache::BlockBytes(config, dtype));
    RequireOk(cache_->Allocate(backend_->kernels().memory));
    LoadExperts(checkpoint, transport);
  }

  Decoder& decoder() { return *decoder_; }
  MoeLayers& moe() { return decoder_->moe(); }
  KvCache& cache() { return *cache_; }
  Stream stream() const { return backend_->stream(); }
  const ExpertStore& store() const { return *store_; }

 private:
  void LoadExperts(const Checkpoint& checkpoint, Transport* transport) {
    const int32_t layers = checkpoint.config().num_moe_layers();
    const int32_t experts = checkpoint.config().gate.num_experts;
    auto blocks = backend_->MakeBlocks(decoder_->expert_bytes(), layers * experts);
    RequireOk(blocks.status());
    store_ =
        std::make_unique<ExpertStore>(ExpertStore::Options{.rank = transport->rank(),
                                                           .num_layers = layers,
                                                           .num_experts = experts,
                                                           .block_bytes = decoder_->expert_bytes(),
                                                           .resident_blocks = layers * experts},
                                      transport, *std::move(blocks));
    for (int32_t layer = 0; layer < layers; ++layer) {
      for (int32_t e = 0; e < experts; ++e) {
        RequireOk(decoder_->LoadExpert(checkpoint, layer, e, store_->Allocate(layer, e).data()));
        RequireOk(store_->Seal(layer, e));
      }
    }
  }

  std::unique_ptr<DeviceBackend> backend_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<ExpertStore> store_;
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
      if (i >= count - kMostLogits) {
        (i % 3 == 1 ? batch.greedy_rows : batch.logit_rows).push_back(i);
      }
      batch.token.push_back(tokens[done]);
      batch.position.push_back(done);
      batch.table_offset.push_back(0);
    }
    return batch;
  }
};

// Every expert of every layer anywhere, some of them several times.
inline Placement ExpertsAnywhere(const ModelConfig& config, const Topology& topology, int64_t epoch,
                                 Random* random) {
  std::vector<int32_t> rows;
  for (int32_t layer = 0; layer < config.num_moe_layers(); ++layer) {
    const auto row = RandomRow(random, topology.num_slots(), config.gate.num_experts);
    rows.insert(rows.end(), row.begin(), row.end());
  }
  auto placement =
      Placement::Create(config.num_moe_layers(), config.gate.num_experts, topology, rows, epoch);
  RequireOk(placement.status());
  return *std::move(placement);
}

// The logits [rows.size(), vocab] of those rows of a batch, out of those of the whole sequence.
inline std::vector<float> LogitsOf(const std::vector<float>& of_sequence, const Batch& batch,
                                   const std::vector<int32_t>& rows, int32_t vocab_size) {
  std::vector<float> logits;
  for (const int32_t row : rows) {
    const auto first = of_sequence.begin() + std::ptrdiff_t{batch.position[row]} * vocab_size;
    logits.insert(logits.end(), first, first + vocab_size);
  }
  return logits;
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_DEVICE_RANK_H_
