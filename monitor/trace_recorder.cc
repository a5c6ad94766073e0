#include "monitor/trace_recorder.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/npy.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr int64_t kKinds = 2;  // of token

}  // namespace

TraceRecorder::TraceRecorder(const Shape& shape)
    : shape_(shape), rank_end_(static_cast<size_t>(shape.num_ranks)) {}

int64_t TraceRecorder::unit_bytes(What what) const {
  const int64_t layers = shape_.num_layers;
  return what == What::kCounts ? kKinds * layers * shape_.num_experts * int64_t{sizeof(int32_t)}
                               : layers * shape_.top_k * IdBytes(shape_.num_experts);
}

absl::Status TraceRecorder::Start(What what, int64_t max_bytes) {
  const int64_t least = unit_bytes(what);
  if (max_bytes < least || max_bytes > kMostBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_bytes: ", max_bytes, ", allowed: ", least, " (one ",
                     what == What::kCounts ? "step" : "token", " of this model) to ", kMostBytes));
  }
  const auto running = [] {
    return absl::FailedPreconditionError("a recording is under way: stop it first");
  };
  if (state().started) return running();
  // Written once here, so that the pages are there when steps come.
  std::shared_ptr<std::byte[]> bytes(new (std::nothrow)
                                         std::byte[static_cast<size_t>(max_bytes)]());
  if (bytes == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("max_bytes: there is no memory for ", max_bytes));
  }
  const std::lock_guard lock(mutex_);
  if (state_.started) return running();
  bytes_ = std::move(bytes);
  state_ = {.started = true, .what = what, .max_bytes = max_bytes};
  ++recording_;
  std::fill(rank_end_.begin(), rank_end_.end(), 0);
  ids_recording_ = what == What::kIds ? recording_ : 0;
  return absl::OkStatus();
}

absl::Status TraceRecorder::Stop() {
  const std::lock_guard lock(mutex_);
  if (!state_.started) {
    return absl::FailedPreconditionError("no recording is under way: start one first");
  }
  state_.started = false;
  ids_recording_ = 0;
  return absl::OkStatus();
}

TraceRecorder::State TraceRecorder::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

void TraceRecorder::EndLocked(const char* why) {
  ids_recording_ = 0;
  LogWarning("recorder",
             absl::StrCat("the recording has ended, ", why, ": it holds ", state_.length, " ",
                          state_.what == What::kCounts ? "steps" : "tokens", ", ", state_.bytes,
                          " bytes"));
}

void TraceRecorder::AddStep(std::span<const int32_t> counts) {
  const std::lock_guard lock(mutex_);
  if (!state_.started || state_.full || state_.what != What::kCounts) return;
  BALLAST_CHECK(static_cast<int64_t>(counts.size_bytes()) == unit_bytes(What::kCounts));
  if (state_.bytes + unit_bytes(What::kCounts) > state_.max_bytes) {
    state_.full = true;
    return EndLocked("it is full");
  }
  std::memcpy(bytes_.get() + state_.bytes, counts.data(), counts.size_bytes());
  int64_t copies = 0;  // in the first layer
  for (size_t kind = 0; kind < kKinds; ++kind) {
    const auto layer = counts.subspan(kind * counts.size() / kKinds, shape_.num_experts);
    copies = std::accumulate(layer.begin(), layer.end(), copies);
  }
  state_.tokens += copies / shape_.top_k;
  ++state_.length;
  state_.bytes = state_.length * unit_bytes(What::kCounts);
}

void TraceRecorder::AddIds(int32_t rank, const IdsPart& part) {
  const std::lock_guard lock(mutex_);
  if (!state_.started || state_.gap || state_.what != What::kIds || part.recording != recording_ ||
      rank < 0 || rank >= shape_.num_ranks) {
    return;
  }
  const int64_t unit = unit_bytes(What::kIds), size = static_cast<int64_t>(part.ids.size());
  if (part.step_end > state_.max_bytes / unit) {
    // Other ranks may still owe their parts of steps that fit: those are taken.
    if (!std::exchange(state_.full, true)) EndLocked("it is full");
    return;
  }
  if (part.step_begin != rank_end_[rank] || part.step_end < part.step_begin || size % unit != 0 ||
      part.first < part.step_begin || part.first + size / unit > part.step_end) {
    state_.gap = true;
    return EndLocked("ids of a step were lost");
  }
  if (size > 0) std::memcpy(bytes_.get() + part.first * unit, part.ids.data(), part.ids.size());
  rank_end_[rank] = part.step_end;
  state_.length = *std::min_element(rank_end_.begin(), rank_end_.end());
  state_.tokens = state_.length;
  state_.bytes = state_.length * unit;
}

absl::StatusOr<std::string> TraceRecorder::Dump() const {
  std::unique_lock lock(mutex_);
  const State state = state_;
  const std::shared_ptr<const std::byte[]> bytes = bytes_;
  lock.unlock();
  if (state.length == 0) {
    return absl::FailedPreconditionError(state.started
                                             ? "no step has been recorded yet: send requests first"
                                             : "nothing is recorded: start a recording first");
  }
  const bool counts = state.what == What::kCounts;
  const NpyType ids_type = IdBytes(shape_.num_experts) == 1 ? NpyType::kU8 : NpyType::kU16;
  std::string file =
      counts ? NpyHeader(NpyType::kI32, std::vector<int64_t>{state.length, kKinds,
                                                             shape_.num_layers, shape_.num_experts})
             : NpyHeader(ids_type,
                         std::vector<int64_t>{state.length, shape_.num_layers, shape_.top_k});
  file.append(reinterpret_cast<const char*>(bytes.get()), static_cast<size_t>(state.bytes));
  return file;
}

}  // namespace ballast
