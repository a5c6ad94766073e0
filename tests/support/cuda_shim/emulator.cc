#include "tests/support/cuda_shim/emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "tests/support/cuda_shim/cuda_runtime.h"
#include "tests/support/cuda_shim/emulator_state.h"
#include "tests/support/cuda_shim/stream.h"

namespace cuda_shim {
namespace {

constexpr uint64_t kSwitchNs = 20;
constexpr uint32_t kLongNap = 64;  // turns of a thread

class Emulator {
 public:
  void Reseed(uint64_t seed) {
    random_ = ballast::Random(seed);
    style_ = static_cast<Style>(seed % kNumStyles);
  }
  uint64_t Noise() { return random_.Next(); }

  CUstream_st* StreamOf(CUstream_st* stream) { return stream == nullptr ? &default_ : stream; }
  void Add(CUstream_st* stream) { streams_.push_back(stream); }
  void Remove(CUstream_st* stream) { std::erase(streams_, stream); }
  void Push(CUstream_st* stream, Work work) {
    CUstream_st* to = StreamOf(stream);
    (to->captured != nullptr ? to->captured->work : to->work).push_back(std::move(work));
  }
  bool Idle(CUstream_st* stream) {
    return StreamOf(stream)->work.empty() && StreamOf(stream)->grid == nullptr;
  }
  bool AllIdle() {
    return std::all_of(streams_.begin(), streams_.end(), [&](auto* s) { return Idle(s); });
  }

  // 0 turns: as many as it takes, or until all waits for something outside.
  bool Run(CUstream_st* stream, bool all, unsigned most_turns) {
    const auto done = [&] { return all ? AllIdle() : Idle(stream); };
    for (unsigned turn = 0; failure_.empty() && !done() && (most_turns == 0 || turn < most_turns);
         ++turn) {
      if (turn % 1024 == 0) FeedStarved();  // whoever spins may wait for them
      if (ready_.empty() || turn % 32 == 0) {
        const bool began = BeginWork();
        if (ready_.empty()) FeedStarved();
        if (ready_.empty() && later_.empty() && !began && !done()) {
          if (WaitsOutside()) break;
          FailStuck();
        }
      }
      if (!later_.empty() && failure_.empty() && MayDoLater()) DoLater();
      if (!ready_.empty() && failure_.empty()) Step();
    }
    if (!failure_.empty()) DropAll();
    return failure_.empty();
  }

  // ---- on a fiber -----------------------------------------------------------------------------
  Thread* current() { return current_; }
  uint64_t now() const { return now_ns_; }

  void Yield() {
    MakeReady(current_);
    current_->fiber.Suspend();
  }
  void Wait(const char* what) {
    current_->waits_for = what;
    current_->fiber.Suspend();
  }
  void Wake(Thread* thread) {
    thread->waits_for = nullptr;
    MakeReady(thread);
  }

  void AddLater(std::function<void()> work) {
    later_.push_back({current_->block, std::move(work)});
    ++current_->block->under_way;
  }
  void Sleep(const void* key, const char* what) {
    current_->sleeps_on = key;
    sleepers_.push_back(current_);
    Wait(what);
  }
  void WakeSleepers(const void* key) {
    std::erase_if(sleepers_, [&](Thread* thread) {
      if (thread->sleeps_on != key) return false;
      Wake(thread);
      return true;
    });
  }

  uint64_t Meet(const WarpOp& op, uint32_t mask, uint64_t value, uint64_t argument) {
    Thread* me = current_;
    const unsigned lane = me->number % 32;
    if ((mask >> lane & 1) == 0) FailHere(std::string(op.name) + " by a lane outside its mask");
    me->value = value;
    me->argument = argument;
    std::vector<Meeting>& meetings = me->block->meetings[me->number / 32];
    auto it = std::find_if(meetings.begin(), meetings.end(),
                           [&](const Meeting& m) { return (m.mask & mask) != 0; });
    if (it == meetings.end()) it = meetings.insert(it, {&op, mask, 0});
    if (it->mask != mask || std::strcmp(it->op->name, op.name) != 0) {
      FailHere(std::string(op.name) + " meets " + it->op->name + " of other lanes of its mask");
    }
    it->arrived |= 1u << lane;
    if (it->arrived != mask) {
      Wait(op.name);
      return me->result;
    }
    meetings.erase(it);
    uint64_t values[32] = {}, arguments[32] = {}, results[32] = {};
    const auto of_lane = [&](unsigned i) {
      return me->block->threads[me->number / 32 * 32 + i].get();
    };
    for (unsigned i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      values[i] = of_lane(i)->value;
      arguments[i] = of_lane(i)->argument;
    }
    op.combine(mask, values, arguments, results);
    const bool orders_memory = &op == &kSyncWarp;
    for (unsigned i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      of_lane(i)->result = results[i];
      if (orders_memory) Append(&of_lane(i)->late, &me->block->late);
      if (i != lane) Wake(of_lane(i));
    }
    Yield();
    return me->result;
  }

