#include "tests/support/fake_nccl.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "tests/support/fake_nccl_machine.h"

namespace ballast::testing {

using fake_nccl::Clique;
using fake_nccl::Comm;
using fake_nccl::Event;
using fake_nccl::Op;
using fake_nccl::Part;
using fake_nccl::Result;
using fake_nccl::Stream;

namespace {

NcclComm Handle(Comm* comm) {
  return reinterpret_cast<NcclComm>(comm);
}

}  // namespace

struct FakeNccl::Impl : fake_nccl::FakeMachine {
  mutable std::mutex mutex;
  std::condition_variable released;
  bool release = false;
  int hanging = 0;  // shrinks
  std::vector<Faults> faults;
  std::vector<Seen> seen;
  std::vector<std::unique_ptr<NcclApi>> apis;
  int num_ids = 0;
};

// One process.
class FakeNccl::Api : public NcclApi {
 public:
  Api(Impl* world, int process) : world_(*world), process_(process) {}

  absl::StatusOr<int> Version() override { return 22809; }

  absl::StatusOr<GpuIdentity> CurrentDevice() override {
    BALLAST_RETURN_IF_ERROR(faults().device);
    return world_.gpus[static_cast<size_t>(process_)];
  }

  absl::StatusOr<NcclUniqueId> MakeUniqueId() override {
    const std::lock_guard lock(world_.mutex);
    BALLAST_RETURN_IF_ERROR(faults().unique_id);
    NcclUniqueId id;
    absl::StrCat("id ", ++world_.num_ids).copy(id.bytes.data(), id.bytes.size() - 1);
    return id;
  }

  absl::Status Init(const NcclUniqueId& id, int size, int rank, const NcclConfig& config,
                    NcclComm* comm) override {
    const std::lock_guard lock(world_.mutex);
    ++seen().inits;
    seen().max_ctas.push_back(config.max_ctas);
    if (faults().init != NcclResult::kSuccess) return Result(faults().init, "init", "planted");
    *comm = Handle(world_.Join(id.bytes.data(), size, rank, process_));
    return absl::OkStatus();
  }

  absl::StatusOr<bool> Settled(NcclComm handle) override {
    const std::lock_guard lock(world_.mutex);
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    int& lost_after = faults().lost_after_groups;
    if (lost_after >= 0 && seen().groups >= lost_after) {
      lost_after = -1;
      comm->error = NcclResult::kRemoteError;
      comm->error_text = "planted";
    }
    world_.Advance();
    if (comm->freed || comm->error != NcclResult::kSuccess) {
      return world_.CheckReady(comm, "in the background");
    }
    if (!comm->busy) return true;
    if (!comm->ready() || comm->polls-- > 0) return false;
    comm->busy = false;
    comm->finish();
    BALLAST_RETURN_IF_ERROR(world_.CheckReady(comm, "in the background"));
    return true;
  }

  absl::Status GroupStart() override {
    BALLAST_CHECK(!in_group_);
    in_group_ = true;
    group_ = std::make_shared<Op>();
    return absl::OkStatus();
  }

  absl::Status GroupEnd() override {
    const std::lock_guard lock(world_.mutex);
    BALLAST_CHECK(in_group_);
    in_group_ = false;
    if (group_->parts.empty()) return absl::OkStatus();
    ++seen().groups;
    world_.Begin(
        group_->comm, [] { return true; },
        [this, op = group_, stream = group_stream_] { world_.Put(stream, op); });
    return absl::OkStatus();
  }

  absl::Status Send(std::span<const std::byte> bytes, int peer, NcclComm comm,
                    GpuStream stream) override {
    return Add({true, peer, bytes.data(), nullptr, bytes.size()}, comm, stream);
  }
  absl::Status Recv(std::span<std::byte> bytes, int peer, NcclComm comm,
                    GpuStream stream) override {
    return Add({false, peer, nullptr, bytes.data(), bytes.size()}, comm, stream);
  }

