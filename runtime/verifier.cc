#include "runtime/verifier.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/block_checksum.h"

namespace ballast {
namespace {

constexpr size_t kPieceBytes = 64 << 10;  // of which a slice consists

}  // namespace

Verifier::Verifier(const Options& options, const ExpertStore* store)
    : options_(options),
      store_(store),
      due_ns_(options.period_ns > 0 ? 0 : std::numeric_limits<int64_t>::max()) {}

void Verifier::Ask() {
  Hurry();
  asked_ = true;
}

void Verifier::Hurry() {
  hurried_ = true;
  due_ns_ = 0;
  layer_ = 0;
  expert_ = -1;
  block_ = nullptr;
  pass_.clear();
}

// The next copy that this rank holds; at the end of the pass, none.
void Verifier::NextCopy() {
  block_ = nullptr;
  while (block_ == nullptr) {
    if (++expert_ == options_.num_experts) {
      expert_ = 0;
      ++layer_;
    }
    if (layer_ >= options_.num_layers) break;
    block_ = store_->Parameters(layer_, expert_);
  }
  offset_ = 0;
  checksum_ = store_->block_bytes();
  if (block_ != nullptr) return;
  layer_ = 0;
  expert_ = -1;
  hurried_ = false;
  if (std::exchange(asked_, false)) finished_ = pass_;
  pass_.clear();
}

void Verifier::EndCopy() {
  const VerifiedCopy copy{layer_, expert_, checksum_, store_->SealedChecksum(layer_, expert_)};
  pass_.push_back(copy);
  if (copy.found != copy.expected) corrupted_.push_back(copy);
  ++copies_read_;
  block_ = nullptr;
}

void Verifier::Advance(int64_t now_ns) {
  if (now_ns < due_ns_) return;
  // The copy may have left since the last slice.
  if (block_ != nullptr && store_->Parameters(layer_, expert_) != block_) block_ = nullptr;
  if (block_ == nullptr) NextCopy();
  size_t read = 0;
  while (block_ != nullptr && read < options_.slice_bytes) {
    const size_t piece = std::min(kPieceBytes, store_->block_bytes() - offset_);
    checksum_ += ChecksumPiece({block_ + offset_, piece}, offset_);
    offset_ += piece;
    read += piece;
    if (offset_ < store_->block_bytes()) continue;
    EndCopy();
    if (read < options_.slice_bytes) NextCopy();
  }
  Schedule(now_ns);
}

// Spreads the slices of a pass over the period.
void Verifier::Schedule(int64_t now_ns) {
  if (hurried_) return;
  if (options_.period_ns == 0) {
    due_ns_ = std::numeric_limits<int64_t>::max();
    return;
  }
  const double slices =
      static_cast<double>(store_->resident_bytes()) / static_cast<double>(options_.slice_bytes);
  due_ns_ = now_ns +
            static_cast<int64_t>(static_cast<double>(options_.period_ns) / std::max(1.0, slices));
}

}  // namespace ballast
