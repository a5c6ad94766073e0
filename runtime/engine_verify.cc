// How an engine makes sure that what it serves from is what it was given (verifier.h).
#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "placement/placement_check.h"
#include "runtime/engine.h"

namespace ballast {
namespace {

// An idle rank looks up this often even if nobody speaks to it.
constexpr int64_t kIdleWaitMs = 10'000;

}  // namespace

absl::Status Engine::Verify() {
  const int64_t now = NowNs();
  if (now < verifier_->due_ns()) return absl::OkStatus();
  const int64_t read_before = verifier_->copies_read();
  verifier_->Advance(now);
  Verified verified{.copies = verifier_->copies_read() - read_before};
  std::ranges::copy(verifier_->TakeCorrupted(), std::back_inserter(unfit_));
  verified.corrupted = static_cast<int32_t>(unfit_.size());
  std::optional<RankFrame> report;
  if (auto pass = verifier_->TakePass(); pass.has_value()) {
    VerifiedFrame found{.id = verify_id_,
                        .step = protocol_->step(),
                        .epoch = rebalancer_->placement().epoch(),
                        .fingerprint = rebalancer_->placement().fingerprint(),
                        .fault = {},
                        .copies = *std::move(pass)};
    absl::Status tables = CheckPlacement(rebalancer_->placement());
    tables.Update(decoder_->moe().Check(rebalancer_->placement(), *store_));
    if (!tables.ok()) {
      verified.unsound = 1;
      LogError("engine", std::string(tables.message()));
      for (const char c : tables.message()) found.fault.push_back(static_cast<std::byte>(c));
    }
    report = RankFrame{std::move(found)};
  }
  observer_->OnVerified(verified);
  const absl::Status mended = MendUnfit();
  // Last: whoever has the answer finds what was wrong counted, and mended if it can be.
  if (report.has_value()) BALLAST_RETURN_IF_ERROR(channel_->Send(Serialize(*report)));
  return mended;
}

// Reads experts again whose parameters have changed in memory. What it does not come to is left for
// the next time, which is before the next step.
// ERRORS kAborted: told to halt meanwhile; kDataLoss: the checkpoint has changed as well
absl::Status Engine::MendUnfit() {
  while (!unfit_.empty()) {
    const VerifiedCopy& copy = unfit_.front();
    if (store_->Parameters(copy.layer, copy.expert) != nullptr) {  // else it has left
      LogError("engine", absl::StrCat("layer ", copy.layer, ", expert ", copy.expert,
                                      ": the parameters in memory are not those that were loaded; "
                                      "they are read from the checkpoint again"));
      BALLAST_RETURN_IF_ERROR(ReadExpertPatiently(copy.layer, copy.expert));
    }
    unfit_.erase(unfit_.begin());
  }
  return absl::OkStatus();
}

// Nobody has tokens: until somebody speaks to this rank, or for kIdleWaitMs.
absl::Status Engine::Idle() {
  constexpr int64_t kNsPerMs = 1'000'000;
  const int64_t until = NowNs() + kIdleWaitMs * kNsPerMs;
  for (int64_t now = NowNs(); now < until; now = NowNs()) {
    const int64_t left = std::min(until, verifier_->due_ns()) - now;
    const int wait_ms = static_cast<int>((std::max<int64_t>(left, 0) + kNsPerMs - 1) / kNsPerMs);
    BALLAST_ASSIGN_OR_RETURN(const bool spoken_to, channel_->WaitReadable(wait_ms));
    if (spoken_to) break;
    BALLAST_RETURN_IF_ERROR(Verify());
  }
  return absl::OkStatus();
}

}  // namespace ballast
