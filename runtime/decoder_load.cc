// How a decoder comes by its parameters and its memory.
#include <cmath>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "runtime/decoder.h"

namespace ballast {

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

}  // namespace ballast
