#ifndef BALLAST_RUNTIME_COPY_STORE_H_
#define BALLAST_RUNTIME_COPY_STORE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/statusor.h"
#include "placement/migration_plan.h"
#include "placement/placement.h"

namespace ballast {

// Bytes that may still be moved each way. What moves is taken off; as chunks are not cut, the last
// one can take it below zero.
struct TransferBudget {
  int64_t send = 0;
  int64_t receive = 0;
};

// Where a rank keeps its copies of experts, as a rebalancer sees it: (Stage Poll* (Commit |
// Discard))*, and Abandon at any time. The real one is ExpertStore.
class CopyStore {
 public:
  virtual ~CopyStore() = default;

  // Starts to bring in what `plan` brings to this rank; `current` is the placement in force.
  virtual absl::Status Stage(const MigrationPlan& plan, const Placement& current) = 0;
  // Moves chunks for as long as `budget` is above zero and the peers are ready. True once
  // everything has arrived, has been sent, and is verified.
  virtual absl::StatusOr<bool> Poll(TransferBudget* budget) = 0;
  // Puts the staged plan in force on this rank. REQUIRES Poll said true.
  virtual void Commit(const Placement& target) = 0;
  // Gives the staged plan up together with all other ranks: messages under way are finished by
  // Poll.
  virtual void Discard() = 0;
  // Gives it up without the others: nothing of it will be sent or taken any more.
  virtual void Abandon() = 0;

  virtual bool staging() const = 0;        // a plan
  virtual bool draining() const = 0;       // messages of a discarded plan are still under way
  virtual size_t block_bytes() const = 0;  // of one copy
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_COPY_STORE_H_
