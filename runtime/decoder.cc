#include "runtime/decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {

// Parameters of one decoder layer that every rank holds.
struct Decoder::Layer {
  explicit Layer(Memory* m)
      : attention_norm(m),
        mlp_norm(m),
        qkv_bias(m),
        q_norm(m),
        k_norm(m),
        qkv(m),
        out(m),
        mlp(m),
        shared(m),
        router(m),
        router_bias(m) {}
  std::array<const Buffer*, 11> all() const {
    return {&attention_norm, &mlp_norm, &qkv_bias,   &q_norm, &k_norm, &qkv, &out, &mlp,
            &shared,         &router,   &router_bias};
  }

  Buffer attention_norm, mlp_norm;  // fp32
  Buffer qkv_bias, q_norm, k_norm;  // fp32; empty where the model has none
  Buffer qkv, out;                  // packed
  Buffer mlp;                       // of a dense layer
  Buffer shared;                    // shared experts of an MoE layer
  Buffer router, router_bias;
};

// The batch's indices, one after the other in one block.
struct Decoder::Inputs {
  const int32_t* token = nullptr;
  KvIndex index;
  const int32_t* wanted_rows = nullptr;  // those of the logits, then the greedy ones
};

void Batch::Clear() {
  token.clear();
  position.clear();
  table_offset.clear();
  block_table.clear();
  logit_rows.clear();
  greedy_rows.clear();
  num_prefill = 0;
}

Decoder::Decoder(const ModelConfig& config, const Options& options, Backend* backend)
    : config_(config),
      options_(options),
      backend_(backend),
      kernels_(backend->kernels()),
      stream_(backend->stream()),
      embedding_(kernels_.memory),
      final_norm_(kernels_.memory),
      rotary_cos_(kernels_.memory),
      rotary_sin_(kernels_.memory),
      head_(kernels_.memory),
      inputs_(kernels_.memory),
      residual_(kernels_.memory),
      normed_(kernels_.memory),
      normed_act_(kernels_.memory),
      qkv_out_(kernels_.memory),
      attended_(kernels_.memory),
      branch_(kernels_.memory),
      logits_in_(kernels_.memory),
      logits_(kernels_.memory),
      greedy_(kernels_.memory),
      host_logits_(kernels_.host_memory),
      host_greedy_(kernels_.host_memory) {}

