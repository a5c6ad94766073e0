#ifndef BALLAST_RUNTIME_DEVICE_BACKEND_H_
#define BALLAST_RUNTIME_DEVICE_BACKEND_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/nccl_api.h"
#include "comm/peer_memory.h"
#include "kernels/device_memory.h"
#include "runtime/backend.h"
#include "runtime/device_blocks.h"
#include "runtime/device_moe_layers.h"
#include "runtime/step_graphs.h"

namespace ballast {

// Memory that the ranks of `world`, processes of one machine, lend each other as CUDA's IPC does;
// one that is alone has its own. REQUIRES `world` outlives it and is used by nothing else then
LendMemory LendByIpc(Communicator* world);

// The device that is current when it is made: one rank's.
class DeviceBackend : public Backend {
 public:
  struct Options {
    const KernelSet* kernels = nullptr;  // a device's
    MlpPath path = MlpPath::kBest;
    int32_t max_blocks = 1056;  // of a kernel of the exchange (kernels/exchange.h)
    int32_t rank = 0;           // in the job
    LendMemory lend = {};       // for the arenas of the exchange, and for the experts; on one node
    // [R] of all ranks of the job; empty: all on one. Where there are several, NCCL carries the
    // rows.
    std::vector<int32_t> node_of_rank = {};
    NcclApi* nccl = NcclLibrary();
    int max_ctas = 0;  // NcclCommunicator::Options
  };
  // ERRORS kFailedPrecondition: several nodes, and no NCCL; kInternal: no stream
  static absl::StatusOr<std::unique_ptr<DeviceBackend>> Create(Options options);

  const KernelSet& kernels() const override { return *options_.kernels; }
  Stream stream() const override { return stream_.get(); }
  absl::StatusOr<std::unique_ptr<MoeLayers>> MakeMoeLayers(
      const MoeLayers::Options& options) override;
  absl::Status RunStep(const StepShape& shape, int64_t version,
                       const std::function<absl::Status()>& work) override {
    return graphs_.Run(shape, version, work);
  }
  const StepGraphs& graphs() const { return graphs_; }
  // REQUIRES they live as long as MoE layers run
  absl::StatusOr<std::unique_ptr<BlockMemory>> MakeBlocks(size_t block_bytes,
                                                          int32_t num_blocks) override;
  absl::Status ConnectBlocks(Communicator* communicator,
                             std::span<const int32_t> job_ranks) override;
  int64_t MoeLayersBytes(const MoeLayers::Options& options,
                         const Topology& topology) const override;
  int64_t all_memory() const override { return cuda::FreeMemory(); }
  bool has_own_memory() const override { return true; }
  absl::StatusOr<ExpertForm> MakeExpertForm(int hidden, int inter, DType dtype) const override;

 private:
  DeviceBackend(Options options, cuda::OwnedStream stream);

  const Options options_;
  const bool several_nodes_;
  const cuda::OwnedStream stream_;
  StepGraphs graphs_;
  DeviceBlocks* blocks_ = nullptr;           // made last
  std::vector<std::byte*> lent_for_blocks_;  // [ranks of the job]
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DEVICE_BACKEND_H_
