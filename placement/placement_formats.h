#ifndef BALLAST_PLACEMENT_PLACEMENT_FORMATS_H_
#define BALLAST_PLACEMENT_PLACEMENT_FORMATS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "placement/placement.h"

namespace ballast {

// Files in which other systems keep placements.
enum class PlacementFormat {
  kNative,  // Placement::ToJson
  kEplb,  // JSON {"phy2log": [[expert per slot]], "log2phy": [[[slots, -1]]], "logcnt": [[copies]]}
  kSglang,  // JSON {"physical_to_logical_map": [[expert per slot]]}, for --init-expert-location
  kTrtllm,  // YAML: num_slots, initial_global_assignments {layer: [expert per slot]}
  kAscend,  // JSON {"moe_layer_count", "layer_list": [{"device_list": [{"device_expert"}]}]}
  kCsv,     // text: layer,rank,experts with the experts of a rank separated by spaces
};

// "native", "eplb", "sglang", "trtllm", "ascend", "csv".
// ERRORS kInvalidArgument names the value and the choices
absl::StatusOr<PlacementFormat> ParsePlacementFormat(const std::string& name);
std::vector<std::string> PlacementFormatNames();

// The text of the file. `first_layer` is the number that the other system gives to the first MoE
// layer (trtllm counts the dense layers before it; the rest number MoE layers from 0).
// ERRORS kInvalidArgument: the format has no empty slots, and the placement has (layer and slot)
absl::StatusOr<std::string> ExportPlacement(const Placement& placement, PlacementFormat format,
                                            int32_t first_layer = 0);

struct ImportOptions {
  int32_t num_ranks = 0;    // for eplb, sglang and trtllm, which do not say
  int32_t num_nodes = 1;    // equal nodes; native says itself
  int32_t num_experts = 0;  // 0: the largest id and one more
};

// `name` begins every message.
// ERRORS kInvalidArgument says what is wrong and where
absl::StatusOr<Placement> ImportPlacement(const std::string& name, const std::string& text,
                                          PlacementFormat format, const ImportOptions& options);

}  // namespace ballast

#endif  // BALLAST_PLACEMENT_PLACEMENT_FORMATS_H_
