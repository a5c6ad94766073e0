#ifndef BALLAST_PLACEMENT_PLACEMENT_CHECK_H_
#define BALLAST_PLACEMENT_PLACEMENT_CHECK_H_

#include <span>

#include "absl/status/status.h"
#include "placement/placement.h"

namespace ballast {

// Checks a placement from its slots alone, by code that shares nothing with what made it: slots
// belong to one rank each, experts are in range, every expert of every layer has a slot, the
// inverse tables (hosts, replicas, Hosts) say of each expert and rank what the slots say, and the
// fingerprint is that of the slots.
//
// Slow and obvious: O(layers * (slots + experts * ranks)). Meant for each new placement before it
// may count, and for GET /v1/verify; not for every step.
// ERRORS kInternal names the layer, and the slot, expert or rank that is wrong
absl::Status CheckPlacement(const Placement& placement);
// The same of some layers, without the fingerprint: for a placement that differs in these alone
// from one that was checked.
absl::Status CheckLayers(const Placement& placement, std::span<const Placement::LayerRow> layers);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_PLACEMENT_CHECK_H_
