#include "runtime/device_backend.h"

#include <vector>

#include "base/status.h"
#include "kernels/grouped_mlp.h"

namespace ballast {

LendMemory LendByIpc(Communicator* world) {
  // What is lent is never closed: a rank that was lost may go on writing to it.
  auto lent = std::make_shared<std::vector<std::unique_ptr<PeerMemory>>>();
  return [world, lent](size_t bytes) -> absl::StatusOr<std::vector<std::byte*>> {
    BALLAST_ASSIGN_OR_RETURN(auto memory,
                             PeerMemory::Create(MakeCudaMemory(), world, /*epoch=*/0, bytes));
    lent->push_back(std::move(memory));
    return lent->back()->blocks();
  };
}

absl::StatusOr<std::unique_ptr<DeviceBackend>> DeviceBackend::Create(Options options) {
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream stream,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kNormal));
  return std::unique_ptr<DeviceBackend>(new DeviceBackend(std::move(options), std::move(stream)));
}

absl::StatusOr<std::unique_ptr<MoeLayers>> DeviceBackend::MakeMoeLayers(
    const MoeLayers::Options& options) {
  return DeviceMoeLayers::Create(
      options, {.kernels = options_.kernels,
                .stream = stream_.get(),
                .path = options_.path,
                .max_blocks = options_.max_blocks,
                .lend = options_.lend,
                .experts = [this] {
                  return ExpertArena{blocks_->arena(), blocks_->stride(), blocks_->num_blocks()};
                }});
}

absl::StatusOr<std::unique_ptr<BlockMemory>> DeviceBackend::MakeBlocks(size_t block_bytes,
                                                                       int32_t num_blocks) {
  const size_t bytes = DeviceBlocks::StrideOf(block_bytes) * static_cast<size_t>(num_blocks);
  BALLAST_ASSIGN_OR_RETURN(const std::vector<std::byte*> lent, options_.lend(bytes));
  BALLAST_ASSIGN_OR_RETURN(auto blocks,
                           DeviceBlocks::Create({.block_bytes = block_bytes,
                                                 .num_blocks = num_blocks,
                                                 .arena = {lent[options_.rank], bytes}}));
  std::vector<const std::byte*> peers(lent.begin(), lent.end());
  peers[options_.rank] = nullptr;
  BALLAST_RETURN_IF_ERROR(blocks->SetPeers(std::move(peers)));
  blocks_ = blocks.get();
  return blocks;
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
