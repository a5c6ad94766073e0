#ifndef BALLAST_PLACEMENT_POLICY_H_
#define BALLAST_PLACEMENT_POLICY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"

namespace ballast {

// What a policy may look at when it plans one layer.
struct LayerPlanInput {
  int32_t layer;
  const Placement* current;       // the placement in force
  std::span<const int64_t> load;  // [E] copies per logical expert in the window
  int32_t num_groups;             // expert groups of the model (1: none)
};

// Decides which logical expert each slot of a layer should hold. A policy is a pure function of its
// input: same input, same bytes out.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual const char* name() const = 0;
  // Whether the placement that this policy starts from has its spare slots filled (as a ring).
  virtual bool fills_spare_slots_at_start() const { return true; }
  // Whether the policy can plan for such a placement, before it is asked to.
  // ERRORS kInvalidArgument names the policy and what it cannot do
  virtual absl::Status CheckSupport(const Placement&) const { return absl::OkStatus(); }
  // [num_slots] the wanted row of the layer, or nullopt when the layer should stay as it is.
  virtual std::optional<std::vector<int32_t>> PlanLayer(const LayerPlanInput& input) const = 0;
};

// "static", "never", "eplb". ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name);
// Names that MakePolicy accepts, for help texts.
std::vector<std::string> PolicyNames();

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_POLICY_H_
