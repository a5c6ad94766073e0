#include "runtime/expert_store.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "runtime/expert_flow.h"

namespace ballast {
namespace {

constexpr size_t kChunkGrain = 16;  // what a checksum adds up, and a device reads, at a time

}  // namespace

ExpertStore::ExpertStore(Options options, Transport* transport)
    : ExpertStore(options, transport, std::make_unique<HostBlocks>(options.block_bytes)) {}

ExpertStore::ExpertStore(Options options, Transport* transport, std::unique_ptr<BlockMemory> memory)
    : options_(std::move(options)),
      chunk_bytes_(options_.chunk_bytes / kChunkGrain * kChunkGrain),
      transport_(transport),
      memory_(std::move(memory)) {
  BALLAST_CHECK(chunk_bytes_ > 0);
  BALLAST_CHECK(memory_->block_bytes() == options_.block_bytes);
  const int32_t wanted = options_.resident_blocks + options_.staging_blocks;
  for (int32_t block = memory_->num_blocks() - 1; block >= 0; --block) {
    free_blocks_.push_back(block);
  }
  if (wanted > memory_->num_blocks()) {
    BALLAST_CHECK(AddBlocks(wanted - memory_->num_blocks()).ok());
  }
  const size_t experts = static_cast<size_t>(options_.num_layers) * options_.num_experts;
  block_of_expert_.assign(experts, kNoBlock);
  sealed_checksum_.assign(experts, 0);
  MakeFlows();
  if (options_.read) reader_ = std::make_unique<ExpertReader>(options_.read);
}

// Messages may still be on their way from or to blocks.
ExpertStore::~ExpertStore() {
  memory_->Wait().IgnoreError();
}

absl::Status ExpertStore::AddBlocks(int32_t count) {
  const int32_t first = memory_->num_blocks();
  BALLAST_RETURN_IF_ERROR(memory_->AddBlocks(count));
  for (int32_t i = count - 1; i >= 0; --i) free_blocks_.push_back(first + i);
  return absl::OkStatus();
}

void ExpertStore::MakeFlows() {
  sends_.clear();
  receives_.clear();
  for (int peer = 0; peer < transport_->size(); ++peer) {
    for (auto* flows : {&sends_, &receives_}) flows->push_back(MakeFlow(peer));
  }
}

std::unique_ptr<ExpertStore::Flow> ExpertStore::MakeFlow(int peer) const {
  auto flow = std::make_unique<Flow>(&memory_->messages());
  flow->peer = peer;
  if (peer != transport_->rank()) {
    BALLAST_CHECK(flow->buffer.EnsureSize(kCacheLineBytes + options_.chunk_bytes).ok());
  }
  return flow;
}

int32_t ExpertStore::TakeBlock() {
  BALLAST_CHECK(!free_blocks_.empty());
  const int32_t block = free_blocks_.back();
  free_blocks_.pop_back();
  return block;
}

std::span<std::byte> ExpertStore::Allocate(int32_t layer, int32_t expert) {
  int32_t& block = block_of_expert_[At(layer, expert)];
  if (block < 0) block = TakeBlock();
  return memory_->FillRoom(block);
}

absl::Status ExpertStore::Seal(int32_t layer, int32_t expert) {
  uint64_t& sealed = sealed_checksum_[At(layer, expert)];
  BALLAST_ASSIGN_OR_RETURN(const uint64_t now, memory_->Fill(BlockOf(layer, expert)));
  if (sealed == 0) sealed = now;
  if (sealed == now) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("layer ", layer, ", expert ", expert, " has checksum ",
                                          now, ", it was first packed with ", sealed));
}

absl::Status ExpertStore::Learn(std::span<const uint64_t> checksums) {
  BALLAST_CHECK(checksums.size() == sealed_checksum_.size());
  for (size_t at = 0; at < checksums.size(); ++at) {
    uint64_t& mine = sealed_checksum_[at];
    if (mine == 0) mine = checksums[at];
    if (checksums[at] == 0 || checksums[at] == mine) continue;
    return absl::DataLossError(absl::StrCat(
        "layer ", at / static_cast<size_t>(options_.num_experts), ", expert ",
        at % static_cast<size_t>(options_.num_experts), " was packed with checksum ", mine,
        " by one rank and with ", checksums[at], " by another: they read different checkpoints"));
  }
  return absl::OkStatus();
}

void ExpertStore::Drop(int32_t layer, int32_t expert) {
  free_blocks_.push_back(std::exchange(block_of_expert_[At(layer, expert)], -1));
}

const std::byte* ExpertStore::Parameters(int32_t layer, int32_t expert) const {
  const int32_t block = BlockOf(layer, expert);
  return block < 0 ? nullptr : memory_->Address(block);
}

absl::StatusOr<bool> ExpertStore::Advance(BlockMemory::Reading* reading) const {
  if (memory_->IsFull()) return false;
  return memory_->Advance(reading);
}

size_t ExpertStore::resident_bytes() const {
  const auto held =
      std::ranges::count_if(block_of_expert_, [](int32_t block) { return block >= 0; });
  return static_cast<size_t>(held) * options_.block_bytes;
}

size_t ExpertStore::memory_bytes() const {
  size_t bytes = memory_->memory_bytes();
  for (const auto* flows : {&sends_, &receives_}) {
    for (const auto& flow : *flows) bytes += flow->buffer.size();
  }
  return bytes;
}

uint64_t ExpertStore::SealedChecksum(int32_t layer, int32_t expert) const {
  return sealed_checksum_[At(layer, expert)];
}

