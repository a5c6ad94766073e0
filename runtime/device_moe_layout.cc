#include "runtime/device_moe_layout.h"

#include <algorithm>

#include "base/aligned_buffer.h"
#include "kernels/copy_route.h"
#include "kernels/device_hosts.h"

namespace ballast {
namespace {

constexpr size_t kPart = 128;  // bytes: parts of tables begin at multiples of it

}  // namespace

DeviceMoeLayout::DeviceMoeLayout(const MoeLayers::Options& o, const Topology& topology)
    : places(topology.num_ranks()),
      // Ranks that are left get more slots where theirs do not do, and those that come back have
      // theirs.
      max_hosts(std::min(topology.num_slots() + o.gate.num_experts + topology.num_ranks(),
                         topology.num_ranks() * o.gate.num_experts)),
      max_groups(o.gate.num_experts),
      table_stride(0) {
  shape = {.num_ranks = places,
           .num_places = places,
           .num_experts = o.gate.num_experts,
           .num_kinds = kNumTokenKinds,
           .max_tokens = o.max_tokens,
           .top_k = o.gate.top_k,
           .row_bytes = o.hidden * static_cast<int32_t>(SizeOf(o.dtype))};
  table_stride = TableOf(0).end;
  log_stride = static_cast<size_t>(places) * kNumTokenKinds * o.gate.num_experts +
               static_cast<size_t>(max_hosts) + static_cast<size_t>(places);
  // Whatever the gate chooses and wherever experts are, there is room.
  const int64_t rows = int64_t{places} * o.max_tokens * std::min(o.gate.top_k, max_groups);
  shape.row_capacity = static_cast<int32_t>(rows <= INT32_MAX ? rows : 0);  // none: it is refused
}

DeviceMoeLayout::Table DeviceMoeLayout::TableOf(int32_t layer) const {
  Table table;
  table.hosts = static_cast<size_t>(layer) * table_stride;
  table.words = table.hosts + RoundUp(sizeof(DeviceHosts), kPart);
  const int64_t words = (shape.num_experts + 1) + 3 * int64_t{max_hosts} + places + (places + 1);
  table.blocks = table.words + RoundUp(WordBytes(words), kPart);
  table.end = table.blocks + RoundUp(WordBytes(max_groups), kPart);
  return table;
}

std::array<size_t, DeviceMoeLayout::kNumParts> DeviceMoeLayout::PartBytes(
    const MoeLayers::Options& o) const {
  const int64_t experts = o.gate.num_experts, copies = int64_t{o.max_tokens} * o.gate.top_k;
  const size_t layers = static_cast<size_t>(o.num_layers);
  const size_t capacity = static_cast<size_t>(shape.row_capacity);
  return {layers * table_stride,
          sizeof(ExchangeState),
          WordBytes(places),
          RoundUp(static_cast<size_t>(o.max_tokens), kRowBlock) * WordBytes(experts),
          layers * WordBytes(copies),
          WordBytes(copies),
          WordBytes(kNumTokenKinds * experts),
          WordBytes(kNumTokenKinds * experts + 1),
          layers * log_stride * sizeof(int32_t),
          WordBytes(max_hosts),
          WordBytes(max_hosts),
          WordBytes(max_groups + 1),
          WordBytes(max_groups),
          WordBytes(copies),
          WordBytes(copies),
          WordBytes(NumRouteTiles(static_cast<int32_t>(copies)) * experts),
          capacity * static_cast<size_t>(shape.row_bytes) +
              capacity * static_cast<size_t>(o.expert_inter) * SizeOf(o.dtype)};
}

}  // namespace ballast
