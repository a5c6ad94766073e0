#include "runtime/step_graphs.h"

#include <algorithm>
#include <utility>

#include "base/status.h"

namespace ballast {
namespace {

constexpr size_t kMostShapes = 64;  // a graph takes some megabytes of the device

}  // namespace

absl::Status StepGraphs::Run(const StepShape& shape, int64_t version,
                             const std::function<absl::Status()>& work) {
  if (version != version_) entries_.clear();
  version_ = version;
  const auto [at, is_new] = entries_.try_emplace(shape);
  Entry& entry = at->second;
  entry.last_use = ++uses_;
  if (is_new) {
    if (entries_.size() > kMostShapes) DropOldest();
    return work();
  }
  if (!entry.graph.has_value()) {
    BALLAST_ASSIGN_OR_RETURN(cuda::Graph graph, cuda::Graph::Capture(stream_, work));
    entry.graph = std::move(graph);
  }
  ++num_launches_;
  return entry.graph->Launch(stream_);
}

void StepGraphs::DropOldest() {
  entries_.erase(std::ranges::min_element(
      entries_, {}, [](const auto& shape_and_entry) { return shape_and_entry.second.last_use; }));
}

}  // namespace ballast
