#include "runtime/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace ballast {
namespace {

int32_t BlocksFor(int32_t tokens) { return (tokens + kKvBlockTokens - 1) / kKvBlockTokens; }

}  // namespace

Scheduler::Scheduler(const Options& options, KvCache* cache) : options_(options), cache_(cache) {}

int32_t Scheduler::MostTokens(const GenerationRequest& request) const {
  const int64_t wanted = static_cast<int64_t>(request.prompt.size()) + request.max_tokens;
  return static_cast<int32_t>(std::min<int64_t>(wanted, options_.context_tokens));
}

void Scheduler::Add(GenerationRequest request, std::vector<TokenEvent>* events) {
  const size_t known = request.prompt.size() + request.generated.size();
  const auto unknown = [this](int32_t token) { return token < 0 || token >= options_.vocab_size; };
  const bool bad = std::ranges::any_of(request.prompt, unknown) ||
                   std::ranges::any_of(request.generated, unknown) || request.prompt.empty() ||
                   request.max_tokens < 1 ||
                   known >= static_cast<size_t>(options_.context_tokens) ||
                   static_cast<int64_t>(request.generated.size()) >= request.max_tokens ||
                   BlocksFor(MostTokens(request)) > cache_->num_blocks();
  if (bad) {
    events->push_back({request.id, -1, FinishReason::kFailed});
    return;
  }
  waiting_.push_back(std::move(request));
}

void Scheduler::Cancel(uint64_t request_id, std::vector<TokenEvent>* events) {
  const auto is_it = [&](const auto& x) {
    if constexpr (requires { x.request; }) {
      return x.request.id == request_id;
    } else {
      return x.id == request_id;
    }
  };
  if (auto it = std::find_if(waiting_.begin(), waiting_.end(), is_it); it != waiting_.end()) {
    waiting_.erase(it);
  } else if (auto at = std::find_if(running_.begin(), running_.end(), is_it);
             at != running_.end()) {
    cache_->Give(at->blocks);
    running_.erase(at);
  } else {
    return;
  }
  events->push_back({request_id, -1, FinishReason::kCancelled});
}

void Scheduler::Clear() {
  waiting_.clear();
  for (const Sequence& sequence : running_) cache_->Give(sequence.blocks);
  running_.clear();
}

void Scheduler::Admit() {
  while (!waiting_.empty() && num_running() < options_.max_seqs) {
    const int32_t blocks = BlocksFor(MostTokens(waiting_.front()));
    if (blocks > cache_->free_blocks()) return;
    Sequence& sequence = running_.emplace_back();
    sequence.request = std::move(waiting_.front());
    waiting_.pop_front();
    sequence.tokens = sequence.request.prompt;
    sequence.tokens.insert(sequence.tokens.end(), sequence.request.generated.begin(),
                           sequence.request.generated.end());
    sequence.blocks = cache_->Take(blocks);
  }
}

void Scheduler::Append(Sequence* sequence, int32_t count) {
  const int32_t offset = static_cast<int32_t>(batch_.block_table.size());
  batch_.block_table.insert(batch_.block_table.end(), sequence->blocks.begin(),
                            sequence->blocks.end());
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = sequence->num_cached + i;
    batch_.token.push_back(sequence->tokens[position]);
    batch_.position.push_back(position);
    batch_.table_offset.push_back(offset);
  }
  sequence->num_scheduled = count;
  const int32_t end = sequence->num_cached + count;
  if (end == static_cast<int32_t>(sequence->tokens.size())) {
    const bool greedy = sequence->request.sampling.temperature == 0;
    (greedy ? batch_.greedy_rows : batch_.logit_rows).push_back(batch_.num_tokens() - 1);
  }
}

const Batch& Scheduler::BuildBatch() {
  Admit();
  batch_.Clear();
  int32_t budget = options_.max_batch_tokens;
  const auto uncached = [](const Sequence& s) {
    return static_cast<int32_t>(s.tokens.size()) - s.num_cached;
  };
  for (Sequence& sequence : running_) sequence.num_scheduled = 0;
  for (Sequence& sequence : running_) {
    if (uncached(sequence) != 1 || budget == 0) continue;
    Append(&sequence, 1);
    --budget;
  }
  for (Sequence& sequence : running_) {
    const int32_t left = uncached(sequence);
    if (left == 1 || budget == 0) continue;
    const int32_t count = std::min({left, budget, options_.prefill_chunk});
    Append(&sequence, count);
    batch_.num_prefill += count;
    budget -= count;
  }
  return batch_;
}

void Scheduler::Finish(const BatchOutput& output, std::vector<TokenEvent>* events) {
  // Rows were appended sequence by sequence: decoding ones first, then the rest.
  size_t row = 0, greedy = 0;
  const size_t vocab = static_cast<size_t>(options_.vocab_size);
  BALLAST_CHECK(output.logits.size() == batch_.logit_rows.size() * vocab);
  BALLAST_CHECK(output.greedy.size() == batch_.greedy_rows.size());
  const auto pass = [&](bool decoding) {
    for (auto it = running_.begin(); it != running_.end();) {
      Sequence& s = *it;
      const int32_t before = static_cast<int32_t>(s.tokens.size()) - s.num_cached;
      if (s.num_scheduled == 0 || (before == 1) != decoding) {
        ++it;
        continue;
      }
      s.num_cached += s.num_scheduled;
      s.num_scheduled = 0;
      bool ended = false;
      if (s.num_cached == static_cast<int32_t>(s.tokens.size())) {
        const SamplingParams& sampling = s.request.sampling;
        const int64_t position = static_cast<int64_t>(s.tokens.size());
        ended = Extend(&s,
                       sampling.temperature == 0
                           ? output.greedy[greedy++]
                           : sampler_.Sample(output.logits.subspan(row++ * vocab, vocab), sampling,
                                             position),
                       events);
      }
      if (ended) {
        cache_->Give(s.blocks);
        it = running_.erase(it);
      } else {
        ++it;
      }
    }
  };
  pass(/*decoding=*/true);
  pass(/*decoding=*/false);
  BALLAST_CHECK(row == batch_.logit_rows.size() && greedy == batch_.greedy_rows.size());
}

bool Scheduler::Extend(Sequence* sequence, int32_t token, std::vector<TokenEvent>* events) {
  const GenerationRequest& request = sequence->request;
  const int64_t position = static_cast<int64_t>(sequence->tokens.size());
  if (std::ranges::find(options_.eos_tokens, token) != options_.eos_tokens.end()) {
    events->push_back({request.id, -1, FinishReason::kStop});
    return true;
  }
  sequence->tokens.push_back(token);
  const bool full = static_cast<int32_t>(sequence->tokens.size()) >= MostTokens(request);
  events->push_back({request.id, token, full ? FinishReason::kLength : FinishReason::kNone,
                     static_cast<int32_t>(position - static_cast<int64_t>(request.prompt.size()))});
  return full;
}

}  // namespace ballast
