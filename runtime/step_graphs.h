#ifndef BALLAST_RUNTIME_STEP_GRAPHS_H_
#define BALLAST_RUNTIME_STEP_GRAPHS_H_

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>

#include "absl/status/status.h"
#include "kernels/device_memory.h"
#include "runtime/backend.h"

namespace ballast {

// Steps of a device that come again: what they put on the stream is captured the second time that
// their shape comes, and launched as a whole from then on. A host that would be busy with thousands
// of launches a step makes one.
// THREADS one
class StepGraphs {
 public:
  explicit StepGraphs(Stream stream) : stream_(stream) {}

  // Puts `work` on the stream, which for one shape and version is always the same.
  // ERRORS those of `work`, and of the launch
  absl::Status Run(const StepShape& shape, int64_t version,
                   const std::function<absl::Status()>& work);

  int64_t num_launches() const { return num_launches_; }  // of graphs

 private:
  struct Entry {
    std::optional<cuda::Graph> graph;  // none: seen once
    int64_t last_use = 0;
  };
  void DropOldest();

  const Stream stream_;
  int64_t version_ = -1;
  int64_t uses_ = 0, num_launches_ = 0;
  std::map<StepShape, Entry> entries_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_STEP_GRAPHS_H_
