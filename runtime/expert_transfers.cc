// How experts come and go while a plan is staged: the part of ExpertStore that Poll advances.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "comm/communicator.h"
#include "runtime/expert_flow.h"
#include "runtime/expert_store.h"

namespace ballast {

// ---- chunks -----------------------------------------------------------------------------------

size_t ExpertStore::ChunkBytes(const Flow& flow) const {
  return std::min(chunk_bytes_, options_.block_bytes - flow.offset);
}

int32_t ExpertStore::BlockToSend(const Flow& flow) const {
  const Flow::Item& item = flow.items[flow.next];
  return item.staged < 0 ? BlockOf(item.layer, item.expert) : staged_[item.staged].block;
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
    if (flow->copying != kNothing) {
      const auto copied = memory_->IsDone(flow->copying);
      if (copied.ok() && !*copied) break;
      flow->copying = kNothing;
      // What could not be copied is sent all the same: its receiver waits, and will find it wrong.
      const absl::Status posted = PostChunk(flow, budget);
      BALLAST_RETURN_IF_ERROR(copied.status());
      BALLAST_RETURN_IF_ERROR(posted);
      continue;
    }
    if (*budget <= 0) break;
    const int32_t which = flow->items[flow->next].staged;
    const size_t bytes = ChunkBytes(*flow);
    if (which >= 0 && staged_[which].arrived < flow->offset + bytes) break;
    if (draining_ || memory_->IsOpenTo(flow->peer)) {
      BALLAST_RETURN_IF_ERROR(PostChunk(flow, budget));
      continue;
    }
    if (memory_->IsFull()) break;
    const auto copying = memory_->Read(BlockToSend(*flow), flow->offset, {flow->chunk(), bytes});
    flow->copying = copying.ok() ? *copying : BlockMemory::kDone;
    BALLAST_RETURN_IF_ERROR(copying.status());
  }
  return absl::OkStatus();
}

absl::Status ExpertStore::PostChunk(Flow* flow, int64_t* budget) {
  const Flow::Item& item = flow->items[flow->next];
  const Staged* relayed = item.staged < 0 ? nullptr : &staged_[item.staged];
  const size_t bytes = draining_ ? 0 : ChunkBytes(*flow);
  const bool fetched = bytes > 0 && memory_->IsOpenTo(flow->peer);
  const ChunkHeader header{.magic = ChunkHeader::kMagic,
                           .layer = item.layer,
                           .plan_id = plan_->plan_id,
                           .base_epoch = plan_->base_epoch,
                           .expert = item.expert,
                           .bytes = static_cast<uint32_t>(bytes),
                           .offset = flow->offset,
                           .block_checksum = relayed == nullptr
                                                 ? SealedChecksum(item.layer, item.expert)
                                                 : relayed->sealed,
                           .fetch_block = fetched ? BlockToSend(*flow) : kNoBlock};
  std::memcpy(flow->buffer.data(), &header, sizeof header);
  BALLAST_ASSIGN_OR_RETURN(
      flow->handle,
      transport_->PostSend(flow->peer, kTagMigration,
                           {flow->buffer.data(), kCacheLineBytes + (fetched ? 0 : bytes)}));
  flow->posted = true;
  *budget -= static_cast<int64_t>(bytes);
  return absl::OkStatus();
}

absl::Status ExpertStore::AdvanceReceive(Flow* flow, int64_t* budget) {
  while (!flow->done()) {
    absl::Status taken;
    if (flow->copying != kNothing) {
      const auto copied = memory_->IsDone(flow->copying);
      if (copied.ok() && !*copied) break;
      taken = copied.ok() ? EndChunk(*flow) : copied.status();
    } else {
      if (*budget <= 0) break;
      if (!flow->posted) {
        BALLAST_ASSIGN_OR_RETURN(flow->handle,
                                 transport_->PostRecv(flow->peer, kTagMigration,
                                                      {flow->buffer.data(), flow->buffer.size()}));
        flow->posted = true;
      }
      if (memory_->IsFull()) break;
      size_t received = 0;
      const auto through = transport_->Test(flow->handle, &received);
      if (through.ok() && !*through) break;
      flow->posted = false;
      taken = through.ok() ? TakeChunk(flow, received) : through.status();
      if (taken.ok()) *budget -= static_cast<int64_t>(received);
      if (flow->copying != kNothing) continue;
    }
    // Whatever came, it stands where this chunk belongs: the flow goes on behind it, and so do
    // those that relay it, so that the plan can be drained.
    staged_[flow->items[flow->next].staged].arrived = flow->offset + ChunkBytes(*flow);
    NextChunk(flow);
    BALLAST_RETURN_IF_ERROR(taken);
  }
  return absl::OkStatus();
}

