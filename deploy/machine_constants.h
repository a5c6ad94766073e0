#ifndef BALLAST_DEPLOY_MACHINE_CONSTANTS_H_
#define BALLAST_DEPLOY_MACHINE_CONSTANTS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "comm/transport.h"

namespace ballast {

// One expert of a model: a gated MLP.
struct ExpertShape {
  int32_t hidden = 0, inter = 0;
  DType dtype = DType::kF32;
};

// What the cost model needs of one rank. Times are medians of repeated runs.
struct ComputeConstants {
  double read_bytes = 0.0;  // streamed to measure what follows: beyond every cache
  double read_gb_per_s = 0.0;
  double expert_bytes = 0.0;    // of one expert's packed parameters
  double expert_read_us = 0.0;  // to stream them from memory
  double block_us = 0.0;        // kRowBlock rows of one expert, parameters cached if they fit
  double token_us = 0.0;        // one row among many
  double gflop_per_s = 0.0;     // of these
};

// What it needs of the link between two ranks.
struct LinkConstants {
  double message_us = 0.0;         // of an empty message, one way
  double link_us_per_token = 0.0;  // a row of activations more
  double copy_us = 0.0;            // to receive one expert
};

// Measures this rank with the product's own kernels.
// ERRORS kResourceExhausted: no memory for the stream; as the kernels
absl::StatusOr<ComputeConstants> MeasureCompute(const ExpertShape& shape);

// Measures between ranks 0 and 1; both call it, each gets rank 0's figures (rank 1: zeros).
// COLLECTIVE of ranks 0 and 1, on their step threads
// ERRORS kUnavailable, kDeadlineExceeded: the other rank is lost
absl::StatusOr<LinkConstants> MeasureLink(const ExpertShape& shape, size_t expert_bytes,
                                          Transport* transport);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_MACHINE_CONSTANTS_H_
