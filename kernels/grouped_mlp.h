// The experts of a rank on a device: one gated MLP per group of rows, two launches for all groups.
#ifndef BALLAST_KERNELS_GROUPED_MLP_H_
#define BALLAST_KERNELS_GROUPED_MLP_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "base/dtype.h"
#include "kernels/stream.h"

namespace ballast {

// The shape of one expert, and where its parameters lie in its block of an arena.
struct ExpertShape {
  int32_t hidden = 0, inter = 0;  // multiples of 8
  DType dtype = DType::kF32;      // of parameters, activations and results

  // Rows of gate and up alternate in runs of 8, so that a thread that has some columns of gate in
  // its registers has those of up beside them:
  //   rows 16 b + i: row 8 b + i of gate;  rows 16 b + 8 + i: row 8 b + i of up;  i in [0, 8)
  // Then down. All row-major; each part is a multiple of 128 bytes, so nothing lies between.
  // SHAPES gate and up [2 inter, hidden]; down [hidden, inter]
  size_t down_offset() const;
  size_t packed_bytes() const;
};

// Packs one expert: what travels between ranks, and what its checksum covers.
// SHAPES gate, up [inter, hidden], down [hidden, inter] of `type`; packed holds packed_bytes(),
//        16-byte aligned
// ERRORS kInvalidArgument: hidden or inter is not a positive multiple of 8
absl::Status PackExpert(const ExpertShape& shape, const void* gate, const void* up,
                        const void* down, DType type, std::byte* packed);

// How many rows a group mostly has: the height of a tile, never the bits of a row.
enum class GroupSize : uint8_t {
  kLarge,  // 128 rows: prefill
  kSmall,  // 64 rows: decode, where the time is that of reading the parameters
};

// Which kernels compute. The bits of a row are those of the path, so one path serves a model.
enum class MlpPath : uint8_t {
  kBest,    // kTensor for bf16 on Hopper, kPlain otherwise
  kPlain,   // the bits of the CPU, for fp32 and bf16
  kTensor,  // bf16 on Hopper's tensor cores
};

// Rows that are grouped by expert, and the experts' parameters.
//
// Group g has the rows [begin[g], begin[g] + rows[g]) and the parameters at arena + block[g] *
// block_bytes. Groups may follow each other (prefill) or each begin at a multiple of the most rows
// that one can have (decode). begin, rows and block are read when the device gets there, never by
// the host: one captured graph serves every batch and every placement.
// SHAPES begin, rows, block [num_groups]
// REQUIRES groups lie in [0, num_rows) and apart; blocks in [0, num_blocks)
struct ExpertGroups {
  int32_t num_groups = 0;  // at most kMaxMlpGroups
  int32_t num_rows = 0;
  int32_t max_rows = 0;  // that all groups together mostly have: sizes the grid, nothing else
  GroupSize size = GroupSize::kLarge;
  const int32_t* begin = nullptr;
  const int32_t* rows = nullptr;
  const int32_t* block = nullptr;
  const std::byte* arena = nullptr;  // 16-byte aligned
  size_t block_bytes = 0;            // a multiple of 16
  int32_t num_blocks = 0;
};

inline constexpr int32_t kMaxMlpGroups = 1024;

// ERRORS kInvalidArgument: a count, size or alignment that is not allowed
absl::Status CheckExpertGroups(const ExpertGroups& groups, size_t packed_bytes);
// ERRORS kInvalidArgument, with `name`
absl::Status CheckAligned(const char* name, const void* at);

// Computes every group's rows with the parameters of its expert.
//
//   activated[r] = silu(gate x[r]) * (up x[r])     y[r] = down activated[r]
//
// Both are rounded to dtype; sums and silu are fp32. Rows outside of all groups are left alone, in
// y and in activated.
// SHAPES x, y [num_rows, hidden], activated [num_rows, inter] of dtype; 16-byte aligned
// ERRORS kInvalidArgument: a shape, count or alignment that is not allowed; nothing is launched.
//        kUnimplemented: kTensor for fp32 or on another device than Hopper
// STREAM asynchronous, two launches; all arrays stay until they are done
// ORDER  kPlain: as vector_math.h's Dot and Silu. kTensor: one instruction for all tiles, 64 rows
//        by 128 columns by 16 of k, k ascending. So on both the bits of a row depend on the row and
//        its expert: not on its company, nor on where it stands, nor on the groups' size. That the
//        tensor core treats all rows and columns of an instruction alike is a premise.
// NOTE   kTensor has been compiled for sm_90a and run by the emulator of the tests; neither its
//        speed nor its result has been seen on a device.
struct GroupedMlpArgs {
  ExpertShape shape;
  ExpertGroups groups;
  MlpPath path = MlpPath::kBest;
  const void* x = nullptr;
  void* activated = nullptr;
  void* y = nullptr;
};

// Whether the arguments are such.
absl::Status CheckGroupedMlp(const GroupedMlpArgs& args);

namespace cpu {
// The specification of kPlain, whatever the path; within rounding, of kTensor.
absl::Status GroupedMlp(const GroupedMlpArgs& args, Stream stream);
}  // namespace cpu
// Pointers are to device memory.
namespace cuda {
absl::Status GroupedMlp(const GroupedMlpArgs& args, Stream stream);
}  // namespace cuda

}  // namespace ballast

#endif  // BALLAST_KERNELS_GROUPED_MLP_H_