// Behind the chunk under way.
void ExpertStore::NextChunk(Flow* flow) {
  flow->posted = false;
  flow->copying = kNothing;
  flow->offset += chunk_bytes_;
  if (flow->offset < options_.block_bytes) return;
  ++flow->next;
  flow->offset = 0;
}

// Looks at what has come, and starts to bring it into its block.
absl::Status ExpertStore::TakeChunk(Flow* flow, size_t received) {
  if (draining_) return absl::OkStatus();
  Staged& staged = staged_[flow->items[flow->next].staged];
  const size_t bytes = ChunkBytes(*flow);
  ChunkHeader header{};
  std::memcpy(&header, flow->buffer.data(), sizeof header);
  const size_t sent = header.fetch_block == kNoBlock ? bytes : 0;
  if (received != kCacheLineBytes + sent || header.magic != ChunkHeader::kMagic ||
      header.bytes != bytes || header.plan_id != plan_->plan_id ||
      header.base_epoch != plan_->base_epoch || header.layer != staged.layer ||
      header.expert != staged.expert || header.offset != flow->offset) {
    return absl::InternalError(absl::StrCat(
        "rank ", options_.rank, " expected layer ", staged.layer, ", expert ", staged.expert,
        ", byte ", flow->offset, " of plan ", plan_->plan_id, " at epoch ", plan_->base_epoch,
        " and got layer ", header.layer, ", expert ", header.expert, ", byte ", header.offset,
        " of plan ", header.plan_id, " at epoch ", header.base_epoch, " from rank ", flow->peer));
  }
  staged.sealed = header.block_checksum;
  if (header.fetch_block == kNoBlock) {
    BALLAST_ASSIGN_OR_RETURN(flow->copying,
                             memory_->Write(staged.block, flow->offset, {flow->chunk(), bytes}));
  } else {
    BALLAST_ASSIGN_OR_RETURN(flow->copying,
                             memory_->Fetch(staged.block, flow->offset, bytes,
                                            {.peer = flow->peer, .block = header.fetch_block}));
  }
  bytes_received_ += static_cast<int64_t>(bytes);
  return absl::OkStatus();
}

// The chunk under way is in its block.
absl::Status ExpertStore::EndChunk(const Flow& flow) {
  if (draining_ || flow.offset + ChunkBytes(flow) < options_.block_bytes) return absl::OkStatus();
  Staged& staged = staged_[flow.items[flow.next].staged];
  staged.checksum = memory_->Written(staged.block);
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

// ---- the checkpoint ---------------------------------------------------------------------------

// Those for which there is room.
void ExpertStore::StartReads() {
  for (Staged& staged : staged_) {
    if (staged.read != Read::kWaits) continue;
    staged.room = memory_->TakeRoom(staged.block);
    if (staged.room.empty()) return;
    staged.read = Read::kReads;
    staged.read_id = ++last_read_id_;
    reader_->Start({.id = staged.read_id,
                    .layer = staged.layer,
                    .expert = staged.expert,
                    .block = staged.room});
  }
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
    return s.read == Read::kReads && s.read_id == done.id;
  });
  if (staged == staged_.end()) {
    EndLent(done);
    return absl::OkStatus();
  }
  staged->checksum = staged->sealed = done.checksum;
  absl::Status read = absl::Status(
      done.status.code(), absl::StrCat("layer ", staged->layer, ", expert ", staged->expert,
                                       " from the checkpoint: ", done.status.message()));
  if (done.status.ok()) read = CheckStaged(*staged, "the checkpoint");
  if (read.ok() && staged->room.data() != memory_->Address(staged->block)) {
    staged->read = Read::kFills;
    return read;
  }
  memory_->ReturnRoom(staged->room);
  staged->read = Read::kNone;
  staged->arrived = options_.block_bytes;
  copies_read_ += done.status.ok();
  return read;
}

