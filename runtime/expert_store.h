#ifndef BALLAST_RUNTIME_EXPERT_STORE_H_
#define BALLAST_RUNTIME_EXPERT_STORE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/transport.h"
#include "placement/migration_plan.h"
#include "placement/placement.h"
#include "runtime/block_memory.h"
#include "runtime/copy_store.h"
#include "runtime/expert_reader.h"

namespace ballast {

// The expert parameters in this rank's memory, and the only thing that changes them. Where that is,
// the host's or a device's, BlockMemory knows.
//
// Memory is cut into blocks of one packed expert each. An expert that a rank holds in a layer has
// one block, however many slots name it. A plan is carried out as
//   (Stage Poll* (Commit | Discard))*
// Stage and Poll bring new experts into spare blocks while the old ones serve; Commit changes the
// table and frees the blocks of experts that left; no parameters move at that moment.
//
// Chunks travel in plan order on each pair of ranks, one at a time per pair, each with the plan and
// the place they are for. A rank that relays an expert sends a chunk on as soon as it has it. No
// plan gets stuck: of the moves that are not through, the first in plan order has all earlier ones
// of its pair behind it, and its source holds the expert or has it by an earlier move. Of a plan
// that is given up the chunks still to come travel as headers alone.
//
// Where a peer can read this rank's blocks by their addresses, a chunk is not sent either: its
// header says where it lies, and the receiver fetches it. It lies there until all ranks have staged
// the plan: a block becomes another expert's only at a flip, or after one. Of a plan that was given
// up a fetch may read what has come into the block since; nobody believes what it fetches.
//
// An expert that the plan takes from the checkpoint is read by Options::read on a thread of its own
// (expert_reader.h), into a room that the memory has for it, which is the block itself where the
// host can write it; Poll only looks whether it is done. Nothing waits for a read: one that has
// begun when its plan is given up keeps its room until it ends. Where that is its block, another
// one stands in for it.
//
// What Poll starts in the memory may take its time; a later Poll finds it done.
//
// An expert is known by one checksum, taken when it was first packed from the checkpoint: it covers
// every byte that the products read, derived layouts included. Ranks tell each other theirs
// (checksums, Learn), it travels along with every copy, over relays too, and whatever comes in has
// to match it, from a rank or from the checkpoint.
// THREADS one (the step thread). COLLECTIVE in effect: all ranks stage the same plans in the same
// order.
class ExpertStore : public CopyStore {
 public:
  struct Options {
    int32_t rank = 0;
    int32_t num_layers = 0;          // MoE layers
    int32_t num_experts = 0;         // per layer
    size_t block_bytes = 0;          // of one packed expert
    int32_t resident_blocks = 0;     // slots of this rank over all layers
    int32_t staging_blocks = 0;      // most experts that one plan may bring to a rank
    size_t chunk_bytes = 256 << 10;  // of a message, cut down to a multiple of 16
    ReadExpert read = {};  // empty: plans that take copies from the checkpoint are refused
  };
  // Makes the blocks that `memory` lacks. Aborts where they or messages cannot be had.
  ExpertStore(Options options, Transport* transport, std::unique_ptr<BlockMemory> memory);
  // In the host's memory.
  ExpertStore(Options options, Transport* transport);
  ~ExpertStore() override;

  // A block for the expert. The caller lays the expert out in what is returned, then seals it with
  // Seal, before the next one is allocated.
  std::span<std::byte> Allocate(int32_t layer, int32_t expert);
  // Waits for the memory. ERRORS kDataLoss: the block is not what the expert was when it was first
  // packed; those of the memory
  absl::Status Seal(int32_t layer, int32_t expert);
  // Gives the block back. REQUIRES it was allocated, and no table knows of it
  void Drop(int32_t layer, int32_t expert);

  // The packed parameters, at an address of the memory that they lie in, or nullptr where this rank
  // does not hold the expert.
  const std::byte* Parameters(int32_t layer, int32_t expert) const;
  // The block that they lie in; -1: not here.
  int32_t BlockOf(int32_t layer, int32_t expert) const {
    return block_of_expert_[At(layer, expert)];
  }

  // What every expert was packed with, as far as it is known here.
  // SHAPES [num_layers * num_experts], 0: not known
  std::span<const uint64_t> checksums() const { return sealed_checksum_; }
  // What another rank knows. ERRORS kDataLoss: the two know an expert by different checksums
  absl::Status Learn(std::span<const uint64_t> checksums);

  // ERRORS kFailedPrecondition: a plan is being staged, or one given up still has messages under
  //        way; kUnimplemented: no Options::read for it; kResourceExhausted: the plan brings
  //        more experts to some rank than staging_blocks (every rank finds the same, so all refuse
  //        together)
  absl::Status Stage(const MigrationPlan& plan, const Placement& current) override;
  // ERRORS kDataLoss: a checksum does not match, with layer, expert and source; what Options::read
  //        says, with layer and expert. The plan is then never said to be staged
  absl::StatusOr<bool> Poll(TransferBudget* budget) override;
  // REQUIRES no kernel on a device goes by the tables from before any more
  void Commit(const Placement& target) override;
  void Discard() override;
  // May allocate: a message that is still posted is never used again.
  void Abandon() override;
  bool staging() const override { return plan_.has_value(); }
  bool draining() const override { return draining_; }
  size_t block_bytes() const override { return options_.block_bytes; }

