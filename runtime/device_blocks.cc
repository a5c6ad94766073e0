#include "runtime/device_blocks.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "kernels/block_checksum.h"

namespace ballast {
namespace {

constexpr int32_t kMostUnderWay = 64;  // tickets
constexpr size_t kTryBytes = 16;       // of a copy that is made to see that it can be

}  // namespace

// ---- making and growing -----------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<DeviceBlocks>> DeviceBlocks::Create(const Options& options) {
  BALLAST_CHECK(options.num_blocks > 0 && options.rooms > 0);
  BALLAST_ASSIGN_OR_RETURN(auto side, cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kLow));
  std::unique_ptr<DeviceBlocks> blocks(new DeviceBlocks(options, std::move(side)));
  BALLAST_RETURN_IF_ERROR(blocks->Make());
  BALLAST_RETURN_IF_ERROR(blocks->TryAll());
  return blocks;
}

DeviceBlocks::DeviceBlocks(const Options& options, cuda::OwnedStream side)
    : BlockMemory(options.block_bytes),
      options_(options),
      side_(std::move(side)),
      own_arena_(&cuda::DeviceMemory()),
      sums_(&cuda::DeviceMemory()),
      told_(&cuda::PinnedMemory()),
      empty_sum_(&cuda::PinnedMemory()),
      scratch_(&cuda::DeviceMemory()),
      rooms_(&cuda::PinnedMemory()) {}

DeviceBlocks::~DeviceBlocks() {
  Wait().IgnoreError();  // copies may still come from and go to what is freed now
}

absl::Status DeviceBlocks::Make() {
  const std::span<std::byte> arena = options_.arena;
  if (arena.empty()) {
    BALLAST_RETURN_IF_ERROR(AddBlocks(options_.num_blocks));
  } else {
    arena_ = arena.data();
    capacity_ = static_cast<int32_t>(arena.size() / stride());
    if (capacity_ < options_.num_blocks || reinterpret_cast<uintptr_t>(arena_) % kAlignment != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "an arena of ", arena.size(), " bytes at ",
          reinterpret_cast<uintptr_t>(arena_) % kAlignment, " beside a multiple of ", kAlignment,
          " does not hold ", options_.num_blocks, " blocks of ", stride(), " bytes"));
    }
    num_blocks_ = options_.num_blocks;
    const size_t words = 2 * static_cast<size_t>(capacity_);
    BALLAST_RETURN_IF_ERROR(sums_.EnsureSize(words * sizeof(uint64_t)));
    BALLAST_RETURN_IF_ERROR(told_.EnsureSize(words * sizeof(uint64_t)));
  }
  BALLAST_RETURN_IF_ERROR(empty_sum_.EnsureSize(sizeof(uint64_t)));
  *empty_sum_.as<uint64_t>() = block_bytes();
  BALLAST_RETURN_IF_ERROR(scratch_.EnsureSize(kTryBytes));
  BALLAST_RETURN_IF_ERROR(rooms_.EnsureSize((options_.rooms + size_t{1}) * stride()));
  for (int32_t room = options_.rooms - 1; room >= 0; --room) free_rooms_.push_back(room);
  for (int32_t i = 0; i < kMostUnderWay; ++i) {
    BALLAST_ASSIGN_OR_RETURN(auto mark, cuda::Event::Create());
    marks_.push_back(std::move(mark));
  }
  return absl::OkStatus();
}

// A kernel is loaded, and a way of copying prepared, when it is used first, which may wait for
// everything on the device: so before there is anything.
absl::Status DeviceBlocks::TryAll() {
  BALLAST_RETURN_IF_ERROR(Fill(0).status());
  const std::span<std::byte> room = FillRoom(0);
  BALLAST_RETURN_IF_ERROR(Read(0, 0, room.first(std::min(kTryBytes, room.size()))).status());
  Reading reading{.block = 0};
  BALLAST_RETURN_IF_ERROR(Advance(&reading).status());
  return Wait();
}

size_t DeviceBlocks::memory_bytes() const {
  return static_cast<size_t>(capacity_) * stride() + sums_.size();
}

absl::Status DeviceBlocks::AddBlocks(int32_t count) {
  const int32_t wanted = num_blocks_ + count;
  if (wanted > capacity_) {
    BALLAST_RETURN_IF_ERROR(Wait());
    const size_t bytes = static_cast<size_t>(wanted) * stride();
    Buffer arena(&cuda::DeviceMemory()), sums(&cuda::DeviceMemory()), told(&cuda::PinnedMemory());
    BALLAST_RETURN_IF_ERROR(arena.EnsureSize(bytes));
    BALLAST_RETURN_IF_ERROR(sums.EnsureSize(2 * sizeof(uint64_t) * static_cast<size_t>(wanted)));
    BALLAST_RETURN_IF_ERROR(told.EnsureSize(2 * sizeof(uint64_t) * static_cast<size_t>(wanted)));
    const size_t old_bytes = static_cast<size_t>(num_blocks_) * stride();
    if (old_bytes > 0) {
      BALLAST_RETURN_IF_ERROR(cuda::Copy(arena.data(), arena_, old_bytes, side_.get()));
      BALLAST_RETURN_IF_ERROR(cuda::Wait(side_.get()));
    }
    own_arena_ = std::move(arena);
    sums_ = std::move(sums);
    told_ = std::move(told);
    arena_ = own_arena_.data();
    capacity_ = wanted;
    ForgetPeers();
  }
  num_blocks_ = wanted;
  return absl::OkStatus();
}

