// The exchange between ranks that can write into each other's memory: dispatch pushes rows, combine
// pulls results, flags that carry a number say how far a rank is. A rank knows its peers by the
// address of their arenas alone: other processes' memory, other devices', or parts of one block.
//
//   gate -> [counts] -> split -> route -> dispatch -> [rows] -> expand -> experts -> [results] ->
//   combine                        [x]: a flag of that name is raised and waited for
//
// A flag is raised with the number of the exchange, so nothing is ever cleared. A peer's memory of
// exchange n is not touched by n + 1 before its owner is through with it: who raises the counts of
// n + 1 has combined n, for which it has waited for everyone's results.
//
// Every exchange is under one epoch of the placement: a rank that has another one in its tables is
// named before anything is sent.
//
// A failure ends a generation of exchanges. The next one begins when all kernels of the old one
// have ended on all its ranks, with a status of 0 and a number that is the same on all and above
// any that one of them had: what a slow rank raised in the end is then long past. Ranks may have
// been lost in between. Such a one may go on writing for a while, and only to its place in the
// arenas of others; so a rank keeps its place for ever, and nobody reads that of one that is gone.
#ifndef BALLAST_KERNELS_EXCHANGE_H_
#define BALLAST_KERNELS_EXCHANGE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "kernels/stream.h"

namespace ballast {

inline constexpr int32_t kMaxPeers = 128;

// What a rank's flags say about another rank.
enum class Flag : int32_t { kCounts, kRows, kResults };
inline constexpr int32_t kNumFlags = 3;

// What ended an exchange. The word in device memory is code << 16 | rank; the first one stays.
enum class ExchangeCode : uint32_t {
  kOk = 0,
  kCountsLate = 1,     // the rank's counts did not come before the deadline
  kRowsLate = 2,       // nor its rows
  kResultsLate = 3,    // nor its results
  kRowsExceeded = 4,   // the rank would get more rows than it has room for
  kSharesWrong = 5,    // the shares of an expert are fewer than its copies (a bug)
  kEpochDiffers = 6,   // the rank's tables are of another epoch
  kLayerTooLarge = 7,  // the rank's tables have more hosts or groups than was said, or other counts
  kAborted = 8,        // by the rank's own host
};
// OK, or what the word says. `rank` in the message is one of this exchange's ranks.
absl::Status ToStatus(uint32_t status_word);
constexpr uint32_t StatusWord(ExchangeCode code, int32_t rank) {
  return static_cast<uint32_t>(code) << 16 | static_cast<uint32_t>(rank);
}
// The rank that was waited for in vain, or -1.
int32_t MissingRank(uint32_t status_word);

// Where things are in an arena, the same on all ranks; every part begins at a multiple of 128
// bytes.
struct ArenaShape {
  int32_t num_ranks = 0;   // that take part
  int32_t num_places = 0;  // of ranks, with those that have been lost; 0: num_ranks
  int32_t num_experts = 0;
  int32_t num_kinds = 2;   // of tokens, counted apart: prefill and decode
  int32_t max_tokens = 0;  // of one rank in one exchange
  int32_t top_k = 0;
  int32_t row_bytes = 0;     // a multiple of 16
  int32_t row_capacity = 0;  // rows that a rank may get for its experts

  constexpr int32_t places() const { return num_places > 0 ? num_places : num_ranks; }
  // P = places(). counts [P, kinds, E]: of the sources, as they come
  constexpr size_t counts_offset() const { return 0; }
  // flags [kNumFlags, P], each in a line of its own
  constexpr size_t flags_offset() const {
    return End(counts_offset(), 4ull * places() * num_kinds * num_experts);
  }
  // num_tokens [P] of the sources
  constexpr size_t tokens_offset() const {
    return End(flags_offset(), size_t{kFlagBytes} * kNumFlags * places());
  }
  // epochs [P] of the sources' tables
  constexpr size_t epochs_offset() const { return End(tokens_offset(), 4ull * places()); }
  // row_of_copy [P, max_tokens, K]: of each copy of a source, its row here, or -1
  constexpr size_t row_of_copy_offset() const { return End(epochs_offset(), 4ull * places()); }
  // rows [P, max_tokens, row_bytes]: token t of source s at [s, t], where a copy of it comes here;
  // not of this rank itself
  constexpr size_t rows_offset() const {
    return End(row_of_copy_offset(), 4ull * places() * max_tokens * top_k);
  }
  // results [row_capacity, row_bytes]
  constexpr size_t results_offset() const {
    return End(rows_offset(), size_t{1} * places() * max_tokens * row_bytes);
  }
  constexpr size_t bytes() const {
    return End(results_offset(), size_t{1} * row_capacity * row_bytes);
  }

