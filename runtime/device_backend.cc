#include "runtime/device_backend.h"

#include <algorithm>
#include <utility>

#include "base/status.h"
#include "kernels/grouped_mlp.h"
#include "runtime/carried_moe_layers.h"

namespace ballast {
namespace {

bool SeveralNodes(const std::vector<int32_t>& node_of_rank) {
  return std::ranges::adjacent_find(node_of_rank, std::not_equal_to()) != node_of_rank.end();
}

}  // namespace

DeviceBackend::DeviceBackend(Options options, cuda::OwnedStream stream)
    : options_(std::move(options)),
      several_nodes_(SeveralNodes(options_.node_of_rank)),
      stream_(std::move(stream)) {}

absl::StatusOr<std::unique_ptr<DeviceBackend>> DeviceBackend::Create(Options options) {
  if (options.nccl == nullptr && SeveralNodes(options.node_of_rank)) {
    return absl::FailedPreconditionError(
        "the ranks are on several nodes, where devices cannot address each other, and this build "
        "has no NCCL to carry rows between them: start all ranks on one node, or build with "
        "BALLAST_WITH_NCCL=ON");
  }
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream stream,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kNormal));
  return std::unique_ptr<DeviceBackend>(new DeviceBackend(std::move(options), std::move(stream)));
}

absl::StatusOr<std::unique_ptr<MoeLayers>> DeviceBackend::MakeMoeLayers(
    const MoeLayers::Options& options) {
  if (several_nodes_) {
    return CarriedMoeLayers::Create(options, {.nccl = options_.nccl,
                                              .max_ctas = options_.max_ctas,
                                              .stream = stream_.get(),
                                              .path = options_.path,
                                              .experts = options_.experts});
  }
  return DeviceMoeLayers::Create(options, {.kernels = options_.kernels,
                                           .stream = stream_.get(),
                                           .path = options_.path,
                                           .max_blocks = options_.max_blocks,
                                           .lend = options_.lend,
                                           .experts = options_.experts});
}

int64_t DeviceBackend::MoeLayersBytes(const MoeLayers::Options& options,
                                      const Topology& topology) const {
  const size_t bytes = several_nodes_ ? CarriedMoeLayers::MemoryBytes(options, topology)
                                      : DeviceMoeLayers::MemoryBytes(options, topology);
  return static_cast<int64_t>(bytes);
}

absl::StatusOr<ExpertForm> DeviceBackend::MakeExpertForm(int hidden, int inter, DType dtype) const {
  const ExpertShape shape{.hidden = hidden, .inter = inter, .dtype = dtype};
  return ExpertForm{.packed_bytes = shape.packed_bytes(),
                    .pack = [shape](const void* gate, const void* up, const void* down, DType type,
                                    std::byte* packed) {
                      return PackExpert(shape, gate, up, down, type, packed);
                    }};
}

}  // namespace ballast
