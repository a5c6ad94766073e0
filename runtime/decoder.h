#ifndef BALLAST_RUNTIME_DECODER_H_
#define BALLAST_RUNTIME_DECODER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/gated_mlp.h"
#include "kernels/kernel_set.h"
#include "kernels/memory.h"
#include "runtime/backend.h"
#include "runtime/checkpoint.h"
#include "runtime/kv_cache.h"
#include "runtime/moe_layers.h"

namespace ballast {

// The tokens that one rank runs through the model in one step: rows of several sequences, each
// sequence's rows in order of position. Sequences that decode come first.
struct Batch {
  std::vector<int32_t> token;         // [T]
  std::vector<int32_t> position;      // [T]
  std::vector<int32_t> table_offset;  // [T] where the token's sequence starts in block_table
  std::vector<int32_t> block_table;   // blocks of the sequences, one after the other
  std::vector<int32_t> logit_rows;    // [N] rows whose logits are wanted
  std::vector<int32_t> greedy_rows;   // [G] rows of which only the most probable token is
  int32_t num_prefill = 0;            // the last rows: of sequences that lack several tokens

  int32_t num_tokens() const { return static_cast<int32_t>(token.size()); }
  void Clear();
};

// What a batch comes to, until the next one begins.
// SHAPES logits [N, vocab]  greedy [G]: the first of the largest logits (ArgmaxArgs)
struct BatchOutput {
  std::span<const float> logits;
  std::span<const int32_t> greedy;
};

// The model on one rank: everything but the routed experts, which the expert store holds. It
// computes where its backend does.
// THREADS one (the step thread).
class Decoder {
 public:
  struct Options {
    MoeLayers::Options moe;  // its dtype is that of all
    int32_t max_logits = 0;  // of one batch; moe says how many tokens: a device takes the memory
  };
  // REQUIRES `backend` outlives it
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const Checkpoint& checkpoint,
                                                         const Options& options, Backend* backend);
  ~Decoder();

  // Of all that it holds between steps.
  size_t parameter_bytes() const;

  // Bytes of one packed expert, and the filling of one.
  size_t expert_bytes() const { return expert_form_.packed_bytes; }
  absl::Status LoadExpert(const Checkpoint& checkpoint, int32_t moe_layer, int32_t expert,
                          std::byte* packed);

  MoeLayers& moe() { return *moe_; }

  // Runs a batch: Begin, then Finish. On a device Begin puts the work on the backend's stream, and
  // Finish waits for it. `between_layers` is called once for every MoE layer, which has begun then.
  // SHAPES counts [num_moe_layers]
  // REQUIRES moe() is connected and knows the placement
  // COLLECTIVE also with an empty batch
  absl::Status Begin(const Batch& batch, const KvCache& cache,
                     const std::function<absl::Status()>& between_layers);
  absl::StatusOr<BatchOutput> Finish(std::vector<LayerCounts>* counts);

 private:
  // Parameters of one decoder layer that every rank holds.
  struct Layer {
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
  struct Inputs {
    const int32_t* token = nullptr;
    KvIndex index;
    const int32_t* wanted_rows = nullptr;  // those of the logits, then the greedy ones
  };

  Decoder(const ModelConfig& config, const Options& options, Backend* backend);
  absl::Status MakeProducts();
  absl::Status MakeRotary();
  absl::Status LoadFloats(const Checkpoint& checkpoint, const std::vector<std::string>& names,
                          Buffer* to);
  absl::Status LoadMatrix(const Checkpoint& checkpoint, const std::vector<std::string>& names,
                          const Matmul& matmul, Buffer* to);
  absl::Status LoadMlp(const Checkpoint& checkpoint, const std::string& prefix, GatedMlp* mlp,
                       Buffer* to);
  absl::Status LoadLayer(const Checkpoint& checkpoint, int32_t index, Layer* layer);
  absl::Status Reserve(int32_t num_tokens, int32_t num_logits);
  std::array<size_t, 5> InputRoom() const;
  absl::StatusOr<Inputs> TakeIn(const Batch& batch);
  absl::Status Embed(const Batch& batch, const Inputs& inputs);
  absl::Status AddBranch(int rows);  // to the residual
  absl::Status NormHeads(const Layer& layer, int rows);
  absl::Status Attend(const Layer& layer, const Inputs& inputs, KvLayerView cache);
  absl::Status RunDense(const Layer& layer, const Batch& batch);
  absl::Status RunMoe(const Layer& layer, int32_t moe_layer, const Batch& batch);
  absl::Status MakeLogits(const Inputs& inputs);
  absl::Status RunLayers(const Batch& batch, const Inputs& inputs, const KvCache& cache,
                         const std::function<absl::Status()>& between_layers);

  ModelConfig config_;
  Options options_;
  Backend* const backend_;
  const KernelSet& kernels_;
  const Stream stream_;
  ExpertForm expert_form_;
  std::vector<Layer> layers_;
  Buffer embedding_, final_norm_, rotary_cos_, rotary_sin_;  // fp32
  Buffer head_;
  std::unique_ptr<Matmul> qkv_, out_, head_matmul_;
  std::unique_ptr<GatedMlp> dense_mlp_, shared_mlp_;
  std::unique_ptr<MoeLayers> moe_;
  // Of a step.
  std::vector<int32_t> input_words_, wanted_rows_;
  Buffer inputs_, residual_, normed_, normed_act_, qkv_out_, attended_, branch_, logits_in_,
      logits_, greedy_;
  size_t num_logits_ = 0, num_greedy_ = 0;
  Buffer host_logits_, host_greedy_;  // of a device's
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DECODER_H_