  absl::Status Finalize(NcclComm handle) override {
    const std::lock_guard lock(world_.mutex);
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    BALLAST_RETURN_IF_ERROR(world_.CheckReady(comm, "finalize"));
    ++seen().finalizes;
    Clique* const clique = comm->clique;
    ++clique->num_finalized;
    world_.Begin(
        comm,
        [this, clique, comm] {
          return clique->num_finalized == clique->members.size() && !world_.Running(comm);
        },
        [comm] { comm->finalized = true; });
    return absl::OkStatus();
  }

  absl::Status Destroy(NcclComm handle) override {
    const std::lock_guard lock(world_.mutex);
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    BALLAST_RETURN_IF_ERROR(world_.CheckReady(comm, "destroy"));
    if (!comm->finalized) return Result(NcclResult::kInvalidUsage, "destroy", "not finalized");
    comm->freed = true;
    return absl::OkStatus();
  }

  absl::Status Abort(NcclComm handle) override {
    std::unique_lock lock(world_.mutex);
    ++seen().aborts;
    if (faults().abort_hangs) world_.released.wait(lock, [this] { return world_.release; });
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    if (comm->freed) return world_.CheckReady(comm, "abort");
    if (comm->shrinking) comm->finish();
    world_.Drop(comm);
    comm->freed = true;
    return absl::OkStatus();
  }

  absl::Status Shrink(NcclComm handle, std::span<const int32_t> excluded, bool abort,
                      const NcclConfig& config, NcclComm* child) override {
    std::unique_lock lock(world_.mutex);
    if (faults().shrink_hangs) {
      ++world_.hanging;
      world_.released.wait(lock, [this] { return world_.release; });
      --world_.hanging;
    }
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    ++(abort ? seen().shrinks_with_abort : seen().plain_shrinks);
    seen().max_ctas.push_back(config.max_ctas);
    if (faults().shrink != NcclResult::kSuccess)
      return Result(faults().shrink, "shrink", "planted");
    if (abort) world_.Drop(comm);
    BALLAST_RETURN_IF_ERROR(world_.CheckReady(comm, "shrink"));
    if (excluded.empty() || world_.Running(comm)) {
      return Result(NcclResult::kInvalidUsage, "shrink", "nobody to leave out, or still running");
    }
    std::string name =
        absl::StrCat(comm->clique->name, " shrunk ", ++comm->num_shrinks, abort, " without");
    int rank = comm->rank;
    for (const int32_t gone : excluded) {
      BALLAST_CHECK(gone != comm->rank);
      absl::StrAppend(&name, " ", gone);
      if (gone < comm->rank) --rank;
    }
    const size_t size = comm->clique->members.size() - excluded.size();
    Comm* const made = world_.Join(name, static_cast<int>(size), rank, process_);
    comm->shrinking = true;
    world_.Begin(
        comm, [made] { return made->ready(); },
        [comm, made, child] {
          comm->shrinking = false;
          *child = Handle(made);
        });
    return absl::OkStatus();
  }

  absl::Status Copy(std::span<std::byte> to, std::span<const std::byte> from,
                    GpuStream stream) override {
    const std::lock_guard lock(world_.mutex);
    BALLAST_CHECK(to.size() == from.size());
    ++seen().copies;
    auto op = std::make_shared<Op>();
    op->parts.push_back({false, 0, from.data(), to.data(), from.size()});
    world_.Put(stream, std::move(op));
    return absl::OkStatus();
  }

  absl::StatusOr<GpuEvent> MakeEvent() override {
    const std::lock_guard lock(world_.mutex);
    world_.events.push_back(std::make_unique<Event>());
    return reinterpret_cast<GpuEvent>(world_.events.back().get());
  }
  void FreeEvent(GpuEvent event) override {
    const std::lock_guard lock(world_.mutex);
    Event* const mine = reinterpret_cast<Event*>(event);
    if (mine->freed) ++world_.uses_after_free;
    mine->freed = true;
  }
  absl::Status Record(GpuEvent event, GpuStream stream) override {
    const std::lock_guard lock(world_.mutex);
    auto op = std::make_shared<Op>();
    op->event = reinterpret_cast<Event*>(event);
    ++op->event->pending;
    world_.Put(stream, std::move(op));
    return absl::OkStatus();
  }
  absl::StatusOr<bool> Happened(GpuEvent event) override {
    const std::lock_guard lock(world_.mutex);
    world_.Advance();
    return reinterpret_cast<Event*>(event)->pending == 0;
  }

