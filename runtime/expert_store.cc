#include "runtime/expert_store.h"

#include <algorithm>
#include <cstring>

#include "base/block_checksum.h"
#include "base/check.h"
#include "base/status.h"
#include "comm/communicator.h"

namespace ballast {
namespace {

constexpr uint32_t kChunkMagic = 0x4b4e4843;  // "CHNK"
constexpr size_t kChunkGrain = 16;            // a checksum adds up pieces of whole words
constexpr int32_t kLentBlock = -1;            // of a staged expert whose read was given up

}  // namespace

// Stands before every chunk.
struct ExpertStore::ChunkHeader {
  uint32_t magic;
  int32_t layer;
  int64_t plan_id;
  int64_t base_epoch;
  int32_t expert;
  uint32_t bytes;
  uint64_t offset;
  uint64_t block_checksum;  // of the whole expert, from the source's table
};

// The experts that go to or come from one peer, in plan order, and the one chunk under way.
struct ExpertStore::Flow {
  int peer = 0;
  struct Item {
    int32_t layer, expert;
    int32_t staged;  // which of staged_, or -1: resident
  };
  std::vector<Item> items;
  size_t next = 0;    // item of the chunk under way, or of the next one
  size_t offset = 0;  // of that chunk
  bool posted = false;
  Transport::Handle handle = 0;
  AlignedBuffer buffer;  // header in its own cache line, then the chunk
  bool done() const { return next == items.size() && !posted; }
};

ExpertStore::ExpertStore(Options options, Transport* transport)
    : options_(std::move(options)),
      chunk_bytes_(options_.chunk_bytes / kChunkGrain * kChunkGrain),
      transport_(transport) {
  BALLAST_CHECK(chunk_bytes_ > 0);
  AddBlocks(options_.resident_blocks + options_.staging_blocks);
  const size_t experts = static_cast<size_t>(options_.num_layers) * options_.num_experts;
  block_of_expert_.assign(experts, -1);
  sealed_checksum_.assign(experts, 0);
  MakeFlows();
  if (options_.read) reader_ = std::make_unique<ExpertReader>(options_.read);
}

ExpertStore::~ExpertStore() = default;

void ExpertStore::AddBlocks(int32_t count) {
  const size_t stride = RoundUp(options_.block_bytes, kCacheLineBytes);
  memory_.emplace_back(static_cast<size_t>(count) * stride);
  const int32_t first = static_cast<int32_t>(blocks_.size());
  for (int32_t i = 0; i < count; ++i) blocks_.push_back(memory_.back().data() + i * stride);
  for (int32_t i = count - 1; i >= 0; --i) free_blocks_.push_back(first + i);
}

void ExpertStore::MakeFlows() {
  sends_.clear();
  receives_.clear();
  for (int peer = 0; peer < transport_->size(); ++peer) {
    for (auto* flows : {&sends_, &receives_}) {
      flows->push_back(std::make_unique<Flow>());
      flows->back()->peer = peer;
      if (peer != transport_->rank()) {
        flows->back()->buffer = AlignedBuffer(kCacheLineBytes + options_.chunk_bytes);
      }
    }
  }
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
  return {Block(block), options_.block_bytes};
}

absl::Status ExpertStore::Seal(int32_t layer, int32_t expert) {
  uint64_t& sealed = sealed_checksum_[At(layer, expert)];
  const uint64_t now = Checksum(layer, expert);
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
  const int32_t block = block_of_expert_[At(layer, expert)];
  return block < 0 ? nullptr : Block(block);
}

uint64_t ExpertStore::Checksum(int32_t layer, int32_t expert) const {
  const std::byte* block = Parameters(layer, expert);
  BALLAST_CHECK(block != nullptr);
  return BlockChecksum({block, options_.block_bytes});
}

size_t ExpertStore::resident_bytes() const {
  const auto held =
      std::ranges::count_if(block_of_expert_, [](int32_t block) { return block >= 0; });
  return static_cast<size_t>(held) * options_.block_bytes;
}

size_t ExpertStore::memory_bytes() const {
  size_t bytes = 0;
  for (const AlignedBuffer& memory : memory_) bytes += memory.size();
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
        staged_.back().reading = true;
        reader_->Start({.block_id = block,
                        .layer = move.layer,
                        .expert = move.expert,
                        .block = {Block(block), options_.block_bytes}});
        continue;
      }
      receives_[move.from_rank]->items.push_back({move.layer, move.expert, coming[at]});
    } else if (move.from_rank == options_.rank) {
      BALLAST_CHECK(block_of_expert_[at] >= 0 || coming[at] >= 0);
      sends_[topology.rank_of_slot(move.to_slot)]->items.push_back(
          {move.layer, move.expert, block_of_expert_[at] >= 0 ? -1 : coming[at]});
    }
  }
  plan_ = plan;
  failed_ = false;
  return absl::OkStatus();
}

