#ifndef BALLAST_RUNTIME_MOE_LAYER_H_
#define BALLAST_RUNTIME_MOE_LAYER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "comm/communicator.h"
#include "kernels/dispatch.h"
#include "kernels/gated_mlp.h"
#include "kernels/kernel_set.h"
#include "placement/placement.h"
#include "placement/split.h"
#include "placement/step_counts.h"
#include "runtime/expert_store.h"

namespace ballast {

// What a step needs of the placement in force, on one rank: built once per epoch, read by one step
// from start to end.
class DispatchTable {
 public:
  // `previous` (may be null) lends its compiled splits for the layers that did not change. All
  // ranks change tables between the same two steps, so splits that remember stay alike on them.
  DispatchTable(const Placement& placement, int32_t rank, const ExpertStore& store,
                DispatchTable* previous);

  struct Layer {
    std::unique_ptr<Splitter> splitter;
    std::vector<int32_t> group_of_expert;      // [E] index among this rank's experts, or -1
    std::vector<const std::byte*> parameters;  // [G] of this rank's experts
    std::vector<int32_t> blocks;               // [G] of the store, that they lie in
  };
  const Placement& placement() const { return placement_; }
  int64_t epoch() const { return placement_.epoch(); }
  Layer& layer(int32_t i) { return layers_[i]; }

 private:
  Placement placement_;
  std::vector<Layer> layers_;
};

// What one MoE layer did in one step, as every rank knows it.
struct LayerCounts {
  // [E] each: copies per logical expert over all ranks
  PerKind<std::vector<int32_t>> counts;
  std::vector<int64_t> rank_load;  // [R] copies that each rank computed
};

// Adds gathered counts up: over the kinds for the split, over the ranks for the load statistics.
// SHAPES gathered [R, 2, E]; by_source [R, E]
void FoldCounts(std::span<const int32_t> gathered, size_t num_experts, std::span<int32_t> by_source,
                LayerCounts* out);
// What a rank knew and decided of the replicas in one layer, on top of the layers before: the
// counts of all ranks and the quotas of all hosts. Ranks that do not agree on it do not agree on
// where tokens go.
uint64_t ChoiceHash(std::span<const int32_t> by_source, std::span<const int32_t> quota,
                    uint64_t before);

// The parameters of an MoE layer that every rank holds, where the backend computes.
struct RouterView {
  const std::byte* packed = nullptr;  // of the gate's product
  std::span<const float> bias;        // [E] correction bias: selection only
};

// The same in the host's memory.
struct RouterParameters {
  AlignedBuffer packed;
  std::vector<float> bias;
  RouterView view() const { return {packed.data(), bias}; }
};

// Carries out MoE layers on one rank's processor: gate, count exchange, split, dispatch, experts,
// combine (design section 2). The order of every sum is fixed by the token alone, so the result
// does not depend on placement, split or number of ranks. COLLECTIVE every rank runs every layer,
// with zero tokens if it has none.
class MoeExecutor {
 public:
  struct Options {
    GateRule gate;
    int32_t hidden = 0;
    int32_t expert_inter = 0;
    DType dtype = DType::kF32;
    SplitMode split = SplitMode::kExact;
  };
  static absl::StatusOr<std::unique_ptr<MoeExecutor>> Create(const Options& options,
                                                             const KernelSet& kernels);
  // The ranks that it works with from now on. REQUIRES before the first Run
  void Connect(Communicator* communicator);

  // y = base + sum over k of weight[k] * expert(x). The last num_prefill rows are prefill, those
  // before them decode: they are counted apart and else treated alike.
  // SHAPES x_f32, x_act [T, H] (the same rows, fp32 and dtype); base, y [T, H] fp32
  struct Args {
    int32_t layer = 0;
    int32_t num_tokens = 0;
    int32_t num_prefill = 0;
    const float* x_f32 = nullptr;
    const void* x_act = nullptr;
    RouterView router;
    std::function<absl::Status()> while_waiting;  // runs while the rows travel; may write `base`
    const float* base = nullptr;
    float* y = nullptr;
    LayerCounts* counts = nullptr;
  };
  absl::Status Run(DispatchTable* table, const Args& args);

  // ChoiceHash of all layers since the last call.
  uint64_t TakeChoiceHash() { return std::exchange(choice_hash_, 0); }
  // What the gate chose in the last Run. SHAPES [T, top-k]
  std::span<const int32_t> ids() const { return ids_; }
  Matmul& gate_matmul() { return *gate_matmul_; }
  GatedMlp& expert_mlp() { return *expert_mlp_; }

 private:
  MoeExecutor(const Options& options, const KernelSet& kernels);
  absl::Status RunGate(const Args& args);
  absl::Status SplitBatch(DispatchTable* table, const Args& args);
  absl::Status Dispatch(const DispatchTable& table, const Args& args);
  absl::Status RunExperts(const DispatchTable::Layer& layer);
  absl::Status Return(int64_t epoch, const Args& args);

  Options options_;
  const KernelSet& kernels_;
  Communicator* comm_ = nullptr;
  std::unique_ptr<Matmul> gate_matmul_;
  std::unique_ptr<GatedMlp> expert_mlp_;
  size_t row_bytes_;
  uint64_t choice_hash_ = 0;
  Split split_;
  RankPart part_;
  Route route_;
  Grouped grouped_;
  std::vector<int32_t> ids_;
  std::vector<int32_t> histogram_;  // [2, E] of this rank's tokens by kind
  std::vector<int32_t> gathered_;   // [R, 2, E] of all ranks
  std::vector<int32_t> by_source_;  // [R, E] kinds added up: what is split
  std::vector<float> weights_;
  AlignedBuffer logits_, grouped_x_, grouped_y_;
  std::optional<Communicator::Exchange> dispatch_, return_;
  std::vector<size_t> send_bytes_, recv_bytes_;
  std::vector<std::span<std::byte>> out_;
  std::vector<std::span<const std::byte>> in_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_MOE_LAYER_H_
