#include "kernels/exchange.h"

#include <limits>

#include "base/status.h"

namespace ballast {

absl::Status ToStatus(uint32_t status_word) {
  const auto code = static_cast<ExchangeCode>(status_word >> 16);
  const uint32_t rank = status_word & 0xffffu;
  switch (code) {
    case ExchangeCode::kOk:
      return absl::OkStatus();
    case ExchangeCode::kCountsLate:
      return absl::DeadlineExceededError(
          absl::StrCat("exchange: the counts of rank ", rank, " did not come in time"));
    case ExchangeCode::kRowsLate:
      return absl::DeadlineExceededError(
          absl::StrCat("exchange: the rows of rank ", rank, " did not come in time"));
    case ExchangeCode::kResultsLate:
      return absl::DeadlineExceededError(
          absl::StrCat("exchange: the results of rank ", rank, " did not come in time"));
    case ExchangeCode::kRowsExceeded:
      return absl::ResourceExhaustedError(
          absl::StrCat("exchange: rank ", rank, " has no room for the rows of this batch"));
    case ExchangeCode::kSharesWrong:
      return absl::InternalError(absl::StrCat(
          "exchange: rank ", rank, " has more copies of an expert than the split divided"));
    case ExchangeCode::kEpochDiffers:
      return absl::InternalError(
          absl::StrCat("exchange: the tables of rank ", rank, " are of another epoch"));
    case ExchangeCode::kLayerTooLarge:
      return absl::InternalError(absl::StrCat("exchange: the tables of rank ", rank,
                                              " are not of the size that was said"));
    case ExchangeCode::kAborted:
      return absl::AbortedError(absl::StrCat("exchange: given up by rank ", rank));
  }
  return absl::InternalError(absl::StrCat("exchange: status word ", status_word));
}

int32_t MissingRank(uint32_t status_word) {
  const auto code = static_cast<ExchangeCode>(status_word >> 16);
  const bool late = code == ExchangeCode::kCountsLate || code == ExchangeCode::kRowsLate ||
                    code == ExchangeCode::kResultsLate;
  return late ? static_cast<int32_t>(status_word & 0xffffu) : -1;
}

absl::Status CheckArenaShape(const ArenaShape& s) {
  const auto refuse = [](const char* what, int64_t value, int64_t low, int64_t high) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange: ", what, " is ", value, ", allowed: ", low, " to ", high));
  };
  constexpr int64_t kInt = std::numeric_limits<int32_t>::max();
  if (s.num_ranks < 1 || s.num_ranks > kMaxPeers) {
    return refuse("the number of ranks", s.num_ranks, 1, kMaxPeers);
  }
  if (s.places() < s.num_ranks || s.places() > kMaxPeers) {
    return refuse("the number of places", s.places(), s.num_ranks, kMaxPeers);
  }
  if (s.num_experts < 1) return refuse("the number of experts", s.num_experts, 1, kInt);
  if (s.num_kinds < 1 || s.num_kinds > 8) {
    return refuse("the number of kinds", s.num_kinds, 1, 8);
  }
  const int64_t counts = int64_t{s.places()} * s.num_kinds * s.num_experts;
  if (counts > kInt) return refuse("ranks x kinds x experts", counts, 1, kInt);
  if (s.top_k < 1 || s.top_k > 32) return refuse("top-k", s.top_k, 1, 32);
  if (s.max_tokens < 1) return refuse("the tokens of a rank", s.max_tokens, 1, kInt);
  const int64_t copies = int64_t{s.max_tokens} * s.places() * s.top_k;
  if (copies > kInt) return refuse("tokens x ranks x top-k", copies, 1, kInt);
  if (s.row_bytes < 16 || s.row_bytes % 16 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange: a row of ", s.row_bytes, " bytes, allowed: multiples of 16"));
  }
  if (s.row_capacity < 1) return refuse("the room for rows", s.row_capacity, 1, kInt);
  return absl::OkStatus();
}

}  // namespace ballast
