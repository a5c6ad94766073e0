#include "deploy/gpu/measure.h"

#include <algorithm>

namespace ballast {
namespace {

absl::Status Replay(cudaGraphExec_t graph, cudaStream_t stream, int launches, int replays,
                    Times* times) {
  cudaEvent_t begin = nullptr, end = nullptr;
  BALLAST_CUDA(cudaEventCreateWithFlags(&begin, 0));
  BALLAST_CUDA(cudaEventCreateWithFlags(&end, 0));
  std::vector<double> us;
  for (int i = -2; i < replays; ++i) {  // two to warm up
    BALLAST_CUDA(cudaEventRecord(begin, stream));
    BALLAST_CUDA(cudaGraphLaunch(graph, stream));
    BALLAST_CUDA(cudaEventRecord(end, stream));
    BALLAST_CUDA(cudaStreamSynchronize(stream));
    float ms = 0;
    BALLAST_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) us.push_back(1e3 * double{ms} / launches);
  }
  BALLAST_CUDA(cudaEventDestroy(begin));
  BALLAST_CUDA(cudaEventDestroy(end));
  std::sort(us.begin(), us.end());
  times->median_us = us[us.size() / 2];
  times->spread_us = us[us.size() * 9 / 10] - us[us.size() / 10];
  return absl::OkStatus();
}

}  // namespace

absl::Status Measure(int launches, int replays,
                     const std::function<absl::Status(cudaStream_t)>& launch, Times* times) {
  cudaStream_t stream = nullptr;
  BALLAST_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  BALLAST_CUDA(cudaDeviceSynchronize());
  BALLAST_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  absl::Status launched = absl::OkStatus();
  for (int i = 0; i < launches && launched.ok(); ++i) launched = launch(stream);
  BALLAST_CUDA(cudaStreamEndCapture(stream, &graph));
  BALLAST_RETURN_IF_ERROR(launched);
  BALLAST_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const absl::Status status = Replay(exec, stream, launches, replays, times);
  BALLAST_CUDA(cudaGraphExecDestroy(exec));
  BALLAST_CUDA(cudaGraphDestroy(graph));
  BALLAST_CUDA(cudaStreamDestroy(stream));
  return status;
}

}  // namespace ballast
