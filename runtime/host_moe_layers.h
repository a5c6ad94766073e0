#ifndef BALLAST_RUNTIME_HOST_MOE_LAYERS_H_
#define BALLAST_RUNTIME_HOST_MOE_LAYERS_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/moe_layers.h"

namespace ballast {

// MoE layers on the processor: a MoeExecutor, and the table of the placement in force.
class HostMoeLayers : public MoeLayers {
 public:
  static absl::StatusOr<std::unique_ptr<MoeLayers>> Create(const Options& options,
                                                           const KernelSet& kernels);

  absl::Status Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                       const Topology& topology) override;
  absl::Status Use(const Placement& placement, const ExpertStore& store) override;
  absl::Status Check(const Placement& placement, const ExpertStore& store) override;
  absl::Status Run(const Args& args) override;
  absl::Status Finish(std::vector<LayerCounts>* counts) override;
  absl::StatusOr<std::span<const int32_t>> Ids(int32_t layer, int32_t) override {
    return ids_[layer];
  }
  uint64_t TakeChoiceHash() override { return executor_->TakeChoiceHash(); }
  const Matmul& gate_matmul() const override { return executor_->gate_matmul(); }

 private:
  HostMoeLayers(const Options& options, std::unique_ptr<MoeExecutor> executor);

  std::unique_ptr<MoeExecutor> executor_;
  std::unique_ptr<DispatchTable> table_;
  int32_t rank_ = 0;
  std::vector<LayerCounts> counts_;        // [layers]
  std::vector<std::vector<int32_t>> ids_;  // [layers]
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_HOST_MOE_LAYERS_H_
