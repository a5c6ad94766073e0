#ifndef BALLAST_RUNTIME_MOE_LAYERS_H_
#define BALLAST_RUNTIME_MOE_LAYERS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "kernels/gate.h"
#include "placement/placement.h"
#include "placement/split.h"
#include "runtime/expert_store.h"
#include "runtime/moe_layer.h"

namespace ballast {

// All MoE layers of one rank, wherever they compute: what a decoder runs.
// THREADS one (the step thread). COLLECTIVE every rank runs every layer, with zero tokens if it has
// none.
class MoeLayers {
 public:
  struct Options {
    GateRule gate;
    int32_t num_layers = 0;
    int32_t hidden = 0;
    int32_t expert_inter = 0;
    int32_t max_tokens = 0;  // of this rank in one step
    DType dtype = DType::kF32;
    SplitMode split = SplitMode::kExact;
    int64_t timeout_ms = 60'000;  // of every wait for another rank
  };
  virtual ~MoeLayers() = default;

  // Other ranks are to come: what this one has under way comes to its end, or is given up.
  virtual absl::Status Halt() { return absl::OkStatus(); }
  // The ranks that it works with from now on. The first time these are all ranks of the job. To be
  // followed by Use. REQUIRES Halt, but for the first time
  // SHAPES job_ranks [communicator->size()]: their numbers in the job, ascending
  // REQUIRES never more slots than in the first topology, and one for each expert and rank
  // COLLECTIVE. ERRORS those of the means by which they exchange rows
  virtual absl::Status Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                               const Topology& topology) = 0;
  // From the next layer on, experts are where `placement` says; `store` has those that it gives to
  // this rank. What is under way goes on as it was.
  virtual absl::Status Use(const Placement& placement, const ExpertStore& store) = 0;
  // Whether what the layers run under is `placement` and what `store` holds.
  // ERRORS kInternal: with the first difference
  virtual absl::Status Check(const Placement& placement, const ExpertStore& store) = 0;

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
  };
  virtual absl::Status Run(const Args& args) = 0;

  // Between layers that are not captured: waits while too much is under way, so that a host never
  // stands in a launch where it hears nothing. ERRORS as Finish
  virtual absl::Status Pace() { return absl::OkStatus(); }
  // After all layers of a step: waits until they are done. SHAPES counts [num_layers]
  // ERRORS what has gone wrong in any of them: kDeadlineExceeded, kUnavailable for want of others
  virtual absl::Status Finish(std::vector<LayerCounts>* counts) = 0;
  // What the gate of a layer chose in the step that was finished last, which had so many tokens.
  // SHAPES [T, top-k]  ERRORS those of the copy from a device
  virtual absl::StatusOr<std::span<const int32_t>> Ids(int32_t layer, int32_t num_tokens) = 0;
  // Run puts the same on the stream for the same arguments as long as this number is the same: it
  // may be captured. None: it may not.
  virtual std::optional<int64_t> launch_version() { return std::nullopt; }
  // ChoiceHash of all layers since the last call.
  virtual uint64_t TakeChoiceHash() = 0;

  // The product that makes the gate's logits: RouterView::packed is in its form.
  virtual const Matmul& gate_matmul() const = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_MOE_LAYERS_H_
