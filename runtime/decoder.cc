#include "runtime/decoder.h"

#include <cmath>

#include "base/status.h"

namespace ballast {

// Parameters of one decoder layer that every rank holds.
struct Decoder::Layer {
  std::vector<float> attention_norm, mlp_norm;
  std::vector<float> qkv_bias, q_norm, k_norm;  // empty where the model has none
  AlignedBuffer qkv, out;
  AlignedBuffer mlp;     // of a dense layer
  AlignedBuffer shared;  // shared experts of an MoE layer
  RouterParameters router;
};

void Batch::Clear() {
  token.clear();
  position.clear();
  table_offset.clear();
  block_table.clear();
  logit_rows.clear();
  num_prefill = 0;
}

Decoder::Decoder(const ModelConfig& config, const Options& options, const KernelSet& kernels)
    : config_(config), options_(options), kernels_(kernels) {
  const int half = config.rotary_dim / 2;
  for (int position = 0; position < config.context_tokens; ++position) {
    for (int i = 0; i < half; ++i) {
      const double angle = position / std::pow(config.rope_theta, 2.0 * i / config.rotary_dim);
      rotary_cos_.push_back(static_cast<float>(std::cos(angle)));
      rotary_sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

Decoder::~Decoder() = default;

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const Checkpoint& checkpoint,
                                                         const Options& options,
                                                         const KernelSet& kernels) {
  const ModelConfig& config = checkpoint.config();
  std::unique_ptr<Decoder> decoder(new Decoder(config, options, kernels));
  BALLAST_RETURN_IF_ERROR(decoder->MakeProducts());
  BALLAST_ASSIGN_OR_RETURN(decoder->moe_, MoeExecutor::Create({.gate = config.gate,
                                                               .hidden = config.hidden,
                                                               .expert_inter = config.expert_inter,
                                                               .dtype = options.dtype,
                                                               .split = options.split},
                                                              kernels));
  BALLAST_ASSIGN_OR_RETURN(decoder->embedding_, checkpoint.LoadFloats("model.embed_tokens.weight"));
  BALLAST_ASSIGN_OR_RETURN(decoder->final_norm_, checkpoint.LoadFloats("model.norm.weight"));
  BALLAST_RETURN_IF_ERROR(checkpoint.LoadMatrix(
      {config.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"},
      *decoder->head_matmul_, &decoder->head_));
  decoder->layers_.resize(static_cast<size_t>(config.num_layers));
  for (int32_t i = 0; i < config.num_layers; ++i) {
    BALLAST_RETURN_IF_ERROR(decoder->LoadLayer(checkpoint, i, &decoder->layers_[i]));
  }
  return decoder;
}

size_t Decoder::parameter_bytes() const {
  size_t bytes = head_.size();
  const auto add = [&](const std::vector<float>& floats) {
    bytes += floats.size() * sizeof(float);
  };
  for (const auto* floats : {&embedding_, &final_norm_, &rotary_cos_, &rotary_sin_}) add(*floats);
  for (const Layer& layer : layers_) {
    for (const auto* floats : {&layer.attention_norm, &layer.mlp_norm, &layer.qkv_bias,
                               &layer.q_norm, &layer.k_norm, &layer.router.bias}) {
      add(*floats);
    }
    for (const auto* packed :
         {&layer.qkv, &layer.out, &layer.mlp, &layer.shared, &layer.router.packed}) {
      bytes += packed->size();
    }
  }
  return bytes;
}

absl::Status Decoder::MakeProducts() {
  const ModelConfig& c = config_;
  const DType dtype = options_.dtype;
  const int q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  BALLAST_ASSIGN_OR_RETURN(qkv_, kernels_.make_matmul(q + 2 * kv, c.hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(out_, kernels_.make_matmul(c.hidden, q, dtype));
  BALLAST_ASSIGN_OR_RETURN(head_matmul_, kernels_.make_matmul(c.vocab_size, c.hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(dense_mlp_, GatedMlp::Create(kernels_, c.hidden, c.dense_inter, dtype));
  if (c.shared_inter > 0) {
    BALLAST_ASSIGN_OR_RETURN(shared_mlp_,
                             GatedMlp::Create(kernels_, c.hidden, c.shared_inter, dtype));
  }
  return absl::OkStatus();
}

absl::Status Decoder::LoadLayer(const Checkpoint& checkpoint, int32_t index, Layer* layer) {
  const std::string p = absl::StrCat("model.layers.", index, ".");
  const std::string a = p + "self_attn.";
  BALLAST_ASSIGN_OR_RETURN(layer->attention_norm,
                           checkpoint.LoadFloats(p + "input_layernorm.weight"));
  BALLAST_ASSIGN_OR_RETURN(layer->mlp_norm,
                           checkpoint.LoadFloats(p + "post_attention_layernorm.weight"));
  BALLAST_RETURN_IF_ERROR(checkpoint.LoadMatrix(
      {a + "q_proj.weight", a + "k_proj.weight", a + "v_proj.weight"}, *qkv_, &layer->qkv));
  BALLAST_RETURN_IF_ERROR(checkpoint.LoadMatrix({a + "o_proj.weight"}, *out_, &layer->out));
  if (config_.attention_bias) {
    for (const char* name : {"q_proj.bias", "k_proj.bias", "v_proj.bias"}) {
      BALLAST_ASSIGN_OR_RETURN(const auto part, checkpoint.LoadFloats(a + name));
      layer->qkv_bias.insert(layer->qkv_bias.end(), part.begin(), part.end());
    }
  }
  if (config_.qk_norm) {
    BALLAST_ASSIGN_OR_RETURN(layer->q_norm, checkpoint.LoadFloats(a + "q_norm.weight"));
    BALLAST_ASSIGN_OR_RETURN(layer->k_norm, checkpoint.LoadFloats(a + "k_norm.weight"));
  }
  if (index < config_.num_dense_layers) {
    layer->mlp = AlignedBuffer(dense_mlp_->packed_bytes());
    return checkpoint.LoadMlp(p + "mlp.", dense_mlp_.get(), layer->mlp.data());
  }
  if (shared_mlp_ != nullptr) {
    layer->shared = AlignedBuffer(shared_mlp_->packed_bytes());
    BALLAST_RETURN_IF_ERROR(
        checkpoint.LoadMlp(p + "mlp.shared_experts.", shared_mlp_.get(), layer->shared.data()));
  }
  BALLAST_ASSIGN_OR_RETURN(layer->router.bias,
                           checkpoint.LoadFloats(p + "mlp.gate.e_score_correction_bias"));
  return checkpoint.LoadMatrix({p + "mlp.gate.weight"}, moe_->gate_matmul(), &layer->router.packed);
}

absl::Status Decoder::LoadExpert(const Checkpoint& checkpoint, int32_t moe_layer, int32_t expert,
                                 std::byte* packed) {
  return checkpoint.LoadMlp(ExpertPrefix(config_.num_dense_layers + moe_layer, expert),
                            &moe_->expert_mlp(), packed);
}

void Decoder::Reserve(int32_t num_tokens, int32_t num_logits) {
  const ModelConfig& c = config_;
  const size_t rows = RoundUp(static_cast<size_t>(num_tokens), kRowBlock);
  const size_t hidden = static_cast<size_t>(c.hidden), act = SizeOf(options_.dtype);
  residual_.EnsureSize(rows * hidden * sizeof(float));
  normed_.EnsureSize(rows * hidden * sizeof(float));
  normed_act_.EnsureSize(rows * hidden * act);
  branch_.EnsureSize(rows * hidden * sizeof(float));
  qkv_out_.EnsureSize(rows * static_cast<size_t>(qkv_->n()) * sizeof(float));
  attended_.EnsureSize(rows * static_cast<size_t>(out_->k()) * act);
  const size_t wanted = RoundUp(static_cast<size_t>(num_logits), kRowBlock);
  logits_in_.EnsureSize(wanted * hidden * act);
  logits_.EnsureSize(wanted * static_cast<size_t>(c.vocab_size) * sizeof(float));
}

absl::Status Decoder::Embed(const Batch& batch) {
  return kernels_.embed({.num_rows = batch.num_tokens(),
                         .width = config_.hidden,
                         .token = batch.token.data(),
                         .table = embedding_.data(),
                         .y = residual_.as<float>()},
                        nullptr);
}

absl::Status Decoder::AddBranch(int rows) {
  return kernels_.add({.num_rows = rows,
                       .width = config_.hidden,
                       .x = branch_.as<float>(),
                       .y = residual_.as<float>()},
                      nullptr);
}

// Each head of the queries and keys by itself.
absl::Status Decoder::NormHeads(const Layer& layer, int rows) {
  const ModelConfig& c = config_;
  float* q = qkv_out_.as<float>();
  float* k = q + c.num_heads * c.head_dim;
  BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = rows,
                                             .num_heads = c.num_heads,
                                             .width = c.head_dim,
                                             .stride = qkv_->n(),
                                             .x = q,
                                             .weight = layer.q_norm.data(),
                                             .eps = c.norm_eps,
                                             .y_f32 = q},
                                            nullptr));
  return kernels_.rms_norm({.num_rows = rows,
                            .num_heads = c.num_kv_heads,
                            .width = c.head_dim,
                            .stride = qkv_->n(),
                            .x = k,
                            .weight = layer.k_norm.data(),
                            .eps = c.norm_eps,
                            .y_f32 = k},
                           nullptr);
}

absl::Status Decoder::Attend(const Layer& layer, const Batch& batch, KvLayerView cache) {
  const ModelConfig& c = config_;
  const int rows = batch.num_tokens(), width = qkv_->n();
  const int q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = rows,
                                             .width = c.hidden,
                                             .x = residual_.as<float>(),
                                             .weight = layer.attention_norm.data(),
                                             .eps = c.norm_eps,
                                             .act_type = options_.dtype,
                                             .y_act = normed_act_.data()},
                                            nullptr));
  BALLAST_RETURN_IF_ERROR(
      qkv_->Run(normed_act_.data(), rows, layer.qkv.data(), qkv_out_.as<float>(), nullptr));
  float* q = qkv_out_.as<float>();
  if (!layer.qkv_bias.empty()) {
    BALLAST_RETURN_IF_ERROR(kernels_.add_bias(
        {.num_rows = rows, .width = width, .bias = layer.qkv_bias.data(), .y = q}, nullptr));
  }
  if (c.qk_norm) BALLAST_RETURN_IF_ERROR(NormHeads(layer, rows));
  // Queries and keys stand side by side in a row and turn by the same angles.
  BALLAST_RETURN_IF_ERROR(kernels_.rotary({.num_rows = rows,
                                           .num_heads = c.num_heads + c.num_kv_heads,
                                           .head_dim = c.head_dim,
                                           .rotary_dim = c.rotary_dim,
                                           .stride = width,
                                           .x = q,
                                           .position = batch.position.data(),
                                           .cos = rotary_cos_.data(),
                                           .sin = rotary_sin_.data()},
                                          nullptr));
  const KvIndex index{batch.position, batch.table_offset, batch.block_table};
  BALLAST_RETURN_IF_ERROR(kernels_.kv_write({.num_rows = rows,
                                             .kv_heads = c.num_kv_heads,
                                             .head_dim = c.head_dim,
                                             .stride = width,
                                             .k = q + q_width,
                                             .v = q + q_width + kv_width,
                                             .index = index,
                                             .cache = cache},
                                            nullptr));
  BALLAST_RETURN_IF_ERROR(kernels_.attention({.num_rows = rows,
                                              .num_heads = c.num_heads,
                                              .kv_heads = c.num_kv_heads,
                                              .head_dim = c.head_dim,
                                              .stride = width,
                                              .q = q,
                                              .index = index,
                                              .cache = cache,
                                              .act_type = options_.dtype,
                                              .y = attended_.data()},
                                             nullptr));
  BALLAST_RETURN_IF_ERROR(
      out_->Run(attended_.data(), rows, layer.out.data(), branch_.as<float>(), nullptr));
  return AddBranch(rows);
}

absl::Status Decoder::RunDense(const Layer& layer, const Batch& batch) {
  BALLAST_RETURN_IF_ERROR(dense_mlp_->Run(normed_act_.data(), batch.num_tokens(), layer.mlp.data(),
                                          branch_.as<float>(), nullptr));
  return AddBranch(batch.num_tokens());
}

absl::Status Decoder::RunMoe(const Layer& layer, int32_t moe_layer, const Batch& batch,
                             DispatchTable* table, LayerCounts* counts) {
  const auto add_shared = [&]() -> absl::Status {
    if (shared_mlp_ == nullptr || batch.num_tokens() == 0) return absl::OkStatus();
    BALLAST_RETURN_IF_ERROR(shared_mlp_->Run(normed_act_.data(), batch.num_tokens(),
                                             layer.shared.data(), branch_.as<float>(), nullptr));
    return AddBranch(batch.num_tokens());
  };
  return moe_->Run(table, {.layer = moe_layer,
                           .num_tokens = batch.num_tokens(),
                           .num_prefill = batch.num_prefill,
                           .x_f32 = normed_.as<float>(),
                           .x_act = normed_act_.data(),
                           .router = &layer.router,
                           .while_waiting = add_shared,
                           .base = residual_.as<float>(),
                           .y = residual_.as<float>(),
                           .counts = counts});
}

absl::StatusOr<std::span<const float>> Decoder::Logits(const Batch& batch) {
  const int wanted = static_cast<int>(batch.logit_rows.size());
  if (wanted > 0) {
    BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = wanted,
                                               .width = config_.hidden,
                                               .x = residual_.as<float>(),
                                               .row = batch.logit_rows.data(),
                                               .weight = final_norm_.data(),
                                               .eps = config_.norm_eps,
                                               .act_type = options_.dtype,
                                               .y_act = logits_in_.data()},
                                              nullptr));
    BALLAST_RETURN_IF_ERROR(
        head_matmul_->Run(logits_in_.data(), wanted, head_.data(), logits_.as<float>(), nullptr));
  }
  return std::span<const float>(
      logits_.as<float>(), static_cast<size_t>(wanted) * static_cast<size_t>(config_.vocab_size));
}

