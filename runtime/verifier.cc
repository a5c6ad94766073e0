#include "runtime/verifier.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace ballast {
namespace {

// Who reads beside this thread is looked after this often.
constexpr int64_t kUnderWayNs = 1'000'000;

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
  reading_ = {};
  pass_.clear();
}

// The next copy that this rank holds; at the end of the pass, none.
void Verifier::NextCopy() {
  reading_ = {};
  while (reading_.block < 0) {
    if (++expert_ == options_.num_experts) {
      expert_ = 0;
      ++layer_;
    }
    if (layer_ >= options_.num_layers) break;
    reading_.block = store_->BlockOf(layer_, expert_);
  }
  if (reading_.block >= 0) return;
  layer_ = 0;
  expert_ = -1;
  hurried_ = false;
  if (std::exchange(asked_, false)) finished_ = pass_;
  pass_.clear();
}

void Verifier::EndCopy(uint64_t found) {
  const VerifiedCopy copy{layer_, expert_, found, store_->SealedChecksum(layer_, expert_)};
  pass_.push_back(copy);
  if (copy.found != copy.expected) corrupted_.push_back(copy);
  ++copies_read_;
  reading_ = {};
}

void Verifier::Advance(int64_t now_ns) {
  if (now_ns < due_ns_) return;
  // The copy may have left since the last slice.
  if (store_->BlockOf(layer_, std::max(expert_, 0)) != reading_.block) reading_ = {};
  if (reading_.block < 0) NextCopy();
  size_t read = 0;
  while (reading_.block >= 0 && read < options_.slice_bytes) {
    const size_t before = reading_.offset;
    const absl::StatusOr<bool> done = store_->Advance(&reading_);
    const size_t part = reading_.offset - before;
    read += part;
    if (done.ok() && !*done && part == 0) break;  // it is under way
    if (done.ok() && !*done) continue;
    EndCopy(done.ok() ? reading_.checksum : 0);  // what cannot be read is not right
    if (read < options_.slice_bytes) NextCopy();
  }
  Schedule(now_ns, read);
}

// Spreads the slices of a pass over the period.
void Verifier::Schedule(int64_t now_ns, size_t read) {
  if (hurried_) return;
  if (options_.period_ns == 0) {
    due_ns_ = std::numeric_limits<int64_t>::max();
    return;
  }
  if (read == 0 && reading_.block >= 0) {
    due_ns_ = now_ns + std::min(kUnderWayNs, options_.period_ns);
    return;
  }
  const double share = static_cast<double>(std::max(read, options_.slice_bytes)) /
                       static_cast<double>(std::max<size_t>(store_->resident_bytes(), 1));
  due_ns_ =
      now_ns + static_cast<int64_t>(static_cast<double>(options_.period_ns) * std::min(share, 1.0));
}

}  // namespace ballast
