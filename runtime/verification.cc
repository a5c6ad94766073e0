#include "runtime/verification.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <utility>

#include "base/status.h"

namespace ballast {
namespace {

using nlohmann::ordered_json;

// How often to look whether the ranks that are waited for still serve.
constexpr std::chrono::milliseconds kGlance(100);

std::string Hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string Name(const VerifiedCopy& copy, int rank) {
  return absl::StrCat("layer ", copy.layer, ", expert ", copy.expert, " on rank ", rank);
}

ordered_json ToJson(const std::map<int, VerifiedFrame>& reports) {
  ordered_json ranks = ordered_json::array();
  for (const auto& [rank, report] : reports) {
    ranks.push_back({{"rank", rank},
                     {"step", report.step},
                     {"epoch", report.epoch},
                     {"placement", Hex(report.fingerprint)},
                     {"copies", report.copies.size()}});
  }
  return ranks;
}

}  // namespace

std::vector<std::string> Compare(const std::map<int, VerifiedFrame>& reports) {
  std::vector<std::string> findings;
  std::map<std::pair<int32_t, int32_t>, std::pair<int, uint64_t>> packed;  // first rank, checksum
  std::map<int64_t, std::pair<int, uint64_t>> placements;                  // by epoch
  for (const auto& [rank, report] : reports) {
    if (!report.fault.empty()) {
      const std::string fault(reinterpret_cast<const char*>(report.fault.data()),
                              report.fault.size());
      findings.push_back(absl::StrCat("rank ", rank, ": ", fault));
    }
    const auto& [first, fingerprint] =
        placements.try_emplace(report.epoch, rank, report.fingerprint).first->second;
    if (report.fingerprint != fingerprint) {
      findings.push_back(absl::StrCat("epoch ", report.epoch, ": rank ", rank, " has placement ",
                                      Hex(report.fingerprint), ", rank ", first, " ",
                                      Hex(fingerprint)));
    }
    for (const VerifiedCopy& copy : report.copies) {
      if (copy.found != copy.expected) {
        findings.push_back(absl::StrCat(Name(copy, rank), " has checksum ", Hex(copy.found),
                                        ", it was packed with ", Hex(copy.expected)));
      }
      const auto& [other, checksum] =
          packed.try_emplace({copy.layer, copy.expert}, rank, copy.expected).first->second;
      if (copy.expected != checksum) {
        findings.push_back(absl::StrCat(Name(copy, rank), " was packed with ", Hex(copy.expected),
                                        ", on rank ", other, " with ", Hex(checksum)));
      }
    }
  }
  return findings;
}

void Verification::OnVerified(int rank, VerifiedFrame report) {
  {
    const std::lock_guard lock(mutex_);
    if (report.id != id_) return;
    reports_[rank] = std::move(report);
  }
  changed_.notify_all();
}

void Verification::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
  }
  changed_.notify_all();
}

absl::StatusOr<std::string> Verification::Run() {
  std::unique_lock lock(mutex_);
  std::shared_ptr<Check> check = under_way_;
  if (check != nullptr) {
    if (check->waiting == kMostWaiting) {
      return absl::ResourceExhaustedError(
          absl::StrCat(kMostWaiting, " others wait for the check that is under way"));
    }
    ++check->waiting;
    changed_.wait(lock, [&] { return check->answer.has_value(); });
    return *check->answer;
  }
  check = under_way_ = std::make_shared<Check>();
  lock.unlock();
  absl::StatusOr<std::string> answer = RunAlone();
  lock.lock();
  check->answer = answer;
  under_way_ = nullptr;
  lock.unlock();
  changed_.notify_all();
  return answer;
}

absl::StatusOr<std::string> Verification::RunAlone() {
  std::unique_lock lock(mutex_);
  reports_.clear();
  const uint64_t id = ++id_;
  lock.unlock();
  std::vector<int> missing = options_.serving();
  BALLAST_RETURN_IF_ERROR(options_.ask(id));
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.timeout_ms);
  while (true) {
    const std::vector<int> serving = options_.serving();
    lock.lock();
    // One that has left since may come back without having heard the question.
    std::erase_if(missing, [&](int rank) {
      return reports_.contains(rank) || std::ranges::find(serving, rank) == serving.end();
    });
    const bool late = std::chrono::steady_clock::now() > deadline;
    if (missing.empty() || late || cancelled_) break;
    changed_.wait_for(lock, kGlance);
    lock.unlock();
  }
  if (cancelled_) return absl::UnavailableError("the server stops");
  const std::map<int, VerifiedFrame> reports = reports_;
  lock.unlock();

  std::vector<std::string> findings = Compare(reports);
  for (const int rank : missing) {
    findings.push_back(
        absl::StrCat("rank ", rank, " did not answer within ", options_.timeout_ms, " ms"));
  }
  size_t copies = 0;
  for (const auto& [rank, report] : reports) copies += report.copies.size();
  return ordered_json{{"ok", findings.empty()},
                      {"copies", copies},
                      {"findings", findings},
                      {"ranks", ToJson(reports)}}
      .dump();
}

}  // namespace ballast
