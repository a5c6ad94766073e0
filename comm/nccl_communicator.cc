#include "comm/nccl_communicator.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/status.h"
#include "comm/relax.h"

namespace ballast {
namespace {

// What each rank shows to the others before NCCL is asked.
struct Card {
  char host[256] = {};
  char pci_bus_id[32] = {};
  uint8_t uuid[16] = {};
  char unique_id[128] = {};  // rank 0's counts
};
static_assert(sizeof(Card{}.unique_id) == sizeof(NcclUniqueId));

Card MakeCard(const GpuIdentity& gpu, const NcclUniqueId& id) {
  Card card;
  gpu.host.copy(card.host, sizeof card.host - 1);
  gpu.pci_bus_id.copy(card.pci_bus_id, sizeof card.pci_bus_id - 1);
  std::copy(gpu.uuid.begin(), gpu.uuid.end(), card.uuid);
  std::copy(id.bytes.begin(), id.bytes.end(), card.unique_id);
  return card;
}

GpuIdentity GpuOf(const Card& card) {
  GpuIdentity gpu{.host = card.host, .pci_bus_id = card.pci_bus_id};
  std::copy(std::begin(card.uuid), std::end(card.uuid), gpu.uuid.begin());
  return gpu;
}

absl::Status CheckDeadline(int64_t deadline_ms, const Communicator& world) {
  const int64_t most_ms = world.deadline_ms() / 3;
  if (deadline_ms <= most_ms) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("deadline_ms is ", deadline_ms,
                                                 ", allowed: at most ", most_ms, ", a third of ",
                                                 "the time that ranks wait for messages"));
}

// For ends that another error comes before.
void LogIfError(const absl::Status& status) {
  if (!status.ok()) LogWarning("nccl", std::string(status.message()));
}

template <typename T>
int64_t HashOf(std::span<const T> values) {
  return static_cast<int64_t>(Hash64(std::as_bytes(values)));
}

}  // namespace

NcclCommunicator::NcclCommunicator(NcclApi* api, int rank, Options options)
    : api_(api),
      rank_(rank),
      options_(std::move(options)),
      hierarchy_(options_.node_of_rank, rank),
      peers_(options_.node_of_rank.size()) {}

NcclCommunicator::~NcclCommunicator() {
  LogIfError(Destroy());
  if (event_ != nullptr) api_->FreeEvent(event_);
}

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Create(NcclApi* api,
                                                                           Communicator* world,
                                                                           int64_t epoch,
                                                                           Options options) {
  const size_t ranks = static_cast<size_t>(world->size());
  if (options.node_of_rank.empty()) options.node_of_rank.resize(ranks);
  BALLAST_CHECK(options.node_of_rank.size() == ranks);
  std::unique_ptr<NcclCommunicator> made(
      new NcclCommunicator(api, world->rank(), std::move(options)));
  int version = 0;
  Card card;
  const auto prepare = [&]() -> absl::Status {
    BALLAST_RETURN_IF_ERROR(CheckDeadline(made->options_.deadline_ms, *world));
    BALLAST_ASSIGN_OR_RETURN(version, api->Version());
    BALLAST_ASSIGN_OR_RETURN(const GpuIdentity gpu, api->CurrentDevice());
    NcclUniqueId id;
    if (world->rank() == 0) {
      BALLAST_ASSIGN_OR_RETURN(id, api->MakeUniqueId());
    }
    card = MakeCard(gpu, id);
    BALLAST_ASSIGN_OR_RETURN(made->event_, api->MakeEvent());
    return absl::OkStatus();
  };
  const absl::Status prepared = prepare();
  const std::span<const int32_t> nodes = made->options_.node_of_rank;
  const AgreedValue values[] = {
      {"the version of NCCL", version},
      {"max_ctas", made->options_.max_ctas},
      {"the size of the staging memory", static_cast<int64_t>(made->options_.staging.size())},
      {"the hash of the nodes", HashOf(nodes)}};
  BALLAST_ASSIGN_OR_RETURN(
      const std::vector<std::byte> gathered,
      Agree(world, epoch, prepared, values, std::as_bytes(std::span(&card, 1))));
  std::vector<Card> cards(ranks);
  std::memcpy(cards.data(), gathered.data(), gathered.size());
  std::vector<GpuIdentity> gpus;
  for (const Card& other : cards) gpus.push_back(GpuOf(other));
  BALLAST_RETURN_IF_ERROR(CheckOneGpuEach(gpus));
  NcclUniqueId id;
  std::copy(std::begin(cards[0].unique_id), std::end(cards[0].unique_id), id.bytes.begin());
  const absl::Status joined = made->Join(id);
  return Confirm(world, epoch, joined, std::move(made));
}

