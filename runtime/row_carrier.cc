#include "runtime/row_carrier.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "comm/agreement.h"
#include "comm/relax.h"

namespace ballast {
namespace {

// What a rank has been through.
struct Past {
  int64_t heard_of;   // the last generation
  int64_t joined_in;  // the one in which its communicator was made; 0: it has none
};

void LogIfError(const absl::Status& status) {
  if (!status.ok()) LogWarning("nccl", std::string(status.message()));
}

// Those of `ranks` that are among the members, by their places there.
std::vector<int32_t> PlacesOf(std::span<const int32_t> ranks, std::span<const int32_t> members) {
  std::vector<int32_t> places;
  for (const int32_t rank : ranks) {
    const auto at = std::ranges::lower_bound(members, rank);
    if (at == members.end() || *at != rank) continue;
    places.push_back(static_cast<int32_t>(at - members.begin()));
  }
  return places;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RowCarrier>> RowCarrier::Create(const Options& options) {
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream road,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kHigh));
  BALLAST_ASSIGN_OR_RETURN(cuda::Event ready, cuda::Event::Create());
  BALLAST_ASSIGN_OR_RETURN(cuda::Event come, cuda::Event::Create());
  return std::unique_ptr<RowCarrier>(
      new RowCarrier(options, std::move(road), std::move(ready), std::move(come)));
}

RowCarrier::~RowCarrier() {
  EndNccl();
}

// Not by NCCL's own end, which waits for all ranks: they do not end together.
void RowCarrier::EndNccl() {
  if (nccl_ != nullptr) LogIfError(nccl_->Abort());
  nccl_ = nullptr;
}

absl::Status RowCarrier::Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                                 std::span<const int32_t> node_of_rank,
                                 std::span<std::byte> staging, const absl::Status& mine) {
  comm_ = communicator;
  if (nccl_ != nullptr) {
    // What does not end at once is given up: it may wait for a rank that is gone.
    nccl_->Wait(options_.stream, 0).IgnoreError();
    nccl_->Wait(road_.get(), 0).IgnoreError();
  }
  const Past past{.heard_of = generation_, .joined_in = nccl_ == nullptr ? 0 : joined_in_};
  BALLAST_ASSIGN_OR_RETURN(const std::vector<std::byte> payload,
                           Agree(comm_, /*epoch=*/0, mine, {}, std::as_bytes(std::span(&past, 1))));
  std::vector<Past> pasts(job_ranks.size());
  std::memcpy(pasts.data(), payload.data(), payload.size());
  bool together = past.joined_in != 0;  // all in one communicator, since the same time
  for (const Past& other : pasts) {
    generation_ = std::max(generation_, other.heard_of);
    together = together && other.joined_in == past.joined_in;
  }
  ++generation_;
  const std::vector<int32_t> survivors = PlacesOf(job_ranks, members_);
  std::unique_ptr<NcclCommunicator> made;
  if (together && survivors.size() == job_ranks.size() && survivors.size() < members_.size()) {
    auto shrunk = nccl_->Shrink(comm_, /*epoch=*/0, survivors);
    LogIfError(shrunk.status());  // which all ranks have; so all begin anew
    if (shrunk.ok()) made = *std::move(shrunk);
  }
  if (made == nullptr) {
    EndNccl();
    BALLAST_ASSIGN_OR_RETURN(
        made, NcclCommunicator::Create(options_.nccl, comm_, /*epoch=*/0,
                                       {.deadline_ms = comm_->deadline_ms() / 3,
                                        .max_ctas = options_.max_ctas,
                                        .node_of_rank = {node_of_rank.begin(), node_of_rank.end()},
                                        .staging = staging,
                                        .interrupted = [this] { return comm_->LookAround(); }}));
  }
  nccl_ = std::move(made);
  joined_in_ = generation_;
  members_.assign(job_ranks.begin(), job_ranks.end());
  pair_bytes_.assign(members_.size() * members_.size(), 0);
  for (auto* sizes : {&send_bytes_, &send_offsets_, &recv_bytes_, &recv_offsets_}) {
    sizes->assign(members_.size(), 0);
  }
  // NCCL's part in what was under way has ended by itself or was aborted.
  const absl::Status idle = AwaitIdle(options_.timeout_ms, [this] { return comm_->LookAround(); });
  return absl::IsDeadlineExceeded(idle) ? absl::InternalError(idle.message()) : idle;
}

