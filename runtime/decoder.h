#ifndef BALLAST_RUNTIME_DECODER_H_
#define BALLAST_RUNTIME_DECODER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "kernels/gated_mlp.h"
#include "kernels/kernel_set.h"
#include "runtime/checkpoint.h"
#include "runtime/kv_cache.h"
#include "runtime/moe_layer.h"

namespace ballast {

// The tokens that one rank runs through the model in one step: rows of several sequences, each
// sequence's rows in order of position. Sequences that decode come first.
struct Batch {
  std::vector<int32_t> token;         // [T]
  std::vector<int32_t> position;      // [T]
  std::vector<int32_t> table_offset;  // [T] where the token's sequence starts in block_table
  std::vector<int32_t> block_table;   // blocks of the sequences, one after the other
  std::vector<int32_t> logit_rows;    // [N] rows whose logits are wanted
  int32_t num_prefill = 0;            // the last rows: of sequences that lack several tokens

  int32_t num_tokens() const { return static_cast<int32_t>(token.size()); }
  void Clear();
};

// The model on one rank: everything but the routed experts, which the expert store holds.
// THREADS one (the step thread).
class Decoder {
 public:
  struct Options {
    DType dtype = DType::kF32;
    SplitMode split = SplitMode::kExact;
  };
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const Checkpoint& checkpoint,
                                                         const Options& options,
                                                         const KernelSet& kernels);
  ~Decoder();

  // The ranks that it works with from now on. REQUIRES before the first Forward
  void Connect(Communicator* communicator) { moe_->Connect(communicator); }

  // Of all that it holds between steps.
  size_t parameter_bytes() const;

  // Bytes of one packed expert, and the filling of one.
  size_t expert_bytes() const { return moe_->expert_mlp().packed_bytes(); }
  absl::Status LoadExpert(const Checkpoint& checkpoint, int32_t moe_layer, int32_t expert,
                          std::byte* packed);

  // What the gate of the MoE layer that ran last chose. SHAPES [T, top-k]
  std::span<const int32_t> last_ids() const { return moe_->ids(); }

  // Of all MoE layers since the last call (moe_layer.h).
  uint64_t TakeChoiceHash() { return moe_->TakeChoiceHash(); }

  // Runs the batch. `between_layers` is called after every MoE layer.
  // SHAPES logits, valid until the next call: [N, vocab]; counts [num_moe_layers]
  // COLLECTIVE also with an empty batch
  absl::StatusOr<std::span<const float>> Forward(
      const Batch& batch, KvCache* cache, DispatchTable* table,
      const std::function<absl::Status()>& between_layers, std::vector<LayerCounts>* counts);

 private:
  struct Layer;
  Decoder(const ModelConfig& config, const Options& options, const KernelSet& kernels);
  absl::Status MakeProducts();
  absl::Status LoadLayer(const Checkpoint& checkpoint, int32_t index, Layer* layer);
  void Reserve(int32_t num_tokens, int32_t num_logits);
  absl::Status Embed(const Batch& batch);
  absl::Status AddBranch(int rows);  // to the residual
  absl::Status NormHeads(const Layer& layer, int rows);
  absl::Status Attend(const Layer& layer, const Batch& batch, KvLayerView cache);
  absl::Status RunDense(const Layer& layer, const Batch& batch);
  absl::Status RunMoe(const Layer& layer, int32_t moe_layer, const Batch& batch,
                      DispatchTable* table, LayerCounts* counts);
  absl::StatusOr<std::span<const float>> Logits(const Batch& batch);

  ModelConfig config_;
  Options options_;
  const KernelSet& kernels_;
  std::vector<Layer> layers_;
  std::vector<float> embedding_, final_norm_;
  std::vector<float> rotary_cos_, rotary_sin_;
  AlignedBuffer head_;
  std::unique_ptr<Matmul> qkv_, out_, head_matmul_;
  std::unique_ptr<GatedMlp> dense_mlp_, shared_mlp_;
  std::unique_ptr<MoeExecutor> moe_;
  AlignedBuffer residual_, normed_, normed_act_, qkv_out_, attended_, branch_, logits_in_, logits_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DECODER_H_