absl::Status NcclCommunicator::Join(const NcclUniqueId& id) {
  const absl::Status begun = api_->Init(id, size(), rank_, {.max_ctas = options_.max_ctas}, &comm_);
  if (!begun.ok()) return Fail(begun);
  return Settle(options_.deadline_ms, "for all ranks to join NCCL's communicator");
}

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Confirm(
    Communicator* world, int64_t epoch, const absl::Status& joined,
    std::unique_ptr<NcclCommunicator> made) {
  const absl::Status all = Agree(world, epoch, joined, {}, {}).status();
  if (all.ok()) return made;
  made->Die("not all ranks have joined");
  return all;
}

absl::Status NcclCommunicator::AllToAllV(const Args& args, GpuStream stream) {
  if (!dead_.ok()) return dead_;
  const size_t ranks = peers_.size(), self = static_cast<size_t>(rank_);
  BALLAST_CHECK(args.send_bytes.size() == ranks && args.send_offsets.size() == ranks);
  BALLAST_CHECK(args.recv_bytes.size() == ranks && args.recv_offsets.size() == ranks);
  BALLAST_CHECK(args.send_bytes[self] == args.recv_bytes[self]);
  BeginExchange();
  // First, so that the device copies while NCCL issues the messages.
  if (const size_t own = args.send_bytes[self]; own > 0) {
    const absl::Status copied = api_->Copy({args.recv + args.recv_offsets[self], own},
                                           {args.send + args.send_offsets[self], own}, stream);
    if (!copied.ok()) return Fail(copied);
  }
  return Group([&]() -> absl::Status {
    for (size_t p = 0; p < ranks; ++p) {
      if (p == self) continue;
      const int peer = static_cast<int>(p);
      if (args.recv_bytes[p] > 0) {
        BALLAST_RETURN_IF_ERROR(
            Recv({args.recv + args.recv_offsets[p], args.recv_bytes[p]}, peer, stream));
      }
      if (args.send_bytes[p] > 0) {
        BALLAST_RETURN_IF_ERROR(
            Send({args.send + args.send_offsets[p], args.send_bytes[p]}, peer, stream));
      }
    }
    return absl::OkStatus();
  });
}

absl::Status NcclCommunicator::HierarchicalAllToAllV(const HierarchicalArgs& args,
                                                     GpuStream stream) {
  if (!dead_.ok()) return dead_;
  const size_t need = hierarchy_.MostStagingBytes(args.pair_bytes);
  if (need > options_.staging.size()) {
    return absl::InvalidArgumentError(absl::StrCat("rows that cross nodes need ", need,
                                                   " bytes of staging memory on one rank; ",
                                                   "each has ", options_.staging.size()));
  }
  const Hierarchy::Plan& plan = hierarchy_.MakePlan(args.pair_bytes, args.recv_offsets);
  std::byte* const staging = options_.staging.data();
  BeginExchange();
  const absl::Status crossed = Group([&]() -> absl::Status {
    for (const auto& m : plan.node_recvs) {
      BALLAST_RETURN_IF_ERROR(Recv({staging + m.offset, m.bytes}, m.peer, stream));
    }
    for (const auto& m : plan.node_sends) {
      BALLAST_RETURN_IF_ERROR(Send({args.send + m.offset, m.bytes}, m.peer, stream));
    }
    return absl::OkStatus();
  });
  if (!crossed.ok()) return crossed;
  const absl::Status handed = Group([&]() -> absl::Status {
    for (const auto& m : plan.hand_recvs) {
      BALLAST_RETURN_IF_ERROR(Recv({args.recv + m.offset, m.bytes}, m.peer, stream));
    }
    for (const auto& m : plan.hand_sends) {
      const std::byte* const from = m.staged ? staging : args.send;
      BALLAST_RETURN_IF_ERROR(Send({from + m.offset, m.bytes}, m.peer, stream));
    }
    return absl::OkStatus();
  });
  if (!handed.ok()) return handed;
  for (const auto& copy : plan.own_copies) {
    const std::byte* const from = copy.staged ? staging : args.send;
    const absl::Status copied =
        api_->Copy({args.recv + copy.to, copy.bytes}, {from + copy.from, copy.bytes}, stream);
    if (!copied.ok()) return Fail(copied);
  }
  return absl::OkStatus();
}

