#include "runtime/backend.h"

#include <optional>
#include <utility>

#include "base/status.h"
#include "kernels/gated_mlp.h"
#include "runtime/host_moe_layers.h"
#include "runtime/memory_plan.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<MoeLayers>> HostBackend::MakeMoeLayers(
    const MoeLayers::Options& options) {
  return HostMoeLayers::Create(options, kernels_);
}

absl::StatusOr<std::unique_ptr<BlockMemory>> HostBackend::MakeBlocks(size_t block_bytes, int32_t) {
  return std::make_unique<HostBlocks>(block_bytes);
}

int64_t HostBackend::all_memory() const {
  return MachineMemory();
}

absl::StatusOr<ExpertForm> HostBackend::MakeExpertForm(int hidden, int inter, DType dtype) const {
  BALLAST_ASSIGN_OR_RETURN(std::shared_ptr<GatedMlp> mlp,
                           GatedMlp::Create(kernels_, hidden, inter, dtype));
  return ExpertForm{
      .packed_bytes = mlp->packed_bytes(),
      .pack = [mlp](const void* gate, const void* up, const void* down, DType type,
                    std::byte* packed) { return mlp->Pack(gate, up, down, type, packed); }};
}

ReadExpert ReaderOf(const Checkpoint& checkpoint, const Backend& backend, DType dtype) {
  // Made on the thread that reads, on which it also says that products use one thread.
  auto form = std::make_shared<std::optional<ExpertForm>>();
  return [&checkpoint, &backend, dtype, form](int32_t layer, int32_t expert,
                                              std::span<std::byte> block) -> absl::Status {
    const ModelConfig& config = checkpoint.config();
    if (!form->has_value()) {
      BALLAST_ASSIGN_OR_RETURN(*form,
                               backend.MakeExpertForm(config.hidden, config.expert_inter, dtype));
    }
    return checkpoint.LoadMlp(ExpertPrefix(config.num_dense_layers + layer, expert), (*form)->pack,
                              block.data());
  };
}

}  // namespace ballast
