#include "runtime/device_backend.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

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
      stream_(std::move(stream)),
      graphs_(stream_.get()) {}

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
  if (options.nccl == nullptr && SeveralNodes(options.node_of_rank)) {
    return absl::FailedPreconditionError(
        "the ranks are on several nodes, where devices cannot address each other, and this build "
        "has no NCCL to carry rows between them: start all ranks on one node, or build with "
        "BALLAST_WITH_NCCL=ON");
  }
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream stream,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kHigh));
  return std::unique_ptr<DeviceBackend>(new DeviceBackend(std::move(options), std::move(stream)));
}

absl::StatusOr<std::unique_ptr<MoeLayers>> DeviceBackend::MakeMoeLayers(
    const MoeLayers::Options& options) {
  const auto experts = [this] {
    return ExpertArena{blocks_->arena(), blocks_->stride(), blocks_->num_blocks()};
  };
  if (several_nodes_) {
    return CarriedMoeLayers::Create(options, {.nccl = options_.nccl,
                                              .max_ctas = options_.max_ctas,
                                              .stream = stream_.get(),
                                              .path = options_.path,
                                              .experts = experts});
  }
  return DeviceMoeLayers::Create(options, {.kernels = options_.kernels,
                                           .stream = stream_.get(),
                                           .path = options_.path,
                                           .max_blocks = options_.max_blocks,
                                           .lend = options_.lend,
                                           .experts = experts});
}

absl::StatusOr<std::unique_ptr<BlockMemory>> DeviceBackend::MakeBlocks(size_t block_bytes,
                                                                       int32_t num_blocks) {
  if (several_nodes_) {  // copies go as messages
    BALLAST_ASSIGN_OR_RETURN(
        auto alone, DeviceBlocks::Create({.block_bytes = block_bytes, .num_blocks = num_blocks}));
    blocks_ = alone.get();
    return alone;
  }
  const size_t bytes = DeviceBlocks::StrideOf(block_bytes) * static_cast<size_t>(num_blocks);
  BALLAST_ASSIGN_OR_RETURN(lent_for_blocks_, options_.lend(bytes));
  BALLAST_ASSIGN_OR_RETURN(
      auto blocks, DeviceBlocks::Create({.block_bytes = block_bytes,
                                         .num_blocks = num_blocks,
                                         .arena = {lent_for_blocks_[options_.rank], bytes}}));
  blocks_ = blocks.get();
  return blocks;
}

absl::Status DeviceBackend::ConnectBlocks(Communicator* communicator,
                                          std::span<const int32_t> job_ranks) {
  if (several_nodes_) return absl::OkStatus();
  // Who has needed more blocks than it had at first has them in memory that others do not know.
  const uint8_t lent = blocks_->arena() == lent_for_blocks_[options_.rank];
  std::vector<uint8_t> all(job_ranks.size());
  BALLAST_RETURN_IF_ERROR(communicator->AllGather(/*epoch=*/0, std::as_bytes(std::span(&lent, 1)),
                                                  std::as_writable_bytes(std::span(all))));
  std::vector<const std::byte*> peers(job_ranks.size());
  for (size_t member = 0; member < peers.size(); ++member) {
    const bool open = lent != 0 && all[member] != 0 && job_ranks[member] != options_.rank;
    peers[member] = open ? lent_for_blocks_[job_ranks[member]] : nullptr;
  }
  return blocks_->SetPeers(std::move(peers));
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
