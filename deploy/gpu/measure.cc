#include "deploy/gpu/measure.h"

#include <algorithm>

#include "base/dtype.h"
#include "base/random.h"

namespace ballast {
namespace {

// One sequence, captured.
struct Sequence {
  cudaStream_t stream = nullptr;
  cudaGraphExec_t graph = nullptr;
  cudaEvent_t end = nullptr;
};

absl::Status Capture(int launches, const LaunchFunction& launch, Sequence* sequence) {
  BALLAST_CUDA(cudaStreamCreateWithFlags(&sequence->stream, cudaStreamNonBlocking));
  BALLAST_CUDA(cudaEventCreateWithFlags(&sequence->end, 0));
  cudaGraph_t graph = nullptr;
  BALLAST_CUDA(cudaStreamBeginCapture(sequence->stream, cudaStreamCaptureModeThreadLocal));
  absl::Status launched = absl::OkStatus();
  for (int i = 0; i < launches && launched.ok(); ++i) launched = launch(sequence->stream);
  BALLAST_CUDA(cudaStreamEndCapture(sequence->stream, &graph));
  BALLAST_RETURN_IF_ERROR(launched);
  BALLAST_CUDA(cudaGraphInstantiate(&sequence->graph, graph, 0));
  return CudaStatus(cudaGraphDestroy(graph), "cudaGraphDestroy");
}

// The first stream is where the time is taken.
absl::Status Replay(const std::vector<Sequence>& all, cudaEvent_t begin, float* ms) {
  BALLAST_CUDA(cudaEventRecord(begin, all[0].stream));
  for (const Sequence& s : all) {
    if (s.stream != all[0].stream) BALLAST_CUDA(cudaStreamWaitEvent(s.stream, begin, 0));
    BALLAST_CUDA(cudaGraphLaunch(s.graph, s.stream));
  }
  for (const Sequence& s : all) {
    if (s.stream == all[0].stream) continue;
    BALLAST_CUDA(cudaEventRecord(s.end, s.stream));
    BALLAST_CUDA(cudaStreamWaitEvent(all[0].stream, s.end, 0));
  }
  BALLAST_CUDA(cudaEventRecord(all[0].end, all[0].stream));
  BALLAST_CUDA(cudaStreamSynchronize(all[0].stream));
  return CudaStatus(cudaEventElapsedTime(ms, begin, all[0].end), "cudaEventElapsedTime");
}

}  // namespace

absl::Status FillWithNoise(OnDevice<std::byte>* to, bool small) {
  std::vector<uint16_t> noise(small ? 1 << 10 : 32 << 20);
  Random random(1);
  for (uint16_t& bits : noise) {
    bits = ToBFloat16(static_cast<float>(random.Uniform() - 0.5) / 16).bits;
  }
  const size_t piece = noise.size() * sizeof(uint16_t);
  for (size_t at = 0; at < to->size(); at += piece) {
    BALLAST_CUDA(cudaMemcpy(to->data() + at, noise.data(), std::min(to->size() - at, piece),
                            cudaMemcpyHostToDevice));
  }
  return absl::OkStatus();
}

absl::Status Measure(int launches, int replays, const LaunchFunction& launch, Times* times) {
  return MeasureTogether(launches, replays, {launch}, times);
}

absl::Status MeasureTogether(int launches, int replays, const std::vector<LaunchFunction>& all,
                             Times* times) {
  BALLAST_CUDA(cudaDeviceSynchronize());
  std::vector<Sequence> sequences(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    BALLAST_RETURN_IF_ERROR(Capture(launches, all[i], &sequences[i]));
  }
  cudaEvent_t begin = nullptr;
  BALLAST_CUDA(cudaEventCreateWithFlags(&begin, 0));
  std::vector<double> us;
  for (int i = -2; i < replays; ++i) {  // two to warm up
    float ms = 0;
    BALLAST_RETURN_IF_ERROR(Replay(sequences, begin, &ms));
    if (i >= 0) us.push_back(1e3 * double{ms} / launches);
  }
  BALLAST_CUDA(cudaEventDestroy(begin));
  for (const Sequence& s : sequences) {
    BALLAST_CUDA(cudaEventDestroy(s.end));
    BALLAST_CUDA(cudaGraphExecDestroy(s.graph));
    BALLAST_CUDA(cudaStreamDestroy(s.stream));
  }
  std::sort(us.begin(), us.end());
  times->median_us = us[us.size() / 2];
  times->spread_us = us[us.size() * 9 / 10] - us[us.size() / 10];
  return absl::OkStatus();
}

}  // namespace ballast