  bool AtBarrier(bool any) {
    Thread* me = current_;
    Block* block = me->block;
    Append(&me->late, &block->late);
    block->any |= any;
    if (++block->at_barrier < block->alive) {
      Wait("__syncthreads");
    } else {
      OpenBarrier(block);
      Yield();
    }
    return me->result != 0;
  }

  void Store(void* to, const void* from, size_t bytes) {
    LateStore store{to, {}, bytes};
    std::memcpy(store.bytes, from, bytes);
    current_->late.push_back(store);
    if (random_.Below(8) == 0) Apply(&current_->late);
  }
  void MakeSeen() {
    // What comes before a fence may be long done when the fence is.
    for (uint32_t i = random_.Below(2) == 0 ? random_.Below(kLongNap) : 0; i > 0; --i) {
      if (ready_.empty()) break;
      Yield();
    }
    Apply(&current_->late);
    Apply(&current_->block->late);
    Yield();
  }

  [[noreturn]] void FailHere(const std::string& why) {
    const Block* block = current_->block;
    failure_ = why + " in block " + std::to_string(block->index.x) + ", thread " +
               std::to_string(current_->number);
    current_->fiber.Finish();
  }

  void Finish() {
    Block* block = current_->block;
    Append(&current_->late, &block->late);
    --block->alive;
    if (block->alive > 0 && block->at_barrier == block->alive) OpenBarrier(block);
    current_->fiber.Finish();
  }

  std::string failure_;

 private:
  // Whom a schedule prefers. kStarving leaves one thread of each grid far behind all others.
  enum Style { kAny, kNewestFirst, kOldestFirst, kStarving, kNumStyles };

  void MakeReady(Thread* thread) { (thread->starved ? starved_ : ready_).push_back(thread); }

  void OpenBarrier(Block* block) {
    block->at_barrier = 0;
    const bool any = std::exchange(block->any, false);
    for (auto& thread : block->threads) {
      thread->result = any;
      if (thread->waits_for != nullptr && std::strcmp(thread->waits_for, "__syncthreads") == 0) {
        Wake(thread.get());
      }
    }
  }

  void FeedStarved() {
    if (starved_.empty()) return;
    std::swap(starved_[random_.Below(static_cast<uint32_t>(starved_.size()))], starved_.back());
    ready_.push_back(starved_.back());
    starved_.pop_back();
  }

  // Some schedules let threads run as far as they can first.
  bool MayDoLater() {
    return ready_.empty() || (style_ != kStarving && random_.Below(style_ == kAny ? 2 : 32) == 0);
  }
  void DoLater() {
    std::swap(later_[random_.Below(static_cast<uint32_t>(later_.size()))], later_.back());
    const Asynchronous now = std::move(later_.back());
    later_.pop_back();
    --now.block->under_way;
    now.work();
  }

  size_t Choose() {
    const uint32_t n = static_cast<uint32_t>(ready_.size());
    if (style_ == kNewestFirst && random_.Below(8) > 0) return n - 1;
    if (style_ == kOldestFirst && random_.Below(8) > 0) return 0;
    return random_.Below(n);
  }

  void Step() {
    const size_t i = Choose();
    Thread* thread = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    now_ns_ += kSwitchNs;
    current_ = thread;
    Block* block = thread->block;
    ::threadIdx = thread->index;
    ::blockIdx = block->index;
    const Launch& launch = block->grid->launch;
    ::blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
    ::gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
    thread->fiber.Resume();
    if (failure_.empty() && block->alive == 0) EndBlock(block);
  }

  // Does what streams have at their head. Returns whether there was anything.
  bool BeginWork() {
    bool any = false;
    const size_t first = random_.Below(static_cast<uint32_t>(streams_.size()));
    for (size_t i = 0; i < streams_.size(); ++i) {
      any |= BeginWorkOf(streams_[(first + i) % streams_.size()]);
    }
    return any;
  }

