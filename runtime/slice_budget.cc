#include "runtime/slice_budget.h"

#include <algorithm>
#include <cmath>

namespace ballast {

void SliceBudget::Restart(int64_t now_ns) {
  opened_ns_ = now_ns;
  credit_ns_ = 0.0;
}

TransferBudget SliceBudget::Open(int64_t now_ns, SliceOf of) {
  const double burst = kBurst * options_.bytes_per_second;
  const double earned = static_cast<double>(now_ns - filled_ns_) * 1e-9 * options_.bytes_per_second;
  send_bytes_ = std::min(send_bytes_ + earned, burst);
  receive_bytes_ = std::min(receive_bytes_ + earned, burst);
  filled_ns_ = now_ns;

  credit_ns_ =
      std::min(credit_ns_, 0.0) + options_.step_share * static_cast<double>(now_ns - opened_ns_);
  opened_ns_ = now_ns;
  of_ = of;
  if (!HasTime(now_ns)) return {};
  if (options_.bytes_per_second <= 0.0) return {options_.slice_bytes, options_.slice_bytes};
  const auto allowed = [&](double bytes) {
    return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(bytes)), 0, options_.slice_bytes);
  };
  return {allowed(send_bytes_), allowed(receive_bytes_)};
}

bool SliceBudget::HasTime(int64_t now_ns) const {
  return of_ == SliceOf::kRest || static_cast<double>(now_ns - opened_ns_) < credit_ns_;
}

void SliceBudget::Close(int64_t now_ns, int64_t sent, int64_t received) {
  send_bytes_ -= static_cast<double>(sent);
  receive_bytes_ -= static_cast<double>(received);
  if (of_ == SliceOf::kStep) credit_ns_ -= static_cast<double>(now_ns - opened_ns_);
}

}  // namespace ballast
