#ifndef BALLAST_RUNTIME_REQUEST_BOOK_H_
#define BALLAST_RUNTIME_REQUEST_BOOK_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "runtime/generation.h"

namespace ballast {

// How a request came to an end, as the counters know it.
enum class RequestEnd { kFinished, kCancelled, kDeadline, kFailed, kRejected };

// Receives the tokens of one request. Called from the front end's I/O thread: must not block.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  virtual void OnEvent(const TokenEvent& event) = 0;  // the last one has finish != kNone
};

// The requests that were admitted and have not ended: which rank works on each, what it has
// generated, and when it must end. A request whose rank is gone goes on elsewhere from what it has
// generated: as tokens depend on the request and their position alone, its client cannot tell.
//
// A request goes to the rank with the least work: fewest prompt and generated tokens that pending
// requests may still need; ties to the lowest rank.
// THREADS none of its own; the owner locks.
class RequestBook {
 public:
  // A call of a sink that is owed.
  struct Delivery {
    std::shared_ptr<TokenSink> sink;
    TokenEvent event;
  };
  // What a rank is to be given.
  struct Assignment {
    int rank;
    GenerationRequest request;
  };

  RequestBook(int num_ranks, int32_t context_tokens);

  // Whether the rank may be given requests; at the start all may. REQUIRES some rank may
  void SetOpen(int rank, bool open) { open_[rank] = open; }

  // Takes a request in, gives it an id and a rank.
  Assignment Add(GenerationRequest request, std::shared_ptr<TokenSink> sink, int64_t deadline_ns);

  // What a rank said. Events of requests that are not its own, and of tokens that are here already,
  // change nothing. Returns how the request ended, if it did.
  std::optional<FinishReason> OnEvent(int rank, const TokenEvent& event);

  // Ends a request: its sink will hear `reason`. Returns the rank that works on it, or -1 where
  // none does or the request is unknown.
  int End(uint64_t id, FinishReason reason);
  bool contains(uint64_t id) const { return pending_.contains(id); }
  // The lowest id that is pending, and the request with the earliest deadline.
  std::optional<uint64_t> first() const;
  std::optional<std::pair<int64_t, uint64_t>> next_deadline() const;

  // The rank works on nothing any more; its requests wait to be assigned.
  void Orphan(int rank);
  // Gives each waiting request to a rank, lowest id first.
  std::vector<Assignment> AssignWaiting();

  std::vector<Delivery> TakeDeliveries() { return std::exchange(deliveries_, {}); }
  bool has_deliveries() const { return !deliveries_.empty(); }
  size_t size() const { return pending_.size(); }
  int64_t tokens_generated() const { return tokens_generated_; }

 private:
  struct Pending {
    int rank = -1;  // -1: waits to be assigned
    int64_t work_tokens = 0;
    int64_t deadline_ns = 0;
    GenerationRequest request;
    std::shared_ptr<TokenSink> sink;
  };
  int LeastWork() const;
  void Erase(std::map<uint64_t, Pending>::iterator it, const TokenEvent& last);

  const int32_t context_tokens_;
  std::map<uint64_t, Pending> pending_;               // by id
  std::set<std::pair<int64_t, uint64_t>> deadlines_;  // (deadline, id) of each
  std::vector<Delivery> deliveries_;                  // in order
  std::vector<int64_t> work_;                         // tokens that may be needed, by rank
  std::vector<bool> open_;
  uint64_t next_id_ = 1;
  int64_t tokens_generated_ = 0;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_REQUEST_BOOK_H_
