#ifndef BALLAST_RUNTIME_DEVICE_MOE_LAYOUT_H_
#define BALLAST_RUNTIME_DEVICE_MOE_LAYOUT_H_

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels/exchange.h"
#include "placement/placement.h"
#include "runtime/moe_layers.h"

namespace ballast {

// UNITS bytes of so many words of the device's tables.
constexpr size_t WordBytes(int64_t count) {
  return static_cast<size_t>(count) * sizeof(int32_t);
}

// What DeviceMoeLayers have in device memory, and where: the same for all generations of a job.
struct DeviceMoeLayout {
  DeviceMoeLayout(const MoeLayers::Options& options, const Topology& first);

  // Where the parts of a layer's table are: DeviceHosts, the words that it points to, and the
  // blocks of this rank's groups. UNITS bytes from the begin of all tables
  struct Table {
    size_t hosts, words, blocks, end;
  };
  Table TableOf(int32_t layer) const;

  // Bytes of the buffers, in the order of DeviceMoeLayers' on the device.
  static constexpr size_t kNumParts = 17;
  std::array<size_t, kNumParts> PartBytes(const MoeLayers::Options& options) const;

  int32_t places;                 // ranks of the job
  int32_t max_hosts, max_groups;  // of a layer, of a rank in a layer; under any placement
  size_t table_stride;            // bytes of a layer
  size_t log_stride;              // words of a layer: counts [places, 2, E], quota [max_hosts],
                                  // load [places]
  ArenaShape shape;               // a row_capacity of 0: more rows than can be numbered
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DEVICE_MOE_LAYOUT_H_
