#include "comm/agreement.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/check.h"
#include "base/status.h"

namespace ballast {
namespace {

// What a rank says before its payload.
struct Report {
  int32_t code = 0;  // of absl::StatusCode
  char message[508] = {};
  int64_t values[kMostAgreedValues] = {};
};

absl::Status StatusOf(const Report& report, int rank) {
  return absl::Status(static_cast<absl::StatusCode>(report.code),
                      absl::StrCat("rank ", rank, ": ", report.message));
}

// The status that all return for `reports`.
absl::Status Verdict(std::span<const Report> reports, std::span<const AgreedValue> values) {
  constexpr int32_t kOk = static_cast<int32_t>(absl::StatusCode::kOk);
  constexpr int32_t kLate = static_cast<int32_t>(absl::StatusCode::kDeadlineExceeded);
  const Report* worst = nullptr;
  for (const Report& report : reports) {
    if (report.code == kOk) continue;
    // Who has waited in vain waited for another one, who may know why.
    if (worst == nullptr || (worst->code == kLate && report.code != kLate)) worst = &report;
  }
  if (worst != nullptr) return StatusOf(*worst, static_cast<int>(worst - reports.data()));
  for (size_t rank = 1; rank < reports.size(); ++rank) {
    for (size_t v = 0; v < values.size(); ++v) {
      const int64_t first = reports[0].values[v], other = reports[rank].values[v];
      if (first == other) continue;
      return absl::InvalidArgumentError(absl::StrCat(values[v].name, " must be the same on all ",
                                                     "ranks: rank 0 has ", first, ", rank ", rank,
                                                     " has ", other));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<std::byte>> Agree(Communicator* world, int64_t epoch,
                                             const absl::Status& mine,
                                             std::span<const AgreedValue> values,
                                             std::span<const std::byte> payload) {
  BALLAST_CHECK(values.size() <= kMostAgreedValues);
  Report report;
  report.code = static_cast<int32_t>(mine.code());
  const std::string message(mine.message());
  message.copy(report.message, sizeof report.message - 1);
  for (size_t v = 0; v < values.size(); ++v) report.values[v] = values[v].value;

  const size_t ranks = static_cast<size_t>(world->size());
  std::vector<std::byte> out(sizeof report + payload.size()), all(ranks * out.size());
  std::memcpy(out.data(), &report, sizeof report);
  std::copy(payload.begin(), payload.end(), out.begin() + sizeof report);
  BALLAST_RETURN_IF_ERROR(world->AllGather(epoch, out, all));

  std::vector<Report> reports(ranks);
  std::vector<std::byte> payloads;
  for (size_t rank = 0; rank < ranks; ++rank) {
    const std::span<const std::byte> from(all.data() + rank * out.size(), out.size());
    std::memcpy(&reports[rank], from.data(), sizeof report);
    payloads.insert(payloads.end(), from.begin() + sizeof report, from.end());
  }
  BALLAST_RETURN_IF_ERROR(Verdict(reports, values));
  return payloads;
}

}  // namespace ballast