absl::StatusOr<bool> RowCarrier::IsIdle() const {
  BALLAST_ASSIGN_OR_RETURN(const bool computed, cuda::IsDone(options_.stream));
  BALLAST_ASSIGN_OR_RETURN(const bool carried, cuda::IsDone(road_.get()));
  return computed && carried;
}

// ERRORS kDeadlineExceeded; what `look_around` says
absl::Status RowCarrier::AwaitIdle(int64_t timeout_ms,
                                   const std::function<absl::Status()>& look_around) {
  const int64_t deadline = NowNs() + timeout_ms * 1'000'000;
  for (int polls = 0;; ++polls) {
    BALLAST_ASSIGN_OR_RETURN(const bool idle, IsIdle());
    if (idle) return absl::OkStatus();
    if (polls % kPollsPerLook == kPollsPerLook - 1) {
      BALLAST_RETURN_IF_ERROR(look_around());
      if (NowNs() > deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("what was put on the device has not ended in ", timeout_ms, " ms"));
      }
    }
    Relax(polls);
  }
}

absl::Status RowCarrier::Halt() {
  constexpr int64_t kSoonMs = 100;  // what waits for nobody has ended by then
  const auto go_on = [] { return absl::OkStatus(); };
  absl::Status idle = AwaitIdle(kSoonMs, go_on);
  if (!absl::IsDeadlineExceeded(idle)) return idle;
  EndNccl();
  idle = AwaitIdle(options_.timeout_ms, go_on);
  // Nobody is waited for any more: it is the device that does not come back.
  return idle.ok() ? idle : absl::InternalError(idle.message());
}

void RowCarrier::Plan() {
  const size_t ranks = members_.size(), self = static_cast<size_t>(comm_->rank());
  size_t end = 0;
  for (size_t r = 0; r < ranks; ++r) {
    send_bytes_[r] = pair_bytes_[self * ranks + r];
    recv_bytes_[r] = pair_bytes_[r * ranks + self];
    recv_offsets_[r] = std::exchange(end, end + recv_bytes_[r]);
  }
  nccl_->hierarchy().SendOffsets(send_bytes_, send_offsets_);
}

absl::Status RowCarrier::Send(const std::byte* from, std::byte* to) {
  BALLAST_RETURN_IF_ERROR(ready_.Record(options_.stream));
  BALLAST_RETURN_IF_ERROR(ready_.HoldBack(road_.get()));
  const absl::Status issued = nccl_->hierarchy().num_nodes() > 1
                                  ? nccl_->HierarchicalAllToAllV({.send = from,
                                                                  .recv = to,
                                                                  .pair_bytes = pair_bytes_,
                                                                  .recv_offsets = recv_offsets_},
                                                                 road_.get())
                                  : nccl_->AllToAllV({.send = from,
                                                      .send_bytes = send_bytes_,
                                                      .send_offsets = send_offsets_,
                                                      .recv = to,
                                                      .recv_bytes = recv_bytes_,
                                                      .recv_offsets = recv_offsets_},
                                                     road_.get());
  BALLAST_RETURN_IF_ERROR(Complain(issued));
  return come_.Record(road_.get());
}

absl::Status RowCarrier::Receive() {
  return come_.HoldBack(options_.stream);
}

absl::Status RowCarrier::Wait() {
  return Complain(nccl_->Wait(options_.stream, options_.timeout_ms));
}

// Who of them has come complains too, so whoever has not can be told apart.
absl::Status RowCarrier::Complain(const absl::Status& status) {
  if (!absl::IsDeadlineExceeded(status)) return status;
  for (int r = 0; r < comm_->size(); ++r) {
    if (nccl_->HadMessagesWith(r)) comm_->Miss(r);
  }
  return status;
}

}  // namespace ballast