  static constexpr size_t kFlagBytes = 128;

 private:
  static constexpr size_t kPart = 128;
  static constexpr size_t End(size_t begin, size_t bytes) {
    return (begin + bytes + kPart - 1) / kPart * kPart;
  }
};
// ERRORS kInvalidArgument names what is out of range
absl::Status CheckArenaShape(const ArenaShape& shape);

// What changes from one exchange to the next, in device memory: a captured graph serves all of
// them.
struct ExchangeState {
  uint32_t status = 0;  // kernels leave it as it first became, and do nothing when it is set
  uint32_t number = 0;  // of the exchange: flags begin as the same; the counts add one
  int32_t blocks_done = 0, blocks_begun = 0;  // of a kernel; the counts clear them
};

// What one rank needs to take part in exchanges.
// REQUIRES arenas and rows are aligned to 16 bytes
struct Exchange {
  ArenaShape shape;
  std::byte* arena[kMaxPeers] = {};  // [R]; arena[rank] is this rank's own
  const int32_t* place = nullptr;    // [R] in all arenas, in device memory; null: 0, 1, 2, ...
  int32_t rank = 0;
  uint64_t deadline_ns = 0;  // of every wait
  // Of a kernel. Ranks that share a device must fit it together: who waits keeps his place.
  int32_t max_blocks = 1056;  // 8 on each of 132 multiprocessors
  ExchangeState* state = nullptr;
};

// Sends each token's row once to every other rank that needs it, and to all ranks where its copies
// go.
// SHAPES x [T, row_bytes]
struct DispatchArgs {
  int32_t num_tokens = 0;
  const std::byte* x = nullptr;
  const int32_t* copy_rank = nullptr;
  const int32_t* copy_row = nullptr;
};

// Waits for the rows of all sources and copies each to the rows of its copies.
// SHAPES own [T, row_bytes]: x of DispatchArgs, as this rank's rows are not sent; x [row_capacity,
//        row_bytes]: rows that no copy has are left as they are
struct ExpandArgs {
  const std::byte* own = nullptr;
  std::byte* x = nullptr;
};

// Tells all that this rank's results are there, waits for theirs, and adds them up:
//   out[t] = base[t] + sum over k of weight[t, k] * result(t, k), k ascending, in fp32
// SHAPES weights [T, K]; base, out [T, width] fp32 (may be one array), width = row_bytes / size
struct PullCombineArgs {
  int32_t num_tokens = 0;
  DType type = DType::kBF16;
  const int32_t* copy_rank = nullptr;
  const int32_t* copy_row = nullptr;
  const float* weights = nullptr;
  const float* base = nullptr;
  float* out = nullptr;
};

// Ranks that share one device, for tests and measurements there: dispatch and expand of all of them
// in one launch, whose blocks are all resident and so may wait for each other.
struct VirtualRank {
  DispatchArgs dispatch;
  ExpandArgs expand;
  Exchange exchange;
};

// COLLECTIVE all ranks launch all of them, with zero tokens if they have none.
// STREAM asynchronous: in this order on one stream of the rank, where flips of its tables come too,
//        between exchanges. Every wait has the deadline of the exchange; what it missed is in the
//        status then, and all later kernels of the exchange do nothing (the experts, which know of
//        no status, find empty groups).
// ERRORS kInvalidArgument: a shape that CheckArenaShape refuses, or more tokens than max_tokens;
//        nothing is launched
namespace cuda {
absl::Status Dispatch(const DispatchArgs& args, const Exchange& exchange, Stream stream);
absl::Status Expand(const ExpandArgs& args, const Exchange& exchange, Stream stream);
absl::Status PullCombine(const PullCombineArgs& args, const Exchange& exchange, Stream stream);
// SHAPES ranks [num_ranks] in device memory. REQUIRES num_ranks * blocks_per_rank <=
// MostResidentBlocks
absl::StatusOr<int32_t> MostResidentBlocks();
// Adds one to the number of every rank: begins an exchange in which the counts are left out.
absl::Status AdvanceNumbers(const VirtualRank* ranks, int32_t num_ranks, Stream stream);
absl::Status DispatchAndExpand(const VirtualRank* ranks, int32_t num_ranks, int32_t blocks_per_rank,
                               Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_EXCHANGE_H_
