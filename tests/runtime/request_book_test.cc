#include "runtime/request_book.h"

#include <catch2/catch.hpp>

namespace ballast {
namespace {

class Recorder : public TokenSink {
 public:
  void OnEvent(const TokenEvent& event) override { events.push_back(event); }
  std::vector<TokenEvent> events;
};

GenerationRequest Request(size_t prompt_tokens, int32_t max_tokens) {
  GenerationRequest request;
  request.prompt.assign(prompt_tokens, 7);
  request.max_tokens = max_tokens;
  return request;
}

void Deliver(RequestBook& book) {
  for (const auto& delivery : book.TakeDeliveries()) delivery.sink->OnEvent(delivery.event);
}

TEST_CASE("requests go to the open rank with the least work", "[runtime][requests]") {
  RequestBook book(3, 100);
  const auto sink = std::make_shared<Recorder>();
  CHECK(book.Add(Request(10, 10), sink, 1).rank == 0);
  CHECK(book.Add(Request(5, 5), sink, 1).rank == 1);
  CHECK(book.Add(Request(1, 200), sink, 1).rank == 2);  // 100: the context ends it
  CHECK(book.Add(Request(5, 6), sink, 1).rank == 1);    // 21 now
  CHECK(book.Add(Request(1, 1), sink, 1).rank == 0);
  book.SetOpen(1, false);
  book.SetOpen(0, false);
  CHECK(book.Add(Request(1, 1), sink, 1).rank == 2);
}

TEST_CASE("what was generated goes on at another rank, and counts once", "[runtime][requests]") {
  RequestBook book(2, 100);
  const auto sink = std::make_shared<Recorder>();
  const uint64_t id = book.Add(Request(3, 4), sink, 1).request.id;
  const auto token = [&](int rank, int32_t value, int32_t index, FinishReason finish) {
    return book.OnEvent(rank, {id, value, finish, index});
  };
  CHECK_FALSE(token(0, 50, 0, FinishReason::kNone).has_value());
  CHECK_FALSE(token(0, 51, 1, FinishReason::kNone).has_value());
  CHECK_FALSE(token(1, 51, 2, FinishReason::kNone).has_value());  // not its own
  book.Orphan(0);
  book.SetOpen(0, false);
  CHECK_FALSE(token(0, 52, 2, FinishReason::kNone).has_value());  // too late
  const auto given = book.AssignWaiting();
  REQUIRE(given.size() == 1);
  CHECK(given[0].rank == 1);
  CHECK(given[0].request.id == id);
  CHECK(given[0].request.generated == std::vector<int32_t>{50, 51});
  CHECK(book.AssignWaiting().empty());
  CHECK_FALSE(token(1, 51, 1, FinishReason::kNone).has_value());  // it is here already
  CHECK_FALSE(token(1, 52, 2, FinishReason::kNone).has_value());
  CHECK(token(1, 53, 3, FinishReason::kLength) == FinishReason::kLength);
  Deliver(book);
  std::vector<int32_t> tokens;
  for (const TokenEvent& event : sink->events) tokens.push_back(event.token);
  CHECK(tokens == std::vector<int32_t>{50, 51, 52, 53});
  CHECK(book.size() == 0);
  CHECK(book.tokens_generated() == 4);
  // All its work is forgotten: rank 1 is as free as a new one.
  book.SetOpen(0, true);
  CHECK(book.Add(Request(1, 1), sink, 1).rank == 0);
  CHECK(book.Add(Request(1, 1), sink, 1).rank == 1);
}

TEST_CASE("a request ends once, wherever it is", "[runtime][requests]") {
  RequestBook book(2, 100);
  const auto sink = std::make_shared<Recorder>();
  const uint64_t a = book.Add(Request(3, 4), sink, 30).request.id;
  const uint64_t b = book.Add(Request(3, 4), sink, 20).request.id;
  CHECK(book.next_deadline()->second == b);
  CHECK(book.first() == a);
  book.Orphan(0);
  CHECK(book.End(a, FinishReason::kCancelled) == -1);  // nobody works on it
  CHECK(book.End(a, FinishReason::kCancelled) == -1);
  CHECK(book.End(b, FinishReason::kDeadline) == 1);
  CHECK_FALSE(book.OnEvent(1, {b, 9, FinishReason::kNone, 0}).has_value());
  CHECK_FALSE(book.next_deadline().has_value());
  CHECK_FALSE(book.first().has_value());
  CHECK(book.AssignWaiting().empty());
  Deliver(book);
  REQUIRE(sink->events.size() == 2);
  CHECK(sink->events[0].finish == FinishReason::kCancelled);
  CHECK(sink->events[1].finish == FinishReason::kDeadline);
}

}  // namespace
}  // namespace ballast