Decoder::~Decoder() = default;

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const Checkpoint& checkpoint,
                                                         const Options& options, Backend* backend) {
  const ModelConfig& config = checkpoint.config();
  std::unique_ptr<Decoder> decoder(new Decoder(config, options, backend));
  BALLAST_RETURN_IF_ERROR(decoder->MakeProducts());
  BALLAST_ASSIGN_OR_RETURN(
      decoder->expert_form_,
      backend->MakeExpertForm(config.hidden, config.expert_inter, options.moe.dtype));
  BALLAST_ASSIGN_OR_RETURN(decoder->moe_, backend->MakeMoeLayers(options.moe));
  BALLAST_RETURN_IF_ERROR(decoder->MakeRotary());
  BALLAST_RETURN_IF_ERROR(
      decoder->LoadFloats(checkpoint, {"model.embed_tokens.weight"}, &decoder->embedding_));
  BALLAST_RETURN_IF_ERROR(
      decoder->LoadFloats(checkpoint, {"model.norm.weight"}, &decoder->final_norm_));
  BALLAST_RETURN_IF_ERROR(decoder->LoadMatrix(
      checkpoint, {config.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"},
      *decoder->head_matmul_, &decoder->head_));
  for (int32_t i = 0; i < config.num_layers; ++i) {
    decoder->layers_.emplace_back(decoder->kernels_.memory);
    BALLAST_RETURN_IF_ERROR(decoder->LoadLayer(checkpoint, i, &decoder->layers_.back()));
  }
  // A device takes its memory before it serves: to take more would hold everything up.
  if (decoder->kernels_.memory != &HostMemory()) {
    BALLAST_RETURN_IF_ERROR(decoder->Reserve(options.moe.max_tokens, options.max_logits));
    const std::array<size_t, 5> room = decoder->InputRoom();
    const size_t words = std::accumulate(room.begin(), room.end(), 5 * kCacheLineBytes);
    BALLAST_RETURN_IF_ERROR(decoder->inputs_.EnsureSize(words * sizeof(int32_t)));
  }
  return decoder;
}

size_t Decoder::parameter_bytes() const {
  size_t bytes = 0;
  for (const Buffer* b : {&embedding_, &final_norm_, &rotary_cos_, &rotary_sin_, &head_}) {
    bytes += b->size();
  }
  for (const Layer& layer : layers_) {
    for (const Buffer* b : layer.all()) bytes += b->size();
  }
  return bytes;
}

absl::Status Decoder::MakeRotary() {
  std::vector<float> cos, sin;
  const int half = config_.rotary_dim / 2;
  for (int position = 0; position < config_.context_tokens; ++position) {
    for (int i = 0; i < half; ++i) {
      const double angle = position / std::pow(config_.rope_theta, 2.0 * i / config_.rotary_dim);
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  BALLAST_RETURN_IF_ERROR(rotary_cos_.Assign(std::as_bytes(std::span(cos)), stream_));
  return rotary_sin_.Assign(std::as_bytes(std::span(sin)), stream_);
}

absl::Status Decoder::MakeProducts() {
  const ModelConfig& c = config_;
  const DType dtype = options_.moe.dtype;
  const int q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  BALLAST_ASSIGN_OR_RETURN(qkv_, kernels_.make_matmul(q + 2 * kv, c.hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(out_, kernels_.make_matmul(c.hidden, q, dtype));
  BALLAST_ASSIGN_OR_RETURN(head_matmul_, kernels_.make_matmul(c.vocab_size, c.hidden, dtype));
  if (c.num_dense_layers > 0) {
    BALLAST_ASSIGN_OR_RETURN(dense_mlp_,
                             GatedMlp::Create(kernels_, c.hidden, c.dense_inter, dtype));
  }
  if (c.shared_inter > 0) {
    BALLAST_ASSIGN_OR_RETURN(shared_mlp_,
                             GatedMlp::Create(kernels_, c.hidden, c.shared_inter, dtype));
  }
  return absl::OkStatus();
}

// The vectors one after the other.
absl::Status Decoder::LoadFloats(const Checkpoint& checkpoint,
                                 const std::vector<std::string>& names, Buffer* to) {
  std::vector<float> all;
  for (const std::string& name : names) {
    BALLAST_ASSIGN_OR_RETURN(const std::vector<float> part, checkpoint.LoadFloats(name));
    all.insert(all.end(), part.begin(), part.end());
  }
  return to->Assign(std::as_bytes(std::span(all)), stream_);
}

absl::Status Decoder::LoadMatrix(const Checkpoint& checkpoint,
                                 const std::vector<std::string>& names, const Matmul& matmul,
                                 Buffer* to) {
  AlignedBuffer packed;
  BALLAST_RETURN_IF_ERROR(checkpoint.LoadMatrix(names, matmul, &packed));
  return to->Assign(packed.bytes(), stream_);
}

absl::Status Decoder::LoadMlp(const Checkpoint& checkpoint, const std::string& prefix,
                              GatedMlp* mlp, Buffer* to) {
  AlignedBuffer packed(mlp->packed_bytes());
  BALLAST_RETURN_IF_ERROR(checkpoint.LoadMlp(
      prefix,
      [mlp](const void* gate, const void* up, const void* down, DType type, std::byte* block) {
        return mlp->Pack(gate, up, down, type, block);
      },
      packed.data()));
  return to->Assign(packed.bytes(), stream_);
}

absl::Status Decoder::LoadLayer(const Checkpoint& checkpoint, int32_t index, Layer* layer) {
  const std::string p = absl::StrCat("model.layers.", index, ".");
  const std::string a = p + "self_attn.";
  BALLAST_RETURN_IF_ERROR(
      LoadFloats(checkpoint, {p + "input_layernorm.weight"}, &layer->attention_norm));
  BALLAST_RETURN_IF_ERROR(
      LoadFloats(checkpoint, {p + "post_attention_layernorm.weight"}, &layer->mlp_norm));
  BALLAST_RETURN_IF_ERROR(
      LoadMatrix(checkpoint, {a + "q_proj.weight", a + "k_proj.weight", a + "v_proj.weight"}, *qkv_,
                 &layer->qkv));
  BALLAST_RETURN_IF_ERROR(LoadMatrix(checkpoint, {a + "o_proj.weight"}, *out_, &layer->out));
  if (config_.attention_bias) {
    BALLAST_RETURN_IF_ERROR(LoadFloats(
        checkpoint, {a + "q_proj.bias", a + "k_proj.bias", a + "v_proj.bias"}, &layer->qkv_bias));
  }
  if (config_.qk_norm) {
    BALLAST_RETURN_IF_ERROR(LoadFloats(checkpoint, {a + "q_norm.weight"}, &layer->q_norm));
    BALLAST_RETURN_IF_ERROR(LoadFloats(checkpoint, {a + "k_norm.weight"}, &layer->k_norm));
  }
  if (index < config_.num_dense_layers) {
    return LoadMlp(checkpoint, p + "mlp.", dense_mlp_.get(), &layer->mlp);
  }
  if (shared_mlp_ != nullptr) {
    BALLAST_RETURN_IF_ERROR(
        LoadMlp(checkpoint, p + "mlp.shared_experts.", shared_mlp_.get(), &layer->shared));
  }
  BALLAST_RETURN_IF_ERROR(
      LoadFloats(checkpoint, {p + "mlp.gate.e_score_correction_bias"}, &layer->router_bias));
  return LoadMatrix(checkpoint, {p + "mlp.gate.weight"}, moe_->gate_matmul(), &layer->router);
}

absl::Status Decoder::LoadExpert(const Checkpoint& checkpoint, int32_t moe_layer, int32_t expert,
                                 std::byte* packed) {
  return checkpoint.LoadMlp(ExpertPrefix(config_.num_dense_layers + moe_layer, expert),
                            expert_form_.pack, packed);
}

absl::Status Decoder::Reserve(int32_t num_tokens, int32_t num_logits) {
  const ModelConfig& c = config_;
  const size_t rows = RoundUp(static_cast<size_t>(num_tokens), kRowBlock);
  const size_t wanted = RoundUp(static_cast<size_t>(num_logits), kRowBlock);
  const size_t hidden = static_cast<size_t>(c.hidden), act = SizeOf(options_.moe.dtype);
  const std::pair<Buffer*, size_t> sizes[] = {
      {&residual_, rows * hidden * sizeof(float)},
      {&normed_, rows * hidden * sizeof(float)},
      {&normed_act_, rows * hidden * act},
      {&branch_, rows * hidden * sizeof(float)},
      {&qkv_out_, rows * static_cast<size_t>(qkv_->n()) * sizeof(float)},
      {&attended_, rows * static_cast<size_t>(out_->k()) * act},
      {&logits_in_, wanted * hidden * act},
      {&logits_, wanted * static_cast<size_t>(c.vocab_size) * sizeof(float)},
      {&greedy_, wanted * sizeof(int32_t)}};
  for (const auto& [buffer, bytes] : sizes) BALLAST_RETURN_IF_ERROR(buffer->EnsureSize(bytes));
  if (kernels_.memory != &HostMemory()) {
    BALLAST_RETURN_IF_ERROR(host_logits_.EnsureSize(logits_.size()));
    BALLAST_RETURN_IF_ERROR(host_greedy_.EnsureSize(greedy_.size()));
  }
  for (GatedMlp* mlp : {dense_mlp_.get(), shared_mlp_.get()}) {
    if (mlp != nullptr) BALLAST_RETURN_IF_ERROR(mlp->Reserve(num_tokens));
  }
  return absl::OkStatus();
}

// How many numbers each part of the inputs may have, as far as that was announced.
std::array<size_t, 5> Decoder::InputRoom() const {
  const size_t tokens = static_cast<size_t>(options_.moe.max_tokens);
  const size_t sequences = static_cast<size_t>(options_.max_logits);
  const size_t blocks =
      static_cast<size_t>((config_.context_tokens + kKvBlockTokens - 1) / kKvBlockTokens);
  return {tokens, tokens, tokens, sequences * blocks, sequences};
}

// Puts the batch where the kernels read it.
absl::StatusOr<Decoder::Inputs> Decoder::TakeIn(const Batch& batch) {
  wanted_rows_ = batch.logit_rows;
  wanted_rows_.insert(wanted_rows_.end(), batch.greedy_rows.begin(), batch.greedy_rows.end());
  const std::vector<int32_t>* const parts[] = {&batch.token, &batch.position, &batch.table_offset,
                                               &batch.block_table, &wanted_rows_};
  // At the same places in every batch of up to the announced size.
  const std::array<size_t, 5> room = InputRoom();
  constexpr size_t kLine = kCacheLineBytes / sizeof(int32_t);
  size_t begin[5], end = 0;
  for (size_t i = 0; i < 5; ++i) {
    begin[i] = end;
    end = RoundUp(end + std::max(room[i], parts[i]->size()), kLine);
  }
  input_words_.resize(end);
  for (size_t i = 0; i < 5; ++i) {
    std::ranges::copy(*parts[i], input_words_.begin() + static_cast<std::ptrdiff_t>(begin[i]));
  }
  BALLAST_RETURN_IF_ERROR(inputs_.Assign(std::as_bytes(std::span(input_words_)), stream_));
  const auto part = [&](size_t i) {
    return std::span<const int32_t>(inputs_.as<int32_t>() + begin[i], parts[i]->size());
  };
  return Inputs{part(0).data(), {part(1), part(2), part(3)}, part(4).data()};
}

absl::Status Decoder::Embed(const Batch& batch, const Inputs& inputs) {
  return kernels_.embed({.num_rows = batch.num_tokens(),
                         .width = config_.hidden,
                         .token = inputs.token,
                         .table = embedding_.as<float>(),
                         .y = residual_.as<float>()},
                        stream_);
}

absl::Status Decoder::AddBranch(int rows) {
  return kernels_.add({.num_rows = rows,
                       .width = config_.hidden,
                       .x = branch_.as<float>(),
                       .y = residual_.as<float>()},
                      stream_);
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
                                             .weight = layer.q_norm.as<float>(),
                                             .eps = c.norm_eps,
                                             .y_f32 = q},
                                            stream_));
  return kernels_.rms_norm({.num_rows = rows,
                            .num_heads = c.num_kv_heads,
                            .width = c.head_dim,
                            .stride = qkv_->n(),
                            .x = k,
                            .weight = layer.k_norm.as<float>(),
                            .eps = c.norm_eps,
                            .y_f32 = k},
                           stream_);
}

absl::Status Decoder::Attend(const Layer& layer, const Inputs& inputs, KvLayerView cache) {
  const ModelConfig& c = config_;
  const int rows = static_cast<int>(inputs.index.position.size()), width = qkv_->n();
  const int q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = rows,
                                             .width = c.hidden,
                                             .x = residual_.as<float>(),
                                             .weight = layer.attention_norm.as<float>(),
                                             .eps = c.norm_eps,
                                             .act_type = options_.moe.dtype,
                                             .y_act = normed_act_.data()},
                                            stream_));
  BALLAST_RETURN_IF_ERROR(
      qkv_->Run(normed_act_.data(), rows, layer.qkv.data(), qkv_out_.as<float>(), stream_));
  float* q = qkv_out_.as<float>();
  if (config_.attention_bias) {
    BALLAST_RETURN_IF_ERROR(kernels_.add_bias(
        {.num_rows = rows, .width = width, .bias = layer.qkv_bias.as<float>(), .y = q}, stream_));
  }
  if (c.qk_norm) BALLAST_RETURN_IF_ERROR(NormHeads(layer, rows));
  // Queries and keys stand side by side in a row and turn by the same angles.
  BALLAST_RETURN_IF_ERROR(kernels_.rotary({.num_rows = rows,
                                           .num_heads = c.num_heads + c.num_kv_heads,
                                           .head_dim = c.head_dim,
                                           .rotary_dim = c.rotary_dim,
                                           .stride = width,
                                           .x = q,
                                           .position = inputs.index.position.data(),
                                           .cos = rotary_cos_.as<float>(),
                                           .sin = rotary_sin_.as<float>()},
                                          stream_));
  BALLAST_RETURN_IF_ERROR(kernels_.kv_write({.num_rows = rows,
                                             .kv_heads = c.num_kv_heads,
                                             .head_dim = c.head_dim,
                                             .stride = width,
                                             .k = q + q_width,
                                             .v = q + q_width + kv_width,
                                             .index = inputs.index,
                                             .cache = cache},
                                            stream_));
  BALLAST_RETURN_IF_ERROR(kernels_.attention({.num_rows = rows,
                                              .num_heads = c.num_heads,
                                              .kv_heads = c.num_kv_heads,
                                              .head_dim = c.head_dim,
                                              .stride = width,
                                              .q = q,
                                              .index = inputs.index,
                                              .cache = cache,
                                              .act_type = options_.moe.dtype,
                                              .y = attended_.data()},
                                             stream_));
  BALLAST_RETURN_IF_ERROR(
      out_->Run(attended_.data(), rows, layer.out.data(), branch_.as<float>(), stream_));
  return AddBranch(rows);
}