// A read of a plan given up.
void ExpertStore::EndLent(const ExpertReader::Done& done) {
  const auto lent = std::ranges::find(lent_, done.id, &Lent::read_id);
  BALLAST_CHECK(lent != lent_.end());
  memory_->ReturnRoom(lent->room);
  if (lent->block != kNoBlock) free_blocks_.push_back(lent->block);
  lent_.erase(lent);
}

absl::Status ExpertStore::AdvanceFills(int64_t* budget) {
  absl::Status first_error;
  for (Staged& staged : staged_) {
    if (staged.read == Read::kFills) first_error.Update(AdvanceFill(&staged, budget));
  }
  return first_error;
}

// What was read goes into its block, a chunk at a time.
absl::Status ExpertStore::AdvanceFill(Staged* staged, int64_t* budget) {
  const auto piece = [&] {
    const size_t rest = options_.block_bytes - staged->arrived;
    return staged->room.subspan(staged->arrived, std::min(chunk_bytes_, rest));
  };
  absl::Status status;
  while (status.ok() && staged->arrived < options_.block_bytes) {
    if (staged->under_way == kNothing) {
      if (*budget <= 0 || memory_->IsFull()) return absl::OkStatus();
      const auto started = memory_->Write(staged->block, staged->arrived, piece());
      status = started.status();
      if (started.ok()) staged->under_way = *started;
      *budget -= static_cast<int64_t>(piece().size());
      continue;
    }
    const auto done = memory_->IsDone(staged->under_way);
    if (done.ok() && !*done) return absl::OkStatus();
    staged->under_way = kNothing;
    staged->arrived += piece().size();
    status = done.status();
  }
  memory_->ReturnRoom(staged->room);
  staged->read = Read::kNone;
  staged->arrived = options_.block_bytes;
  BALLAST_RETURN_IF_ERROR(status);
  ++copies_read_;
  staged->checksum = memory_->Written(staged->block);
  return CheckStaged(*staged, "the checkpoint");
}

// Those that have not begun are dropped. One that has may take as long as the disk likes: it keeps
// its room, and its block where that is the room. Who is to relay any of them has nothing to wait
// for.
void ExpertStore::GiveUpReads() {
  if (reader_ == nullptr) return;
  TakeReads().IgnoreError();
  const std::vector<int64_t> dropped = reader_->Cancel();
  int32_t lent_blocks = static_cast<int32_t>(
      std::ranges::count_if(lent_, [](const Lent& lent) { return lent.block != kNoBlock; }));
  for (Staged& staged : staged_) {
    const Read was = std::exchange(staged.read, Read::kNone);
    if (was == Read::kNone) continue;
    staged.arrived = options_.block_bytes;
    if (was == Read::kWaits) continue;
    if (was == Read::kFills || std::ranges::find(dropped, staged.read_id) != dropped.end()) {
      memory_->ReturnRoom(staged.room);
      continue;
    }
    const bool in_block = staged.room.data() == memory_->Address(staged.block);
    lent_.push_back({staged.read_id, staged.room, in_block ? staged.block : kNoBlock});
    if (!in_block) continue;
    staged.block = kNoBlock;
    if (++lent_blocks <= spare_blocks_) continue;
    BALLAST_CHECK(AddBlocks(1).ok());  // in the host's memory, where there is nothing to wait for
    ++spare_blocks_;
  }
}

// ---- all of it --------------------------------------------------------------------------------

bool ExpertStore::Idle() const {
  const auto idle = [](const std::unique_ptr<Flow>& flow) { return flow->done(); };
  return std::ranges::all_of(sends_, idle) && std::ranges::all_of(receives_, idle) &&
         std::ranges::all_of(staged_, [](const Staged& s) { return s.read == Read::kNone; });
}

absl::StatusOr<bool> ExpertStore::Poll(TransferBudget* budget) {
  if (!plan_.has_value()) return false;
  absl::Status first_error = TakeReads();
  StartReads();
  first_error.Update(AdvanceFills(&budget->receive));
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

}  // namespace ballast
