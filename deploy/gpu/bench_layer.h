#ifndef BALLAST_DEPLOY_GPU_BENCH_LAYER_H_
#define BALLAST_DEPLOY_GPU_BENCH_LAYER_H_

#include "absl/status/status.h"
#include "deploy/gpu/bench_gpu.h"

namespace ballast {

// Adds whole MoE layers: logits and choices of the gate, counts and split, routes, dispatch,
// expand, experts in bf16, combine; on one rank, and the same tokens over eight ranks that share
// the device, each a graph on a stream of its own. Rows are named "layer".
//
// Their bytes are what goes in and out of the layer and the parameters of the experts that were
// chosen; rows that pass between kernels are not counted. tests/bench/peers.py measures the same
// work elsewhere, and reads model, ranks and tokens from the row's shape.
absl::Status BenchLayers(bool small, GpuBenchResult* result);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_GPU_BENCH_LAYER_H_