absl::Status Decoder::RunDense(const Layer& layer, const Batch& batch) {
  BALLAST_RETURN_IF_ERROR(dense_mlp_->Run(normed_act_.data(), batch.num_tokens(), layer.mlp.data(),
                                          branch_.as<float>(), stream_));
  return AddBranch(batch.num_tokens());
}

absl::Status Decoder::RunMoe(const Layer& layer, int32_t moe_layer, const Batch& batch) {
  const auto add_shared = [&]() -> absl::Status {
    if (shared_mlp_ == nullptr || batch.num_tokens() == 0) return absl::OkStatus();
    BALLAST_RETURN_IF_ERROR(shared_mlp_->Run(normed_act_.data(), batch.num_tokens(),
                                             layer.shared.data(), branch_.as<float>(), stream_));
    return AddBranch(batch.num_tokens());
  };
  return moe_->Run(
      {.layer = moe_layer,
       .num_tokens = batch.num_tokens(),
       .num_prefill = batch.num_prefill,
       .x_f32 = normed_.as<float>(),
       .x_act = normed_act_.data(),
       .router = {layer.router.data(),
                  {layer.router_bias.as<float>(), layer.router_bias.size() / sizeof(float)}},
       .while_waiting = add_shared,
       .base = residual_.as<float>(),
       .y = residual_.as<float>()});
}