  // Other ranks than before go on: this one as `rank`, over `transport`. Copies that `placement`
  // does not give to it are dropped, and there is room for all it gives, and to stage as many as
  // the largest rank has slots in a layer. Waits for the memory, and may make it grow; who its
  // peers are it has to be told again.
  // REQUIRES not staging(), no step runs. ERRORS those of the memory
  absl::Status Regroup(int32_t rank, Transport* transport, const Placement& placement);

  // Takes the checksum of an expert's block as it is in memory now, a part in every call; true when
  // it is done. REQUIRES reading->block is that of an expert. ERRORS those of the memory
  absl::StatusOr<bool> Advance(BlockMemory::Reading* reading) const;
  // The checksum it had when it was packed; 0: not known.
  uint64_t SealedChecksum(int32_t layer, int32_t expert) const;

  int32_t rank() const { return options_.rank; }
  // Of the experts that this rank holds.
  size_t resident_bytes() const;
  // All that it has allocated for parameters and their transfers, whatever is under way:
  //   (resident_blocks + staging_blocks) * block_bytes, each block in whole cache lines,
  //   + a chunk and its header, both ways, for every other rank
  // in the host's memory; blocks of a device are as DeviceBlocks says.
  // After a regrouping with the larger counts that it brought, and with a block more once a read
  // was given up on the way.
  size_t memory_bytes() const;
  int64_t bytes_received() const { return bytes_received_; }
  int64_t copies_received() const { return copies_received_; }
  int64_t copies_read() const { return copies_read_; }  // from the checkpoint, by plans

 private:
  static constexpr BlockMemory::Ticket kNothing = -1;
  static constexpr int32_t kNoBlock = -1;
  // From the checkpoint: a room is waited for, then it belongs to the reader, then what is in it
  // goes into the block where it is not there yet.
  enum class Read : uint8_t { kNone, kWaits, kReads, kFills };
  struct Staged {
    int32_t layer, expert, block;
    Read read = Read::kNone;
    int64_t read_id = 0;
    std::span<std::byte> room = {};            // of kReads and kFills
    BlockMemory::Ticket under_way = kNothing;  // of kFills: the piece after `arrived`
    size_t arrived = 0;                        // bytes of it that may be sent on
    uint64_t checksum = 0;                     // of what has arrived, once that is all
    uint64_t sealed = 0;                       // it was packed with, as the source says
  };
  // A read under way whose plan was given up.
  struct Lent {
    int64_t read_id;
    std::span<std::byte> room;
    int32_t block;  // that the room is, or kNoBlock
  };
  struct ChunkHeader;
  struct Flow;  // chunks to or from one peer

  size_t At(int32_t layer, int32_t expert) const {
    return static_cast<size_t>(layer) * options_.num_experts + expert;
  }
  absl::Status AddBlocks(int32_t count);
  void MakeFlows();
  std::unique_ptr<Flow> MakeFlow(int peer) const;
  int32_t TakeBlock();
  absl::Status AdvanceSend(Flow* flow, int64_t* budget);
  absl::Status AdvanceReceive(Flow* flow, int64_t* budget);
  absl::Status PostChunk(Flow* flow, int64_t* budget);
  absl::Status TakeChunk(Flow* flow, size_t received);
  absl::Status EndChunk(const Flow& flow);
  void NextChunk(Flow* flow);
  size_t ChunkBytes(const Flow& flow) const;
  int32_t BlockToSend(const Flow& flow) const;
  absl::Status CheckStaged(const Staged& staged, const std::string& source) const;
  void StartReads();
  absl::Status TakeReads();
  absl::Status TakeRead(const ExpertReader::Done& done);
  void EndLent(const ExpertReader::Done& done);
  absl::Status AdvanceFills(int64_t* budget);
  absl::Status AdvanceFill(Staged* staged, int64_t* budget);
  void GiveUpReads();
  bool Idle() const;  // nothing of plan_ is under way

  Options options_;
  size_t chunk_bytes_;  // of one chunk
  Transport* transport_;
  const std::unique_ptr<BlockMemory> memory_;
  std::vector<int32_t> free_blocks_;       // lowest last
  std::vector<int32_t> block_of_expert_;   // [num_layers * num_experts], -1: not here
  std::vector<uint64_t> sealed_checksum_;  // [num_layers * num_experts]
  std::optional<MigrationPlan> plan_;
  std::vector<Staged> staged_;                           // experts coming in, in plan order
  std::vector<std::unique_ptr<Flow>> sends_, receives_;  // per peer
  size_t first_flow_ = 0;                                // whose turn it is to be polled first
  std::unique_ptr<ExpertReader> reader_;
  int64_t last_read_id_ = 0;
  std::vector<Lent> lent_;
  int32_t spare_blocks_ = 0;  // that stand in for blocks of lent_
  bool draining_ = false;
  bool failed_ = false;  // some of plan_ has arrived wrong: it can only be discarded
  int64_t bytes_received_ = 0;
  int64_t copies_received_ = 0;
  int64_t copies_read_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_EXPERT_STORE_H_