absl::Status ExpertStore::AdvanceSend(Flow* flow, int64_t* budget) {
  while (!flow->done()) {
    if (flow->posted) {
      const auto through = transport_->Test(flow->handle, nullptr);
      if (through.ok() && !*through) break;
      NextChunk(flow);  // also after an error: the handle is gone with it
      BALLAST_RETURN_IF_ERROR(through.status());
      continue;
    }
    if (*budget <= 0) break;
    const Flow::Item& item = flow->items[flow->next];
    const size_t at = At(item.layer, item.expert);
    size_t bytes = std::min(chunk_bytes_, options_.block_bytes - flow->offset);
    const Staged* relayed = item.staged < 0 ? nullptr : &staged_[item.staged];
    if (relayed != nullptr && relayed->arrived < flow->offset + bytes) break;
    if (draining_) bytes = 0;
    const ChunkHeader header{
        kChunkMagic,    item.layer,
        plan_->plan_id, plan_->base_epoch,
        item.expert,    static_cast<uint32_t>(bytes),
        flow->offset,   relayed == nullptr ? sealed_checksum_[at] : relayed->sealed};
    std::memcpy(flow->buffer.data(), &header, sizeof header);
    if (bytes > 0) {
      const int32_t block = relayed == nullptr ? block_of_expert_[at] : relayed->block;
      std::memcpy(flow->buffer.data() + kCacheLineBytes, Block(block) + flow->offset, bytes);
    }
    BALLAST_ASSIGN_OR_RETURN(flow->handle,
                             transport_->PostSend(flow->peer, kTagMigration,
                                                  {flow->buffer.data(), kCacheLineBytes + bytes}));
    flow->posted = true;
    *budget -= static_cast<int64_t>(bytes);
  }
  return absl::OkStatus();
}

absl::Status ExpertStore::AdvanceReceive(Flow* flow, int64_t* budget) {
  while (!flow->done() && *budget > 0) {
    if (!flow->posted) {
      BALLAST_ASSIGN_OR_RETURN(
          flow->handle, transport_->PostRecv(flow->peer, kTagMigration, flow->buffer.bytes()));
      flow->posted = true;
    }
    size_t received = 0;
    const auto through = transport_->Test(flow->handle, &received);
    if (through.ok() && !*through) break;
    // Whatever came, it stands where this chunk belongs: the flow goes on behind it, and so do
    // those that relay it, so that the plan can be drained.
    const absl::Status taken = through.ok() ? TakeChunk(*flow, received) : through.status();
    staged_[flow->items[flow->next].staged].arrived =
        std::min(flow->offset + chunk_bytes_, options_.block_bytes);
    NextChunk(flow);
    BALLAST_RETURN_IF_ERROR(taken);
    *budget -= static_cast<int64_t>(received);
  }
  return absl::OkStatus();
}

// Behind the chunk under way.
void ExpertStore::NextChunk(Flow* flow) {
  flow->posted = false;
  flow->offset += chunk_bytes_;
  if (flow->offset < options_.block_bytes) return;
  ++flow->next;
  flow->offset = 0;
}

absl::Status ExpertStore::TakeChunk(const Flow& flow, size_t received) {
  if (draining_) return absl::OkStatus();
  Staged& staged = staged_[flow.items[flow.next].staged];
  const size_t bytes = std::min(chunk_bytes_, options_.block_bytes - flow.offset);
  ChunkHeader header{};
  std::memcpy(&header, flow.buffer.data(), sizeof header);
  if (received != kCacheLineBytes + bytes || header.magic != kChunkMagic ||
      header.plan_id != plan_->plan_id || header.base_epoch != plan_->base_epoch ||
      header.layer != staged.layer || header.expert != staged.expert ||
      header.offset != flow.offset) {
    return absl::InternalError(absl::StrCat(
        "rank ", options_.rank, " expected layer ", staged.layer, ", expert ", staged.expert,
        ", byte ", flow.offset, " of plan ", plan_->plan_id, " at epoch ", plan_->base_epoch,
        " and got layer ", header.layer, ", expert ", header.expert, ", byte ", header.offset,
        " of plan ", header.plan_id, " at epoch ", header.base_epoch, " from rank ", flow.peer));
  }
  const std::span<std::byte> block(Block(staged.block), options_.block_bytes);
  std::memcpy(block.data() + flow.offset, flow.buffer.data() + kCacheLineBytes, bytes);
  bytes_received_ += static_cast<int64_t>(bytes);
  staged.sealed = header.block_checksum;
  if (flow.offset == 0) staged.checksum = block.size();
  staged.checksum += ChecksumPiece(block.subspan(flow.offset, bytes), flow.offset);
  if (flow.offset + bytes < block.size()) return absl::OkStatus();
  ++copies_received_;
  return CheckStaged(staged, absl::StrCat("rank ", flow.peer));
}

