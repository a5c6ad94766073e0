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

void Batch::Clear() {
  token.clear();
  position.clear();
  table_offset.clear();
  block_table.clear();
  logit_rows.clear();
  greedy_rows.clear();
  num_prefill = 0;
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
