#include "comm/peer_memory.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <map>
#include <mutex>

#include "base/status.h"
#include "tests/support/run_ranks.h"

namespace ballast {
namespace {

// Memory of one machine: what all ranks have lent and opened. What may not be is written down.
class Machine {
 public:
  struct Block {
    std::unique_ptr<std::vector<std::byte>> bytes;
    int owner = 0, opened = 0;
    bool freed = false;
  };
  enum class Step { kNone, kAllocate, kExport, kOpen };
  Step fails = Step::kNone;  // at rank 1
  std::mutex mutex;
  std::vector<Block> blocks;
  std::vector<std::string> wrongs;
};

class FakeMemory : public SharedDeviceMemory {
 public:
  FakeMemory(Machine* machine, int rank) : machine_(machine), rank_(rank) {}

  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    if (Fails(Machine::Step::kAllocate)) return absl::ResourceExhaustedError("no memory left");
    const std::lock_guard lock(machine_->mutex);
    machine_->blocks.push_back({std::make_unique<std::vector<std::byte>>(bytes), rank_});
    return machine_->blocks.back().bytes->data();
  }
  absl::Status Free(std::byte* block) override {
    const std::lock_guard lock(machine_->mutex);
    Machine::Block& b = Find(block);
    if (b.owner != rank_ || b.freed) Wrong("frees what is not its own");
    if (b.opened != 0) Wrong("frees what others have open");
    b.freed = true;
    return absl::OkStatus();
  }
  absl::StatusOr<MemoryHandle> Export(std::byte* block) override {
    if (Fails(Machine::Step::kExport)) return absl::UnavailableError("no handles here");
    const std::lock_guard lock(machine_->mutex);
    MemoryHandle handle = {};
    const size_t number = static_cast<size_t>(&Find(block) - machine_->blocks.data());
    std::memcpy(handle.data(), &number, sizeof number);
    return handle;
  }
  absl::StatusOr<std::byte*> Open(const MemoryHandle& handle) override {
    if (Fails(Machine::Step::kOpen)) return absl::UnavailableError("out of reach");
    const std::lock_guard lock(machine_->mutex);
    size_t number = 0;
    std::memcpy(&number, handle.data(), sizeof number);
    Machine::Block& b = machine_->blocks.at(number);
    if (b.owner == rank_) Wrong("opens its own block");
    ++b.opened;
    return b.bytes->data();
  }
  absl::Status Close(std::byte* opened) override {
    const std::lock_guard lock(machine_->mutex);
    --Find(opened).opened;
    return absl::OkStatus();
  }

 private:
  bool Fails(Machine::Step step) const { return rank_ == 1 && machine_->fails == step; }
  void Wrong(const char* what) {
    machine_->wrongs.push_back(absl::StrCat("rank ", rank_, " ", what));
  }
  Machine::Block& Find(const std::byte* at) {
    for (Machine::Block& b : machine_->blocks) {
      if (b.bytes->data() == at) return b;
    }
    std::abort();
  }

  Machine* machine_;
  int rank_;
};

// Everything that was lent is closed and freed, in an order that is allowed.
void RequireClean(const Machine& machine) {
  CHECK(machine.wrongs == std::vector<std::string>());
  for (const Machine::Block& block : machine.blocks) {
    CHECK(block.opened == 0);
    CHECK(block.freed);
  }
}

TEST_CASE("every rank addresses the blocks of all", "[comm][peers]") {
  for (const int ranks : {1, 2, 5}) {
    Machine machine;
    const auto statuses =
        testing::RunRanks(ranks, [&](Transport*, Communicator* world, int rank) -> absl::Status {
          BALLAST_ASSIGN_OR_RETURN(
              const auto peers,
              PeerMemory::Create(std::make_unique<FakeMemory>(&machine, rank), world, 7, 256));
          for (int r = 0; r < ranks; ++r) {
            peers->blocks()[r][rank] = static_cast<std::byte>(10 * rank + r);
          }
          int32_t done = 1;
          std::vector<int32_t> all(ranks);
          BALLAST_RETURN_IF_ERROR(world->AllGather(7, std::as_bytes(std::span(&done, 1)),
                                                   std::as_writable_bytes(std::span(all))));
          for (int r = 0; r < ranks; ++r) {
            if (peers->blocks()[rank][r] != static_cast<std::byte>(10 * r + rank)) {
              return absl::InternalError("another rank's byte is not here");
            }
          }
          return peers->Close(world, 7);
        });
    REQUIRE(testing::FirstError(statuses) == "");
    REQUIRE(machine.blocks.size() == static_cast<size_t>(ranks));
    RequireClean(machine);
  }
}

TEST_CASE("where one rank fails all are told and nothing stays lent", "[comm][peers][errors]") {
  const std::pair<Machine::Step, const char*> cases[] = {
      {Machine::Step::kAllocate, "rank 1: no memory left"},
      {Machine::Step::kExport, "rank 1: no handles here"},
      {Machine::Step::kOpen, "rank 1: the device memory of rank 0: out of reach"}};
  for (const auto& [step, message] : cases) {
    Machine machine;
    machine.fails = step;
    const auto statuses =
        testing::RunRanks(3, [&](Transport*, Communicator* world, int rank) -> absl::Status {
          return PeerMemory::Create(std::make_unique<FakeMemory>(&machine, rank), world, 7, 256)
              .status();
        });
    for (const absl::Status& status : statuses) {
      REQUIRE(std::string(status.message()) == message);
    }
    RequireClean(machine);
  }
}

}  // namespace
}  // namespace ballast
