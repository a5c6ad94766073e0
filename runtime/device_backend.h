#ifndef BALLAST_RUNTIME_DEVICE_BACKEND_H_
#define BALLAST_RUNTIME_DEVICE_BACKEND_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/nccl_api.h"
#include "kernels/device_memory.h"
#include "runtime/backend.h"
#include "runtime/device_moe_layers.h"

namespace ballast {

// The device that is current when it is made: one rank's.
class DeviceBackend : public Backend {
 public:
  struct Options {
    const KernelSet* kernels = nullptr;  // a device's
    MlpPath path = MlpPath::kBest;
    int32_t max_blocks = 1056;                  // of a kernel of the exchange (kernels/exchange.h)
    LendArenas lend = {};                       // where all ranks are on one node
    std::function<ExpertArena()> experts = {};  // asked once a layer and step
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
  int64_t MoeLayersBytes(const MoeLayers::Options& options,
                         const Topology& topology) const override;
  int64_t all_memory() const override { return cuda::AllMemory(); }
  bool has_own_memory() const override { return true; }
  absl::StatusOr<ExpertForm> MakeExpertForm(int hidden, int inter, DType dtype) const override;

 private:
  DeviceBackend(Options options, cuda::OwnedStream stream);

  const Options options_;
  const bool several_nodes_;
  const cuda::OwnedStream stream_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DEVICE_BACKEND_H_
