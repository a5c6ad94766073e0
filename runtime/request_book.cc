#include "runtime/request_book.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {

RequestBook::RequestBook(int num_ranks, int32_t context_tokens)
    : context_tokens_(context_tokens),
      work_(static_cast<size_t>(num_ranks), 0),
      open_(static_cast<size_t>(num_ranks), true) {}

int RequestBook::LeastWork() const {
  int best = -1;
  for (int r = 0; r < static_cast<int>(work_.size()); ++r) {
    if (open_[r] && (best < 0 || work_[r] < work_[best])) best = r;
  }
  BALLAST_CHECK(best >= 0);
  return best;
}

RequestBook::Assignment RequestBook::Add(GenerationRequest request, std::shared_ptr<TokenSink> sink,
                                         int64_t deadline_ns) {
  request.id = next_id_++;
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  Pending pending;
  pending.rank = LeastWork();
  pending.work_tokens =
      prompt_tokens + std::min<int64_t>(request.max_tokens, context_tokens_ - prompt_tokens);
  pending.deadline_ns = deadline_ns;
  pending.request = request;
  pending.sink = std::move(sink);
  const int rank = pending.rank;
  work_[rank] += pending.work_tokens;
  deadlines_.emplace(deadline_ns, request.id);
  pending_.emplace(request.id, std::move(pending));
  return {rank, std::move(request)};
}

std::optional<FinishReason> RequestBook::OnEvent(int rank, const TokenEvent& event) {
  const auto it = pending_.find(event.request_id);
  if (it == pending_.end() || it->second.rank != rank) return std::nullopt;
  std::vector<int32_t>& generated = it->second.request.generated;
  if (event.token >= 0) {
    if (event.index != static_cast<int32_t>(generated.size())) return std::nullopt;
    generated.push_back(event.token);
    ++tokens_generated_;
  }
  if (event.finish == FinishReason::kNone) {
    deliveries_.push_back({it->second.sink, event});
    return std::nullopt;
  }
  Erase(it, event);
  return event.finish;
}

int RequestBook::End(uint64_t id, FinishReason reason) {
  const auto it = pending_.find(id);
  if (it == pending_.end()) return -1;
  const int rank = it->second.rank;
  Erase(it, {id, -1, reason});
  return rank;
}

void RequestBook::Erase(std::map<uint64_t, Pending>::iterator it, const TokenEvent& last) {
  Pending& pending = it->second;
  if (pending.rank >= 0) work_[pending.rank] -= pending.work_tokens;
  deadlines_.erase({pending.deadline_ns, it->first});
  deliveries_.push_back({std::move(pending.sink), last});
  pending_.erase(it);
}

std::optional<uint64_t> RequestBook::first() const {
  if (pending_.empty()) return std::nullopt;
  return pending_.begin()->first;
}

std::optional<std::pair<int64_t, uint64_t>> RequestBook::next_deadline() const {
  if (deadlines_.empty()) return std::nullopt;
  return *deadlines_.begin();
}

void RequestBook::Orphan(int rank) {
  for (auto& [id, pending] : pending_) {
    if (pending.rank == rank) pending.rank = -1;
  }
  work_[rank] = 0;
}

std::vector<RequestBook::Assignment> RequestBook::AssignWaiting() {
  std::vector<Assignment> assignments;
  for (auto& [id, pending] : pending_) {
    if (pending.rank >= 0) continue;
    pending.rank = LeastWork();
    work_[pending.rank] += pending.work_tokens;
    assignments.push_back({pending.rank, pending.request});
  }
  return assignments;
}

}  // namespace ballast