absl::Status DeviceBlocks::SetPeers(std::vector<const std::byte*> arenas) {
  for (const std::byte* arena : arenas) {
    if (arena == nullptr) continue;
    BALLAST_RETURN_IF_ERROR(
        cuda::Copy(scratch_.data(), arena, std::min(kTryBytes, stride()), side_.get()));
  }
  BALLAST_RETURN_IF_ERROR(Wait());
  peers_ = std::move(arenas);
  return absl::OkStatus();
}

// ---- rooms ------------------------------------------------------------------------------------

std::span<std::byte> DeviceBlocks::Room(int32_t room) const {
  return {rooms_.data() + static_cast<size_t>(room) * stride(), block_bytes()};
}

std::span<std::byte> DeviceBlocks::FillRoom(int32_t) {
  return Room(options_.rooms);
}

absl::StatusOr<uint64_t> DeviceBlocks::Fill(int32_t block) {
  BALLAST_RETURN_IF_ERROR(Wait());
  BALLAST_RETURN_IF_ERROR(Write(block, 0, FillRoom(block)).status());
  BALLAST_RETURN_IF_ERROR(Wait());
  return Written(block);
}

std::span<std::byte> DeviceBlocks::TakeRoom(int32_t) {
  if (free_rooms_.empty()) return {};
  const int32_t room = free_rooms_.back();
  free_rooms_.pop_back();
  return Room(room);
}

void DeviceBlocks::ReturnRoom(std::span<std::byte> room) {
  free_rooms_.push_back(static_cast<int32_t>((room.data() - rooms_.data()) / stride()));
}

// ---- what goes over the side stream -----------------------------------------------------------

// Tickets end in their order, as the stream does.
absl::StatusOr<BlockMemory::Ticket> DeviceBlocks::Mark() {
  BALLAST_RETURN_IF_ERROR(marks_[started_ % kMostUnderWay].Record(side_.get()));
  return ++started_;
}

absl::Status DeviceBlocks::LookAround() {
  while (ended_ < started_) {
    BALLAST_ASSIGN_OR_RETURN(const bool done, marks_[ended_ % kMostUnderWay].IsDone());
    if (!done) break;
    ++ended_;
  }
  return absl::OkStatus();
}

bool DeviceBlocks::IsFull() {
  LookAround().IgnoreError();  // IsDone tells it
  return started_ - ended_ >= kMostUnderWay;
}

absl::StatusOr<bool> DeviceBlocks::IsDone(Ticket ticket) {
  if (ticket > ended_) BALLAST_RETURN_IF_ERROR(LookAround());
  return ticket <= ended_;
}

absl::Status DeviceBlocks::Wait() {
  BALLAST_RETURN_IF_ERROR(cuda::Wait(side_.get()));
  ended_ = started_;
  return absl::OkStatus();
}

// Of the whole block as it lies there, when all before this is done.
absl::Status DeviceBlocks::TakeSum(int32_t block, int32_t word) {
  uint64_t* const sum = sums_.as<uint64_t>() + word;
  BALLAST_RETURN_IF_ERROR(cuda::Copy(sum, empty_sum_.data(), sizeof *sum, side_.get()));
  BlockChecksumArgs args{.num_pieces = 1, .num_thread_blocks = options_.checksum_thread_blocks};
  args.pieces[0] = {.at = Address(block), .bytes = block_bytes(), .offset = 0, .sum = sum};
  BALLAST_RETURN_IF_ERROR(cuda::AddBlockChecksums(args, side_.get()));
  return cuda::Copy(told_.as<uint64_t>() + word, sum, sizeof *sum, side_.get());
}

absl::StatusOr<BlockMemory::Ticket> DeviceBlocks::Read(int32_t block, size_t offset,
                                                       std::span<std::byte> to) {
  BALLAST_RETURN_IF_ERROR(cuda::Copy(to.data(), Address(block) + offset, to.size(), side_.get()));
  return Mark();
}

absl::StatusOr<BlockMemory::Ticket> DeviceBlocks::BringIn(int32_t block, size_t offset,
                                                          const std::byte* from, size_t bytes) {
  BALLAST_RETURN_IF_ERROR(cuda::Copy(Address(block) + offset, from, bytes, side_.get()));
  if (offset + bytes == block_bytes()) BALLAST_RETURN_IF_ERROR(TakeSum(block, block));
  return Mark();
}

absl::StatusOr<BlockMemory::Ticket> DeviceBlocks::Write(int32_t block, size_t offset,
                                                        std::span<const std::byte> from) {
  return BringIn(block, offset, from.data(), from.size());
}

absl::StatusOr<BlockMemory::Ticket> DeviceBlocks::Fetch(int32_t block, size_t offset, size_t bytes,
                                                        PeerBlock from) {
  const bool known = static_cast<size_t>(from.peer) < peers_.size() && from.block >= 0;
  if (!known || peers_[from.peer] == nullptr) {
    return absl::InternalError(absl::StrCat("told to fetch from block ", from.block, " of rank ",
                                            from.peer, ", whose memory is not to be reached"));
  }
  const std::byte* const at = peers_[from.peer] + static_cast<size_t>(from.block) * stride();
  return BringIn(block, offset, at + offset, bytes);
}

bool DeviceBlocks::IsOpenTo(int peer) const {
  return static_cast<size_t>(peer) < peers_.size() && peers_[peer] != nullptr;
}

absl::StatusOr<bool> DeviceBlocks::Advance(Reading* reading) {
  const int32_t word = capacity_ + reading->block;
  if (reading->offset == 0) {
    BALLAST_RETURN_IF_ERROR(TakeSum(reading->block, word));
    BALLAST_ASSIGN_OR_RETURN(reading->ticket, Mark());
    reading->offset = block_bytes();
    return false;
  }
  BALLAST_ASSIGN_OR_RETURN(const bool done, IsDone(reading->ticket));
  if (done) reading->checksum = told_.as<uint64_t>()[word];
  return done;
}

}  // namespace ballast