absl::Status NcclCommunicator::Wait(GpuStream stream, int64_t deadline_ms) {
  if (!dead_.ok()) return dead_;
  const absl::Status recorded = api_->Record(event_, stream);
  if (!recorded.ok()) return Fail(recorded);
  return Poll(deadline_ms, "for its stream", [&]() -> absl::StatusOr<bool> {
    // An error in the background first: the event of a lost exchange never happens.
    BALLAST_ASSIGN_OR_RETURN(const bool settled, api_->Settled(comm_));
    if (!settled) return false;
    return api_->Happened(event_);
  });
}

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Shrink(
    Communicator* world, int64_t epoch, std::span<const int32_t> survivors) {
  BALLAST_CHECK(static_cast<int>(survivors.size()) == world->size() && world->size() < size());
  BALLAST_CHECK(survivors[static_cast<size_t>(world->rank())] == rank_);
  Options options = options_;
  options.node_of_rank.clear();
  std::vector<int32_t> excluded;
  for (int32_t r = 0; r < size(); ++r) {
    if (std::binary_search(survivors.begin(), survivors.end(), r)) {
      options.node_of_rank.push_back(options_.node_of_rank[static_cast<size_t>(r)]);
    } else {
      excluded.push_back(r);
    }
  }
  std::unique_ptr<NcclCommunicator> child(
      new NcclCommunicator(api_, world->rank(), std::move(options)));
  const auto prepare = [&]() -> absl::Status {
    BALLAST_RETURN_IF_ERROR(CheckDeadline(options_.deadline_ms, *world));
    if (comm_ == nullptr) {
      return absl::UnavailableError(
          absl::StrCat("rank ", rank_, " of ", size(), " has ended its communicator already"));
    }
    BALLAST_ASSIGN_OR_RETURN(child->event_, api_->MakeEvent());
    return absl::OkStatus();
  };
  const AgreedValue values[] = {{"the hash of the survivors", HashOf(survivors)}};
  const uint8_t faulty = dead_.ok() ? 0 : 1;
  auto faults = Agree(world, epoch, prepare(), values, std::as_bytes(std::span(&faulty, 1)));
  absl::Status shrunk = faults.status();
  if (faults.ok()) {
    const bool abort = std::find(faults->begin(), faults->end(), std::byte{1}) != faults->end();
    shrunk = ShrinkTo(excluded, abort, child.get());
  }
  Die("it has been shrunk");
  LogIfError(Abort());
  if (!faults.ok()) return shrunk;
  return Confirm(world, epoch, shrunk, std::move(child));
}

absl::Status NcclCommunicator::ShrinkTo(std::span<const int32_t> excluded, bool abort,
                                        NcclCommunicator* child) {
  // NCCL writes it at some time before this communicator settles; the call keeps it as long as it
  // runs.
  const auto made = std::make_shared<NcclComm>(nullptr);
  const auto call = [api = api_, comm = comm_, abort, made, max_ctas = options_.max_ctas,
                     list = std::vector<int32_t>(excluded.begin(), excluded.end())] {
    return api->Shrink(comm, list, abort, {.max_ctas = max_ctas}, made.get());
  };
  // Three waits, one deadline: the others count on it.
  const int64_t end = NowNs() + options_.deadline_ms * 1'000'000;
  const auto left_ms = [end] { return std::max<int64_t>(0, (end - NowNs()) / 1'000'000); };
  absl::Status shrunk = CallWithin(left_ms(), "ncclCommShrink", call);
  if (absl::IsDeadlineExceeded(shrunk)) {
    // NCCL is still in there: neither this communicator may be touched, nor what it will write.
    comm_ = nullptr;
    return Fail(shrunk);
  }
  shrunk = shrunk.ok() ? Settle(left_ms(), "for all survivors to shrink NCCL's communicator")
                       : Fail(shrunk);
  // Once aborted it is written no more; if even that does not return, it is given up for good.
  if (!shrunk.ok() && !Abort().ok()) {
    static_cast<void>(new std::shared_ptr<NcclComm>(made));  // never freed
    return shrunk;
  }
  child->comm_ = *made;
  if (!shrunk.ok()) return shrunk;
  if (child->comm_ == nullptr) return absl::InternalError("NCCL has made no communicator");
  return child->Settle(left_ms(), "for all survivors to join NCCL's communicator");
}

absl::Status NcclCommunicator::Abort() {
  Die("it was aborted");
  if (comm_ == nullptr) return absl::OkStatus();
  const auto call = [api = api_, comm = std::exchange(comm_, nullptr)] { return api->Abort(comm); };
  return CallWithin(options_.deadline_ms, "ncclCommAbort", call);
}

