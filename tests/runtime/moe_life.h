#ifndef BALLAST_TESTS_RUNTIME_MOE_LIFE_H_
#define BALLAST_TESTS_RUNTIME_MOE_LIFE_H_

#include <cstdint>
#include <string>

#include "placement/split.h"

namespace ballast::testing {

// What one life of MoE layers came to.
struct MoeLifeOutcome {
  std::string failure;  // empty: every invariant held
  SplitMode split = SplitMode::kExact;
  int64_t steps = 0;
  int64_t flips = 0, aborts = 0;
  int64_t copies = 0;          // experts that flips brought to ranks that lacked them
  int64_t rows = 0;            // outputs compared: one per token and layer
  int64_t differing_bits = 0;  // between them and the outputs of one rank
};

// One or two MoE layers on one to eight ranks, which are threads, through steps of random batches
// while plans are staged, committed and given up. All is drawn from the seed: shape, routing rule,
// backend, split mode, uneven slots, placements with empty slots and several copies on a rank,
// batches (of no tokens, too), when a plan reaches each rank, chunks and slices, and which plans
// must fail (another target than promised, a checksum that does not hold, no time).
//
// The layers, stores, rebalancers and step protocols are the real ones. It fails if a plan ends
// otherwise than it must, if after a flip a store holds anything else than the placement says, byte
// for byte, if the counts are not those of the tokens, or if the ranks cannot go on. Outputs are
// compared bit for bit with those of one rank that gets all tokens as one batch.
//
// The life ends after `flips` flips, or as many as the seed says (-1): none to three. How many
// steps a transfer takes depends on how the threads are scheduled; nothing else does.
MoeLifeOutcome LiveMoe(uint64_t seed, int64_t flips = -1);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_RUNTIME_MOE_LIFE_H_