  bool BeginWorkOf(CUstream_st* stream) {
    if (stream->grid != nullptr) return StartBlocks(stream->grid.get());
    if (stream->work.empty()) return false;
    Work& work = stream->work.front();
    if (work.ready != nullptr && !work.ready()) return false;
    const Work now = std::move(work);
    stream->work.pop_front();
    if (now.kind == Work::Kind::kHost) now.host();
    if (now.kind == Work::Kind::kKernel) {
      stream->grid = std::make_unique<Grid>();
      stream->grid->launch = now.launch;
      std::vector<unsigned>& order = stream->grid->to_start;
      for (unsigned b = 0; b < now.launch.grid.count(); ++b) order.push_back(b);
      for (size_t b = order.size(); b > 1; --b) {
        std::swap(order[b - 1], order[random_.Below(static_cast<uint32_t>(b))]);
      }
      if (style_ == kStarving) {
        // Often a first one: those speak for their blocks.
        stream->grid->victim_block = random_.Below(now.launch.grid.count());
        stream->grid->victim_thread =
            random_.Below(2) == 0 ? 0 : random_.Below(now.launch.block.count());
      }
      StartBlocks(stream->grid.get());
    }
    return true;
  }

  bool StartBlocks(Grid* grid) {
    bool any = false;
    while (!grid->to_start.empty() && resident_ + grid->launch.block.count() <= kMostResident) {
      StartBlock(grid, grid->to_start.back());
      grid->to_start.pop_back();
      any = true;
    }
    return any;
  }

  void StartBlock(Grid* grid, unsigned number) {
    auto block = std::make_unique<Block>(grid, number, Noise());
    const Shape& shape = grid->launch.block;
    block->alive = shape.count();
    block->meetings.resize((shape.count() + 31) / 32);
    for (unsigned t = 0; t < shape.count(); ++t) {
      std::unique_ptr<Thread> thread;
      if (spare_.empty()) {
        thread = std::make_unique<Thread>();
      } else {
        thread = std::move(spare_.back());
        spare_.pop_back();
      }
      thread->block = block.get();
      thread->number = t;
      thread->index = {t % shape.x, t / shape.x % shape.y, t / (shape.x * shape.y)};
      thread->waits_for = nullptr;
      thread->late.clear();
      thread->fiber.Start([](void* emulator) { static_cast<Emulator*>(emulator)->RunThread(); },
                          this);
      thread->starved = number == grid->victim_block && t == grid->victim_thread;
      MakeReady(thread.get());
      block->threads.push_back(std::move(thread));
    }
    resident_ += shape.count();
    ++grid->running;
    blocks_.push_back(std::move(block));
  }

  void RunThread() {
    current_->block->grid->launch.body();
    Finish();
  }

  void EndBlock(Block* block) {
    Grid* grid = block->grid;
    if (!block->shared.IntactGuards()) failure_ = "a write outside of shared memory";
    if (block->under_way > 0) failure_ = "a block ended before its asynchronous work";
    Append(&block->late, &grid->late);
    resident_ -= grid->launch.block.count();
    for (auto& thread : block->threads) spare_.push_back(std::move(thread));
    std::erase_if(blocks_, [&](const auto& b) { return b.get() == block; });
    if (--grid->running > 0 || !grid->to_start.empty()) {
      StartBlocks(grid);
      return;
    }
    Apply(&grid->late);
    for (CUstream_st* stream : streams_) {
      if (stream->grid.get() == grid) stream->grid = nullptr;
    }
  }

  bool WaitsOutside() {
    return std::any_of(streams_.begin(), streams_.end(), [](const CUstream_st* s) {
      return s->grid == nullptr && !s->work.empty() &&
             s->work.front().kind == Work::Kind::kWaitOutside;
    });
  }

  void FailStuck() {
    failure_ = "nothing can go on:";
    int named = 0;
    for (const auto& block : blocks_) {
      for (const auto& thread : block->threads) {
        if (thread->waits_for == nullptr || ++named > 8) continue;
        failure_ += " block " + std::to_string(block->index.x) + " thread " +
                    std::to_string(thread->number) + " in " + thread->waits_for + ";";
      }
    }
    if (named == 0) failure_ += " a stream waits for an event that nobody records";
  }