absl::Status Decoder::MakeLogits(const Inputs& inputs) {
  const int rows = static_cast<int>(num_logits_ + num_greedy_);
  if (rows == 0) return absl::OkStatus();
  BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = rows,
                                             .width = config_.hidden,
                                             .x = residual_.as<float>(),
                                             .row = inputs.wanted_rows,
                                             .weight = final_norm_.as<float>(),
                                             .eps = config_.norm_eps,
                                             .act_type = options_.moe.dtype,
                                             .y_act = logits_in_.data()},
                                            stream_));
  BALLAST_RETURN_IF_ERROR(
      head_matmul_->Run(logits_in_.data(), rows, head_.data(), logits_.as<float>(), stream_));
  if (num_greedy_ == 0) return absl::OkStatus();
  const size_t vocab = static_cast<size_t>(config_.vocab_size);
  return kernels_.argmax({.num_rows = static_cast<int32_t>(num_greedy_),
                          .width = config_.vocab_size,
                          .x = logits_.as<float>() + num_logits_ * vocab,
                          .id = greedy_.as<int32_t>()},
                         stream_);
}

absl::Status Decoder::Begin(const Batch& batch, const KvCache& cache,
                            const std::function<absl::Status()>& between_layers) {
  const int32_t wanted = static_cast<int32_t>(batch.logit_rows.size() + batch.greedy_rows.size());
  BALLAST_RETURN_IF_ERROR(Reserve(batch.num_tokens(), wanted));
  BALLAST_ASSIGN_OR_RETURN(const Inputs inputs, TakeIn(batch));
  num_logits_ = batch.logit_rows.size();
  num_greedy_ = batch.greedy_rows.size();
  const std::optional<int64_t> version = moe_->launch_version();
  // Batches that decode come again and again; prompts hardly ever have the same length.
  if (!version.has_value() || batch.num_prefill > 0) {
    return RunLayers(batch, inputs, cache, [&]() -> absl::Status {
      BALLAST_RETURN_IF_ERROR(moe_->Pace());
      return between_layers();
    });
  }
  const StepShape shape{batch.num_tokens(), static_cast<int32_t>(num_logits_),
                        static_cast<int32_t>(num_greedy_)};
  BALLAST_RETURN_IF_ERROR(backend_->RunStep(shape, *version, [&] {
    return RunLayers(batch, inputs, cache, [] { return absl::OkStatus(); });
  }));
  for (int32_t i = 0; i < config_.num_moe_layers(); ++i) {
    BALLAST_RETURN_IF_ERROR(between_layers());
  }
  return absl::OkStatus();
}

