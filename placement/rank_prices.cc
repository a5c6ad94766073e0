#include "placement/rank_prices.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace ballast {
namespace {

// All chosen on the ESFT traces (steps of 1,024 and 256 tokens, 72 and 80 slots, 8 ranks), where
// powers from 1.5 to 4 and thresholds from 1.8 to 2.2 differ little.
constexpr double kLargestPrice = 16.0;  // a host at this price gets next to nothing already
constexpr double kLeastRelative =
    0.25;  // one idle batch does not make a rank the cheapest for long
constexpr int64_t kCopiesPerRank = 128;  // noise of 9 %
constexpr double kUsualRate = 0.4;
constexpr double kDistanceRate = 0.3;
constexpr double kShiftFactor = 2.0;
constexpr double kLeastShift = 0.05;  // part of the load that must change ranks

}  // namespace

RankPrices::RankPrices(int32_t num_ranks)
    : price_(num_ranks), pending_(num_ranks), relative_(num_ranks), usual_(num_ranks) {
  Restart();
}

void RankPrices::Restart() {
  std::fill(price_.begin(), price_.end(), 1.0);
  usual_distance_ = 0.0;
  num_learnt_ = 0;
}

// Whether relative_ is further from usual_ than usual; takes it in if not.
bool RankPrices::Shifted() {
  if (num_learnt_ == 0) {
    usual_ = relative_;
    num_learnt_ = 1;
    return false;
  }
  double distance = 0.0;  // the part of the load that is on other ranks than usual
  for (size_t r = 0; r < relative_.size(); ++r) distance += std::abs(relative_[r] - usual_[r]);
  distance /= 2.0 * static_cast<double>(relative_.size());
  if (num_learnt_ >= 2 && distance > std::max(kShiftFactor * usual_distance_, kLeastShift)) {
    return true;
  }
  usual_distance_ =
      num_learnt_ == 1 ? distance : usual_distance_ + kDistanceRate * (distance - usual_distance_);
  for (size_t r = 0; r < relative_.size(); ++r) {
    usual_[r] += kUsualRate * (relative_[r] - usual_[r]);
  }
  num_learnt_ = std::min(num_learnt_ + 1, 3);
  return false;
}

void RankPrices::Learn(std::span<const int32_t> rank_load) {
  BALLAST_CHECK(rank_load.size() == price_.size());
  for (size_t r = 0; r < price_.size(); ++r) pending_[r] += rank_load[r];
  const int64_t total = std::accumulate(pending_.begin(), pending_.end(), int64_t{0});
  const auto num_ranks = static_cast<int64_t>(price_.size());
  if (total < kCopiesPerRank * num_ranks) return;
  const double mean = static_cast<double>(total) / static_cast<double>(num_ranks);
  for (size_t r = 0; r < price_.size(); ++r) {
    relative_[r] = static_cast<double>(pending_[r]) / mean;
    pending_[r] = 0;
  }
  if (Shifted()) {
    Restart();
    return;
  }
  double sum = 0.0;
  for (size_t r = 0; r < price_.size(); ++r) {
    const double x = std::max(relative_[r], kLeastRelative);
    price_[r] *= x * x;
    sum += price_[r];
  }
  const double scale = static_cast<double>(num_ranks) / sum;
  for (double& price : price_) {
    price = std::clamp(price * scale, 1.0 / kLargestPrice, kLargestPrice);
  }
}

}  // namespace ballast