  // After a failure: what was running is forgotten where it stands.
  void DropAll() {
    std::fprintf(stderr, "cuda_shim: %s\n", failure_.c_str());
    ready_.clear();
    starved_.clear();
    sleepers_.clear();
    later_.clear();
    for (auto& block : blocks_) {
      for (auto& thread : block->threads) spare_.push_back(std::move(thread));
    }
    blocks_.clear();
    resident_ = 0;
    for (CUstream_st* stream : streams_) {
      stream->work.clear();
      stream->grid = nullptr;
    }
  }

  ballast::Random random_{1};
  Style style_ = kAny;
  uint64_t now_ns_ = 0;
  CUstream_st default_;
  std::vector<CUstream_st*> streams_ = {&default_};
  std::vector<std::unique_ptr<Block>> blocks_;  // resident
  std::vector<std::unique_ptr<Thread>> spare_;  // fibers to be used again
  std::vector<Thread*> ready_, starved_, sleepers_;
  std::vector<Asynchronous> later_;
  Thread* current_ = nullptr;
  unsigned resident_ = 0;  // threads of those blocks
};

Emulator& TheEmulator() {
  static Emulator emulator;
  return emulator;
}

}  // namespace

uint64_t InWarp(const WarpOp& op, uint32_t mask, uint64_t value, uint64_t argument) {
  return TheEmulator().Meet(op, mask, value, argument);
}
void Barrier() {
  TheEmulator().AtBarrier(false);
}
bool BarrierOr(bool any) {
  return TheEmulator().AtBarrier(any);
}
void Yield() {
  TheEmulator().Yield();
}
void Fence() {
  TheEmulator().MakeSeen();
}
std::byte* SharedMemory() {
  return TheEmulator().current()->block->shared.data();
}
size_t SharedBytes() {
  return TheEmulator().current()->block->shared.size();
}
uint64_t Nanoseconds() {
  return TheEmulator().now();
}
void StoreLate(void* to, const void* from, size_t bytes) {
  TheEmulator().Store(to, from, bytes);
}
void Trap(const char* why) {
  TheEmulator().FailHere(why);
}

void Enqueue(CUstream_st* stream, Launch launch) {
  TheEmulator().Push(stream, {Work::Kind::kKernel, std::move(launch), {}, {}});
}
void Enqueue(CUstream_st* stream, std::function<void()> host_work) {
  TheEmulator().Push(stream, {Work::Kind::kHost, {}, std::move(host_work), {}});
}
void EnqueueWait(CUstream_st* stream, std::function<bool()> ready) {
  TheEmulator().Push(stream, {Work::Kind::kWait, {}, {}, std::move(ready)});
}
void EnqueueWaitOutside(CUstream_st* stream, std::function<bool()> ready) {
  TheEmulator().Push(stream, {Work::Kind::kWaitOutside, {}, {}, std::move(ready)});
}
bool IsIdle(CUstream_st* stream, bool all) {
  return all ? TheEmulator().AllIdle() : TheEmulator().Idle(stream);
}
bool RunUntilIdle(CUstream_st* stream, bool all) {
  return TheEmulator().Run(stream, all, /*most_turns=*/0);
}
CUstream_st* MakeStream() {
  auto* const stream = new CUstream_st;
  TheEmulator().Add(stream);
  return stream;
}
void FreeStream(CUstream_st* stream) {
  TheEmulator().Remove(stream);
  delete stream;
}
void RunAWhile() {
  constexpr uint64_t kMostDoublings = 12;
  const unsigned turns = 1u << (TheEmulator().Noise() % (kMostDoublings + 1));
  static_cast<void>(TheEmulator().Run(nullptr, true, turns));
}
const char* LastFailure() {
  return TheEmulator().failure_.c_str();
}
uint64_t Noise() {
  return TheEmulator().Noise();
}
void Later(std::function<void()> work) {
  TheEmulator().AddLater(std::move(work));
}
void Sleep(const void* key, const char* what) {
  TheEmulator().Sleep(key, what);
}
void WakeSleepers(const void* key) {
  TheEmulator().WakeSleepers(key);
}
std::shared_ptr<void>& BlockState() {
  return TheEmulator().current()->block->state;
}
void Reseed(uint64_t seed) {
  TheEmulator().failure_.clear();
  TheEmulator().Reseed(seed);
}

}  // namespace cuda_shim

CUstream_st::~CUstream_st() = default;
