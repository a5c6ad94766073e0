#ifndef BALLAST_RUNTIME_SCHEDULER_H_
#define BALLAST_RUNTIME_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <list>
#include <span>
#include <vector>

#include "runtime/decoder.h"
#include "runtime/generation.h"
#include "runtime/kv_cache.h"
#include "runtime/sampler.h"

namespace ballast {

// The sequences of one rank: which of their tokens run in the next step (continuous batching).
//
// Sequences that decode go first, one token each; prompts follow in order of arrival, in chunks,
// as far as the step's token budget reaches. A sequence is admitted when the blocks for all it may
// become are free, so it never has to be interrupted.
// Call order: (Add | Cancel)* BuildBatch (Finish | nothing).
// THREADS one (the step thread).
class Scheduler {
 public:
  struct Options {
    int32_t max_seqs = 64;           // sequences that run at a time
    int32_t max_batch_tokens = 512;  // tokens of one step
    int32_t prefill_chunk = 128;     // most tokens of one prompt in one step
    int32_t context_tokens = 0;
    std::vector<int32_t> eos_tokens = {};  // any of them ends a sequence
    int32_t vocab_size = 0;
  };
  Scheduler(const Options& options, KvCache* cache);

  // Takes a request in. One that can never fit, or has a token outside the vocabulary, is answered
  // with kFailed in `events`.
  void Add(GenerationRequest request, std::vector<TokenEvent>* events);
  // Ends the request, if it is here, with kCancelled.
  void Cancel(uint64_t request_id, std::vector<TokenEvent>* events);

  // Forgets every request, without a word.
  void Clear();

  // The next step's tokens; the batch may be empty.
  const Batch& BuildBatch();

  // Takes what the batch came to: draws tokens, ends sequences, reports both.
  void Finish(const BatchOutput& output, std::vector<TokenEvent>* events);

  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }
  int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }

 private:
  struct Sequence {
    GenerationRequest request;
    std::vector<int32_t> tokens;  // prompt, then generated
    int32_t num_cached = 0;       // tokens whose keys and values are in the cache
    int32_t num_scheduled = 0;    // tokens of the batch being built
    std::vector<int32_t> blocks;
  };
  int32_t MostTokens(const GenerationRequest& request) const;
  void Admit();
  void Append(Sequence* sequence, int32_t count);
  // Appends the next token; true when the sequence has ended.
  bool Extend(Sequence* sequence, int32_t token, std::vector<TokenEvent>* events);

  Options options_;
  KvCache* cache_;
  Sampler sampler_;
  std::deque<GenerationRequest> waiting_;
  std::list<Sequence> running_;  // in order of admission
  Batch batch_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_SCHEDULER_H_