absl::StatusOr<std::span<const float>> Decoder::Forward(
    const Batch& batch, KvCache* cache, DispatchTable* table,
    const std::function<absl::Status()>& between_layers, std::vector<LayerCounts>* counts) {
  counts->resize(static_cast<size_t>(config_.num_moe_layers()));
  Reserve(batch.num_tokens(), static_cast<int32_t>(batch.logit_rows.size()));
  BALLAST_RETURN_IF_ERROR(Embed(batch));
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[i];
    const bool dense = i < config_.num_dense_layers;
    if (batch.num_tokens() > 0) {
      BALLAST_RETURN_IF_ERROR(Attend(layer, batch, cache->layer(i)));
      BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = batch.num_tokens(),
                                                 .width = config_.hidden,
                                                 .x = residual_.as<float>(),
                                                 .weight = layer.mlp_norm.data(),
                                                 .eps = config_.norm_eps,
                                                 .y_f32 = normed_.as<float>(),
                                                 .act_type = options_.dtype,
                                                 .y_act = normed_act_.data()},
                                                nullptr));
      if (dense) BALLAST_RETURN_IF_ERROR(RunDense(layer, batch));
    }
    if (dense) continue;
    const int32_t moe_layer = i - config_.num_dense_layers;
    BALLAST_RETURN_IF_ERROR(RunMoe(layer, moe_layer, batch, table, &(*counts)[moe_layer]));
    BALLAST_RETURN_IF_ERROR(between_layers());
  }
  return Logits(batch);
}

}  // namespace ballast