// Whether what has come is the expert.
absl::Status ExpertStore::CheckStaged(const Staged& staged, const std::string& source) const {
  const uint64_t known = sealed_checksum_[At(staged.layer, staged.expert)];
  const uint64_t expected = known != 0 ? known : staged.sealed;
  if (staged.checksum == expected) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("layer ", staged.layer, ", expert ", staged.expert,
                                          " from ", source, " has checksum ", staged.checksum,
                                          ", it was packed with ", expected));
}

// What has been read since the last time.
absl::Status ExpertStore::TakeReads() {
  absl::Status first_error;
  while (reader_ != nullptr) {
    const auto done = reader_->Take();
    if (!done.has_value()) break;
    first_error.Update(TakeRead(*done));
  }
  return first_error;
}

absl::Status ExpertStore::TakeRead(const ExpertReader::Done& done) {
  const auto staged = std::find_if(staged_.begin(), staged_.end(), [&](const Staged& s) {
    return s.reading && s.block == done.block_id;
  });
  if (staged == staged_.end()) {  // of a plan given up
    free_blocks_.push_back(done.block_id);
    --lent_blocks_;
    return absl::OkStatus();
  }
  staged->reading = false;
  staged->arrived = options_.block_bytes;
  staged->checksum = staged->sealed = done.checksum;
  copies_read_ += done.status.ok();
  if (done.status.ok()) return CheckStaged(*staged, "the checkpoint");
  return absl::Status(done.status.code(),
                      absl::StrCat("layer ", staged->layer, ", expert ", staged->expert,
                                   " from the checkpoint: ", done.status.message()));
}

// Those that have not begun are dropped. One that has may take as long as the disk likes: it keeps
// its block. Who is to relay any of them has nothing to wait for.
void ExpertStore::GiveUpReads() {
  if (reader_ == nullptr) return;
  TakeReads().IgnoreError();
  const std::vector<int32_t> dropped = reader_->Cancel();
  for (Staged& staged : staged_) {
    if (!staged.reading) continue;
    staged.reading = false;
    staged.arrived = options_.block_bytes;
    if (std::ranges::find(dropped, staged.block) != dropped.end()) continue;
    staged.block = kLentBlock;
    if (++lent_blocks_ <= spare_blocks_) continue;
    AddBlocks(1);
    ++spare_blocks_;
  }
}

bool ExpertStore::Idle() const {
  const auto idle = [](const std::unique_ptr<Flow>& flow) { return flow->done(); };
  return std::ranges::all_of(sends_, idle) && std::ranges::all_of(receives_, idle) &&
         std::ranges::none_of(staged_, &Staged::reading);
}

absl::StatusOr<bool> ExpertStore::Poll(TransferBudget* budget) {
  if (!plan_.has_value()) return false;
  absl::Status first_error = TakeReads();
  // Each peer is the first in turn, so that a small budget reaches all of them.
  first_flow_ = (first_flow_ + 1) % sends_.size();
  for (size_t k = 0; k < sends_.size(); ++k) {
    const size_t peer = (first_flow_ + k) % sends_.size();
    first_error.Update(AdvanceSend(sends_[peer].get(), &budget->send));
    first_error.Update(AdvanceReceive(receives_[peer].get(), &budget->receive));
  }
  failed_ = failed_ || !first_error.ok();
  if (!first_error.ok()) return first_error;
  if (!Idle()) return false;
  if (draining_) {
    draining_ = false;
    Discard();
    return false;
  }
  return !failed_;
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
    if (staged.block != kLentBlock) free_blocks_.push_back(staged.block);
  }
  staged_.clear();
  for (auto* flows : {&sends_, &receives_}) {
    for (auto& flow : *flows) {
      if (flow->posted) KeepForGood(std::move(flow->buffer));
      auto next = std::make_unique<Flow>();
      next->peer = flow->peer;
      next->buffer = flow->posted && flow->peer != transport_->rank()
                         ? AlignedBuffer(kCacheLineBytes + options_.chunk_bytes)
                         : std::move(flow->buffer);
      flow = std::move(next);
    }
  }
  plan_.reset();
}

void ExpertStore::Regroup(int32_t rank, Transport* transport, const Placement& placement) {
  BALLAST_CHECK(!plan_.has_value());
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
  if (total > static_cast<int32_t>(blocks_.size())) {
    AddBlocks(total - static_cast<int32_t>(blocks_.size()));
  }
  BALLAST_CHECK(wanted <= static_cast<int32_t>(free_blocks_.size()));
}

}  // namespace ballast
