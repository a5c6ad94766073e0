#include "runtime/host_moe_layers.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {

HostMoeLayers::HostMoeLayers(const Options& options, std::unique_ptr<MoeExecutor> executor)
    : executor_(std::move(executor)),
      counts_(static_cast<size_t>(options.num_layers)),
      ids_(counts_.size()) {}

absl::StatusOr<std::unique_ptr<MoeLayers>> HostMoeLayers::Create(const Options& options,
                                                                 const KernelSet& kernels) {
  BALLAST_ASSIGN_OR_RETURN(auto executor, MoeExecutor::Create({.gate = options.gate,
                                                               .hidden = options.hidden,
                                                               .expert_inter = options.expert_inter,
                                                               .dtype = options.dtype,
                                                               .split = options.split},
                                                              kernels));
  return std::unique_ptr<MoeLayers>(new HostMoeLayers(options, std::move(executor)));
}

absl::Status HostMoeLayers::Connect(Communicator* communicator, std::span<const int32_t>,
                                    const Topology&) {
  executor_->Connect(communicator);
  rank_ = communicator->rank();
  table_ = nullptr;  // of other ranks
  return absl::OkStatus();
}

absl::Status HostMoeLayers::Use(const Placement& placement, const ExpertStore& store) {
  table_ = std::make_unique<DispatchTable>(placement, rank_, store, table_.get());
  return absl::OkStatus();
}

absl::Status HostMoeLayers::Check(const Placement& placement, const ExpertStore& store) {
  if (!(table_->placement() == placement)) {
    return absl::InternalError(absl::StrCat("steps run under epoch ", table_->epoch(),
                                            ", the placement in force is ", placement.epoch()));
  }
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      const std::byte* const parameters = store.Parameters(layer, e);
      const int32_t group = table_->layer(layer).group_of_expert[e];
      const std::byte* const used = group < 0 ? nullptr : table_->layer(layer).parameters[group];
      if (placement.Hosts(layer, e, rank_) != (parameters != nullptr) || used != parameters) {
        return absl::InternalError(absl::StrCat("layer ", layer, ", expert ", e,
                                                ": placement, memory and tables do not agree"));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status HostMoeLayers::Run(const Args& args) {
  BALLAST_RETURN_IF_ERROR(executor_->Run(table_.get(), {.layer = args.layer,
                                                        .num_tokens = args.num_tokens,
                                                        .num_prefill = args.num_prefill,
                                                        .x_f32 = args.x_f32,
                                                        .x_act = args.x_act,
                                                        .router = args.router,
                                                        .while_waiting = args.while_waiting,
                                                        .base = args.base,
                                                        .y = args.y,
                                                        .counts = &counts_[args.layer]}));
  ids_[args.layer].assign(executor_->ids().begin(), executor_->ids().end());
  return absl::OkStatus();
}

absl::Status HostMoeLayers::Finish(std::vector<LayerCounts>* counts) {
  std::swap(*counts, counts_);
  counts_.resize(counts->size());
  return absl::OkStatus();
}

}  // namespace ballast