 private:
  Faults& faults() { return world_.faults[static_cast<size_t>(process_)]; }
  Seen& seen() { return world_.seen[static_cast<size_t>(process_)]; }

  absl::Status Add(Part part, NcclComm handle, GpuStream stream) {
    const std::lock_guard lock(world_.mutex);
    Comm* const comm = reinterpret_cast<Comm*>(handle);
    BALLAST_RETURN_IF_ERROR(world_.CheckReady(comm, "send or receive"));
    BALLAST_CHECK(in_group_ && part.bytes > 0 && part.peer != comm->rank);
    BALLAST_CHECK(group_->comm == nullptr || group_->comm == comm);
    ++seen().messages;
    group_->comm = comm;
    group_stream_ = stream;
    group_->parts.push_back(part);
    return absl::OkStatus();
  }

  Impl& world_;
  int process_;
  bool in_group_ = false;
  std::shared_ptr<Op> group_;
  GpuStream group_stream_ = nullptr;
};

FakeNccl::FakeNccl(int num_ranks) : impl_(std::make_unique<Impl>()) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    impl_->faults.emplace_back();
    impl_->seen.emplace_back();
    impl_->gpus.push_back(
        {.host = "host", .pci_bus_id = absl::StrCat("0000:", 10 + rank, ":00.0")});
    impl_->gpus.back().uuid[0] = static_cast<uint8_t>(rank + 1);
    impl_->streams.push_back(std::make_unique<Stream>());
    Stream& own = *impl_->streams.back();
    own.handle = reinterpret_cast<GpuStream>(&own);
    impl_->apis.push_back(std::make_unique<Api>(impl_.get(), rank));
  }
}

FakeNccl::~FakeNccl() = default;

int FakeNccl::num_ranks() const {
  return static_cast<int>(impl_->apis.size());
}
void FakeNccl::set_polls_in_progress(int polls) {
  impl_->polls_in_progress = polls;
}
void FakeNccl::set_device(Device device) {
  impl_->device = std::move(device);
}
FakeNccl::Faults& FakeNccl::faults(int rank) {
  return impl_->faults[static_cast<size_t>(rank)];
}
GpuIdentity& FakeNccl::gpu(int rank) {
  return impl_->gpus[static_cast<size_t>(rank)];
}
const FakeNccl::Seen& FakeNccl::seen(int rank) const {
  return impl_->seen[static_cast<size_t>(rank)];
}
NcclApi* FakeNccl::api(int rank) {
  return impl_->apis[static_cast<size_t>(rank)].get();
}
GpuStream FakeNccl::stream(int rank) {
  return impl_->streams[static_cast<size_t>(rank)]->handle;
}

void FakeNccl::Release() {
  const std::lock_guard lock(impl_->mutex);
  impl_->release = true;
  impl_->released.notify_all();
}

int FakeNccl::hanging_shrinks() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->hanging;
}
int FakeNccl::live_communicators() const {
  const std::lock_guard lock(impl_->mutex);
  return static_cast<int>(
      std::count_if(impl_->comms.begin(), impl_->comms.end(), [](auto& c) { return !c->freed; }));
}
int FakeNccl::live_events() const {
  const std::lock_guard lock(impl_->mutex);
  return static_cast<int>(
      std::count_if(impl_->events.begin(), impl_->events.end(), [](auto& e) { return !e->freed; }));
}
int FakeNccl::uses_after_free() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->uses_after_free;
}

}  // namespace ballast::testing
