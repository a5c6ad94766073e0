// What a rank takes of its machine's memory, known before it takes anything.
#ifndef BALLAST_RUNTIME_MEMORY_PLAN_H_
#define BALLAST_RUNTIME_MEMORY_PLAN_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "placement/placement.h"
#include "runtime/backend.h"
#include "runtime/model_config.h"

namespace ballast {

struct EngineOptions;

// UNITS bytes
struct MemoryPlan {
  int64_t parameters = 0;  // that every rank holds: all but the routed experts
  int64_t experts = 0;     // in the slots of this rank, over all layers
  int64_t transfers = 0;   // copies of experts on their way, and their chunks
  int64_t kv_cache = 0;
  int64_t moe_layers = 0;  // what they take on a device: arena, tables, rows

  int64_t total() const { return parameters + experts + transfers + kv_cache + moe_layers; }
  bool operator==(const MemoryPlan&) const = default;
};

// What an Engine of these options allocates when it is made, to the byte (Engine::memory). What
// steps need comes on top and grows with --max-batch-tokens; while a model is loaded, so does one
// tensor as it stands in the file and as fp32.
//   experts   = slots * layers * expert
//   transfers = staging * expert + 2 * (ranks - 1) * (chunk + its header)
// On a device all but the chunks is its memory, where steps take theirs before they begin.
// ERRORS of make_matmul
absl::StatusOr<MemoryPlan> PlanMemory(const EngineOptions& options, const ModelConfig& config,
                                      const Backend& backend, const Topology& topology,
                                      int32_t rank);

// The memory that the processes of this machine, or of this container, may take together.
int64_t MachineMemory();

}  // namespace ballast

#endif  // BALLAST_RUNTIME_MEMORY_PLAN_H_
