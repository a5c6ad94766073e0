#include "tests/support/single_rank_model.h"

#include <algorithm>
#include <array>

#include "base/status.h"
#include "runtime/engine.h"

namespace ballast::testing {

absl::StatusOr<std::unique_ptr<SingleRankModel>> SingleRankModel::Load(const std::string& folder,
                                                                       DType dtype,
                                                                       const KernelSet& kernels) {
  std::unique_ptr<SingleRankModel> model(new SingleRankModel);
  model->transport_ = model->fabric_.MakeTransport(0);
  model->communicator_ =
      std::make_unique<Communicator>(model->transport_.get(), Communicator::Options{});
  BALLAST_ASSIGN_OR_RETURN(model->checkpoint_, Checkpoint::Open(folder));
  const ModelConfig& config = model->checkpoint_->config();
  EngineOptions options;
  options.dtype = dtype;
  model->backend_ = std::make_unique<HostBackend>(kernels);
  BALLAST_ASSIGN_OR_RETURN(
      model->decoder_, Decoder::Create(*model->checkpoint_, {.moe = MoeOptionsOf(options, config)},
                                       model->backend_.get()));
  const int32_t experts = config.gate.num_experts, layers = config.num_moe_layers();
  const int64_t blocks = (config.context_tokens + kKvBlockTokens - 1) / kKvBlockTokens;
  model->cache_ =
      std::make_unique<KvCache>(config, dtype, blocks * KvCache::BlockBytes(config, dtype));
  BALLAST_RETURN_IF_ERROR(model->cache_->Allocate(kernels.memory));
  model->store_ = std::make_unique<ExpertStore>(
      ExpertStore::Options{.num_layers = layers,
                           .num_experts = experts,
                           .block_bytes = model->decoder_->expert_bytes(),
                           .resident_blocks = layers * experts},
      model->transport_.get());
  for (int32_t layer = 0; layer < layers; ++layer) {
    for (int32_t e = 0; e < experts; ++e) {
      BALLAST_RETURN_IF_ERROR(model->decoder_->LoadExpert(
          *model->checkpoint_, layer, e, model->store_->Allocate(layer, e).data()));
      BALLAST_RETURN_IF_ERROR(model->store_->Seal(layer, e));
    }
  }
  BALLAST_ASSIGN_OR_RETURN(const Placement placement,
                           Placement::Contiguous(layers, experts, Topology::Uniform(1, experts),
                                                 /*fill_spare=*/false));
  MoeLayers& moe = model->decoder_->moe();
  BALLAST_RETURN_IF_ERROR(
      moe.Connect(model->communicator_.get(), std::array{0}, placement.topology()));
  BALLAST_RETURN_IF_ERROR(moe.Use(placement, *model->store_));
  return model;
}

absl::StatusOr<std::vector<float>> SingleRankModel::Logits(std::span<const int32_t> tokens,
                                                           int32_t chunk) {
  std::vector<float> all;
  const int32_t count = static_cast<int32_t>(tokens.size());
  const std::vector<int32_t> blocks = cache_->Take((count + kKvBlockTokens - 1) / kKvBlockTokens);
  std::vector<LayerCounts> counts;
  for (int32_t begin = 0; begin < count; begin += chunk) {
    Batch batch;
    batch.block_table = blocks;
    for (int32_t i = begin; i < std::min(begin + chunk, count); ++i) {
      batch.logit_rows.push_back(batch.num_tokens());
      batch.token.push_back(tokens[i]);
      batch.position.push_back(i);
      batch.table_offset.push_back(0);
    }
    BALLAST_RETURN_IF_ERROR(decoder_->Begin(batch, *cache_, [] { return absl::OkStatus(); }));
    BALLAST_ASSIGN_OR_RETURN(const BatchOutput output, decoder_->Finish(&counts));
    all.insert(all.end(), output.logits.begin(), output.logits.end());
  }
  cache_->Give(blocks);
  return all;
}

}  // namespace ballast::testing