absl::Status Decoder::RunLayers(const Batch& batch, const Inputs& inputs, const KvCache& cache,
                                const std::function<absl::Status()>& between_layers) {
  if (batch.num_tokens() > 0) BALLAST_RETURN_IF_ERROR(Embed(batch, inputs));
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[i];
    const bool dense = i < config_.num_dense_layers;
    if (batch.num_tokens() > 0) {
      BALLAST_RETURN_IF_ERROR(Attend(layer, inputs, cache.layer(i)));
      BALLAST_RETURN_IF_ERROR(kernels_.rms_norm({.num_rows = batch.num_tokens(),
                                                 .width = config_.hidden,
                                                 .x = residual_.as<float>(),
                                                 .weight = layer.mlp_norm.as<float>(),
                                                 .eps = config_.norm_eps,
                                                 .y_f32 = normed_.as<float>(),
                                                 .act_type = options_.moe.dtype,
                                                 .y_act = normed_act_.data()},
                                                stream_));
      if (dense) BALLAST_RETURN_IF_ERROR(RunDense(layer, batch));
    }
    if (dense) continue;
    BALLAST_RETURN_IF_ERROR(RunMoe(layer, i - config_.num_dense_layers, batch));
    BALLAST_RETURN_IF_ERROR(between_layers());
  }
  return MakeLogits(inputs);
}

absl::StatusOr<BatchOutput> Decoder::Finish(std::vector<LayerCounts>* counts) {
  BALLAST_RETURN_IF_ERROR(moe_->Finish(counts));
  const size_t size = num_logits_ * static_cast<size_t>(config_.vocab_size);
  if (kernels_.memory == &HostMemory()) {
    return BatchOutput{{logits_.as<float>(), size}, {greedy_.as<int32_t>(), num_greedy_}};
  }
  Memory& memory = *kernels_.memory;
  if (num_greedy_ > 0) {
    BALLAST_RETURN_IF_ERROR(
        memory.Read({host_greedy_.data(), num_greedy_ * sizeof(int32_t)}, greedy_.data(), stream_));
  }
  if (size > 0) {
    BALLAST_RETURN_IF_ERROR(
        memory.Read({host_logits_.data(), size * sizeof(float)}, logits_.data(), stream_));
  }
  return BatchOutput{{host_logits_.as<float>(), size}, {host_greedy_.as<int32_t>(), num_greedy_}};
}

}  // namespace ballast
