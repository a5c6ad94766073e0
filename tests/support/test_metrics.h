// The metrics of rank 0 of a server that a test puts together.
#ifndef BALLAST_TESTS_SUPPORT_TEST_METRICS_H_
#define BALLAST_TESTS_SUPPORT_TEST_METRICS_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "monitor/metrics.h"

namespace ballast::testing {

struct TestMetricsShape {
  int32_t num_layers = 1;
  int32_t num_experts = 0;
  int32_t top_k = 1;
  int32_t num_ranks = 1;
};

inline absl::StatusOr<std::unique_ptr<RankMetrics>> TestMetrics(const TestMetricsShape& shape) {
  return RankMetrics::Create({.rank = 0,
                              .node = "test",
                              .backend = "cpu",
                              .version = "test",
                              .commit = "",
                              .model = "tiny",
                              .num_layers = shape.num_layers,
                              .num_experts = shape.num_experts,
                              .top_k = shape.top_k,
                              .num_ranks = shape.num_ranks});
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_TEST_METRICS_H_