absl::Status NcclCommunicator::Destroy() {
  if (comm_ == nullptr) return absl::OkStatus();
  if (!dead_.ok()) return Abort();
  absl::Status ended = api_->Finalize(comm_);
  ended = ended.ok() ? Settle(options_.deadline_ms, "for all ranks to end NCCL's communicator")
                     : Fail(ended);
  if (!ended.ok()) {
    LogIfError(Abort());
    return ended;
  }
  Die("it was destroyed");
  const auto call = [api = api_, comm = std::exchange(comm_, nullptr)] {
    return api->Destroy(comm);
  };
  return CallWithin(options_.deadline_ms, "ncclCommDestroy", call);
}

// Issues the sends and receives of `calls` as one, and waits until NCCL has issued them: before
// that, nothing that is put on the stream would come after them.
template <typename Calls>
absl::Status NcclCommunicator::Group(Calls calls) {
  const absl::Status begun = api_->GroupStart();
  if (!begun.ok()) return Fail(begun);
  const absl::Status called = calls();
  const absl::Status ended = api_->GroupEnd();  // also after an error, or the thread stays in it
  if (!called.ok()) return Fail(called);
  if (!ended.ok()) return Fail(ended);
  return Settle(options_.deadline_ms, "for NCCL to issue the messages");
}

template <typename Done>
absl::Status NcclCommunicator::Poll(int64_t deadline_ms, const char* what, Done done) {
  const int64_t deadline = NowNs() + deadline_ms * 1'000'000;
  for (int polls = 0;; ++polls) {
    const absl::StatusOr<bool> now = done();
    if (!now.ok()) return Fail(now.status());
    if (*now) return absl::OkStatus();
    if (polls % kPollsPerLook == kPollsPerLook - 1) {
      const absl::Status interrupted =
          options_.interrupted ? options_.interrupted() : absl::OkStatus();
      if (!interrupted.ok()) return Fail(interrupted);
      if (NowNs() > deadline) {
        return Fail(absl::DeadlineExceededError(
            absl::StrCat("waited ", deadline_ms, " ms ", what, PeersOfExchange())));
      }
    }
    Relax(polls);
  }
}

absl::Status NcclCommunicator::Settle(int64_t deadline_ms, const char* what) {
  return Poll(deadline_ms, what, [&] { return api_->Settled(comm_); });
}

absl::Status NcclCommunicator::Send(std::span<const std::byte> bytes, int peer, GpuStream stream) {
  peers_[static_cast<size_t>(peer)] |= kSendsTo;
  return api_->Send(bytes, peer, comm_, stream);
}

absl::Status NcclCommunicator::Recv(std::span<std::byte> bytes, int peer, GpuStream stream) {
  peers_[static_cast<size_t>(peer)] |= kRecvsFrom;
  return api_->Recv(bytes, peer, comm_, stream);
}

void NcclCommunicator::BeginExchange() {
  ++exchange_;
  std::fill(peers_.begin(), peers_.end(), kNone);
}

std::string NcclCommunicator::PeersOfExchange() const {
  std::string from, to;
  for (size_t peer = 0; peer < peers_.size(); ++peer) {
    if (peers_[peer] & kRecvsFrom) absl::StrAppend(&from, from.empty() ? "" : ", ", peer);
    if (peers_[peer] & kSendsTo) absl::StrAppend(&to, to.empty() ? "" : ", ", peer);
  }
  return absl::StrCat(from.empty() ? "" : "; last messages from ", from,
                      to.empty() ? "" : "; last messages to ", to);
}

absl::Status NcclCommunicator::Fail(const absl::Status& status) {
  const std::string text = absl::StrCat("rank ", rank_, " of ", size(), ", exchange ", exchange_,
                                        ": ", std::string(status.message()));
  Die(text);
  return absl::Status(status.code(), text);
}

void NcclCommunicator::Die(const std::string& why) {
  if (!dead_.ok()) return;
  dead_ = absl::UnavailableError(absl::StrCat("NCCL's communicator is of no more use: ", why));
}

absl::Status NcclCommunicator::CallWithin(int64_t deadline_ms, const char* what,
                                          std::function<absl::Status()> call) const {
  struct Shared {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    absl::Status status;
  };
  auto shared = std::make_shared<Shared>();
  std::thread([shared, call = std::move(call)] {
    absl::Status status = call();
    const std::lock_guard lock(shared->mutex);
    shared->status = std::move(status);
    shared->done = true;
    shared->changed.notify_one();
  }).detach();
  std::unique_lock lock(shared->mutex);
  if (shared->changed.wait_for(lock, std::chrono::milliseconds(deadline_ms),
                               [&] { return shared->done; })) {
    return std::move(shared->status);  // no reference stays with the other thread
  }
  return absl::DeadlineExceededError(absl::StrCat("rank ", rank_, ": ", what, " has not returned ",
                                                  "in ", deadline_ms,
                                                  " ms; its thread is left behind"));
}

}  // namespace ballast
