// The memory side of the all-to-all: which copy goes where, packing rows into messages, grouping
// what arrived by expert, and adding the results up. What moves the messages is in comm/.
//
// Copy i = t * K + k is the k-th choice of token t.
#ifndef BALLAST_KERNELS_DISPATCH_H_
#define BALLAST_KERNELS_DISPATCH_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/layer_hosts.h"
#include "kernels/stream.h"

namespace ballast {

// A message from a source rank to a host rank: the counts, one entry per copy in (t, k) order, then
// each token's row once. All offsets derive from the two counts.
struct DispatchMessage {
  struct Entry {
    uint32_t row;     // into the rows of this message
    uint32_t expert;  // logical
  };
  uint32_t num_rows = 0;
  uint32_t num_copies = 0;

  static constexpr size_t kEntriesOffset = 8;
  size_t rows_offset() const {
    return RoundUp(kEntriesOffset + num_copies * sizeof(Entry), kCacheLineBytes);
  }
  size_t bytes(size_t row_bytes) const { return rows_offset() + num_rows * row_bytes; }
};

// Where the copies of this rank's batch go.
struct Route {
  std::vector<int32_t> copy_rank;        // [T*K] rank that computes the copy
  std::vector<int32_t> copy_index;       // [T*K] its place among the copies sent to that rank
  std::vector<DispatchMessage> message;  // [R] counts per destination
};

// Assigns every copy to a host: expert e's copies, in (t, k) order, go to its hosts in the order of
// the host table, share[h] of them to host h. Stable, no atomics.
// SHAPES ids [T, K]; share [num_hosts], sum over the hosts of e = copies of e in ids
// ERRORS kInvalidArgument: a share does not add up
struct RouteArgs {
  int32_t num_tokens = 0, top_k = 0;
  std::span<const int32_t> ids;
  const LayerHosts* hosts = nullptr;
  std::span<const int32_t> share;
  Route* route = nullptr;
};

// Writes the messages. A row goes once to each rank that needs it. Rows of no bytes: the entries
// alone, where the rows travel by other means, as `Group` reads them then.
// SHAPES rows [T, row_bytes]; out[r] has room for route.message[r].bytes(row_bytes)
struct PackArgs {
  int32_t num_tokens = 0, top_k = 0;
  std::span<const int32_t> ids;
  const Route* route = nullptr;
  std::span<const std::byte> rows;
  size_t row_bytes = 0;
  std::span<const std::span<std::byte>> out;
};

// What arrived at this rank, grouped by expert.
struct Grouped {
  std::vector<int32_t> group_begin;  // [G+1] first row of each local expert, multiples of kRowBlock
  std::vector<int32_t> group_rows;     // [G] rows in use
  std::vector<int32_t> source_begin;   // [R+1] first copy of each source, into position
  std::vector<int32_t> position;       // [copies received] row of the copy in the grouped order
  int32_t num_copies = 0;
};

// Groups received copies by local expert; inside a group by source rank, then in the order sent.
// SHAPES received[r]: message of rank r, may be empty; group_of_expert [E] in [0, G) or -1
// ERRORS kInternal: an entry names a row or an expert that is not here (with the rank)
struct GroupArgs {
  std::span<const std::span<const std::byte>> received;
  std::span<const int32_t> group_of_expert;
  int32_t num_groups = 0;
  size_t row_bytes = 0;
  Grouped* grouped = nullptr;
  AlignedBuffer* x = nullptr;  // gets the rows; padding rows keep what they had
};

// Writes the results of one source's copies in the order they came, rounded to `type`.
// SHAPES y [grouped rows, width] fp32   out [copies of the source, width] of `type`
struct ReturnArgs {
  const Grouped* grouped = nullptr;
  int32_t source = 0;
  const float* y = nullptr;
  int32_t width = 0;
  DType type = DType::kF32;
  std::span<std::byte> out;
};

// out[t] = base[t] + sum over k of weight[t, k] * result[t, k], k ascending, in fp32.
// SHAPES weights [T, K]; returned[r]: rows of rank r in copy_index order, of `type`; base, out [T,
// H]
struct CombineArgs {
  int32_t num_tokens = 0, top_k = 0, width = 0;
  const Route* route = nullptr;
  std::span<const float> weights;
  std::span<const std::span<const std::byte>> returned;
  DType type = DType::kF32;
  const float* base = nullptr;
  float* out = nullptr;
};

namespace cpu {
absl::Status AssignCopies(const RouteArgs& args, Stream stream);
void Pack(const PackArgs& args, Stream stream);
absl::Status Group(const GroupArgs& args, Stream stream);
void PackResults(const ReturnArgs& args, Stream stream);
void Combine(const CombineArgs& args, Stream stream);
}  // namespace cpu

}  // namespace ballast

#endif  // BALLAST_KERNELS_DISPATCH_H_