absl::Status ExpertStore::Stage(const MigrationPlan& plan, const Placement& current) {
  if (!plan_.has_value()) TakeReads().IgnoreError();  // of plans given up
  if (plan_.has_value() || draining_) {
    return absl::FailedPreconditionError(
        absl::StrCat("plan ", plan.plan_id, ": another plan is still under way"));
  }
  const Topology& topology = current.topology();
  std::vector<int32_t> incoming(static_cast<size_t>(topology.num_ranks()), 0);
  for (const Move& move : plan.moves) {
    if (move.from_rank == Move::kFromFile && reader_ == nullptr) {
      return absl::UnimplementedError(
          absl::StrCat("plan ", plan.plan_id, " takes layer ", move.layer, ", expert ", move.expert,
                       " from the checkpoint, which this store cannot read"));
    }
    const int32_t to = topology.rank_of_slot(move.to_slot);
    if (++incoming[to] > options_.staging_blocks) {
      return absl::ResourceExhaustedError(
          absl::StrCat("plan ", plan.plan_id, " brings more than ", options_.staging_blocks,
                       " experts to rank ", to, ", which is all the staging memory allows"));
    }
  }
  std::vector<int32_t> coming(block_of_expert_.size(), -1);  // which of staged_
  for (const Move& move : plan.moves) {
    const size_t at = At(move.layer, move.expert);
    if (topology.rank_of_slot(move.to_slot) == options_.rank) {
      coming[at] = static_cast<int32_t>(staged_.size());
      const int32_t block = TakeBlock();
      staged_.push_back({.layer = move.layer, .expert = move.expert, .block = block});
      if (move.from_rank == Move::kFromFile) {
        staged_.back().read = Read::kWaits;
        continue;
      }
      receives_[move.from_rank]->items.push_back({move.layer, move.expert, coming[at]});
    } else if (move.from_rank == options_.rank) {
      BALLAST_CHECK(block_of_expert_[at] >= 0 || coming[at] >= 0);
      sends_[topology.rank_of_slot(move.to_slot)]->items.push_back(
          {move.layer, move.expert, block_of_expert_[at] >= 0 ? -1 : coming[at]});
    }
  }
  StartReads();
  plan_ = plan;
  failed_ = false;
  return absl::OkStatus();
}

void ExpertStore::Commit(const Placement& target) {
  BALLAST_CHECK(plan_.has_value() && !draining_ && !failed_ && Idle());
  for (const Placement::LayerRow& row : plan_->rows) {
    for (int32_t e = 0; e < options_.num_experts; ++e) {
      int32_t& block = block_of_expert_[At(row.layer, e)];
      if (block >= 0 && !target.Hosts(row.layer, e, options_.rank)) {
        free_blocks_.push_back(block);
        block = -1;
      }
    }
  }
  for (const Staged& staged : staged_) {
    block_of_expert_[At(staged.layer, staged.expert)] = staged.block;
    sealed_checksum_[At(staged.layer, staged.expert)] = staged.sealed;
  }
  staged_.clear();
  for (auto* flows : {&sends_, &receives_}) {
    for (auto& flow : *flows) flow->items.clear(), flow->next = 0;
  }
  plan_.reset();
}

void ExpertStore::Discard() {
  if (!plan_.has_value()) return;
  GiveUpReads();
  if (!Idle()) {
    draining_ = true;  // peers wait for every chunk that the plan says; Poll goes through them
    return;
  }
  Abandon();
}

void ExpertStore::Abandon() {
  if (!plan_.has_value()) return;
  draining_ = false;
  GiveUpReads();
  for (const Staged& staged : staged_) {
    if (staged.block != kNoBlock) free_blocks_.push_back(staged.block);
  }
  staged_.clear();
  for (auto* flows : {&sends_, &receives_}) {
    for (auto& flow : *flows) {
      auto next = std::make_unique<Flow>(&memory_->messages());
      next->peer = flow->peer;
      if (flow->posted) {
        KeepForGood(std::move(flow->buffer));
        next = MakeFlow(flow->peer);
      } else {
        next->buffer = std::move(flow->buffer);
      }
      flow = std::move(next);
    }
  }
  plan_.reset();
}

absl::Status ExpertStore::Regroup(int32_t rank, Transport* transport, const Placement& placement) {
  BALLAST_CHECK(!plan_.has_value());
  BALLAST_RETURN_IF_ERROR(memory_->Wait());  // some may still come from or go to messages
  memory_->ForgetPeers();
  options_.rank = rank;
  transport_ = transport;
  MakeFlows();
  // Nobody makes plans for less than a layer.
  for (int32_t r = 0; r < placement.topology().num_ranks(); ++r) {
    options_.staging_blocks = std::max(options_.staging_blocks, placement.topology().slots_on(r));
  }
  int32_t wanted = 0;
  for (int32_t layer = 0; layer < options_.num_layers; ++layer) {
    for (int32_t e = 0; e < options_.num_experts; ++e) {
      int32_t& block = block_of_expert_[At(layer, e)];
      const bool hosts = placement.Hosts(layer, e, rank);
      if (block >= 0 && !hosts) {
        free_blocks_.push_back(block);
        block = -1;
      }
      wanted += hosts && block < 0;
    }
  }
  const int32_t resident = placement.topology().slots_on(rank) * options_.num_layers;
  const int32_t total = resident + options_.staging_blocks + spare_blocks_;
  if (total > memory_->num_blocks()) {
    BALLAST_RETURN_IF_ERROR(AddBlocks(total - memory_->num_blocks()));
  }
  BALLAST_CHECK(wanted <= static_cast<int32_t>(free_blocks_.size()));
  return absl::OkStatus();
}

}  // namespace ballast
