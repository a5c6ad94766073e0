// Device memory and times, for the measurements of this folder.
#ifndef BALLAST_DEPLOY_GPU_MEASURE_H_
#define BALLAST_DEPLOY_GPU_MEASURE_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ballast {

inline absl::Status CudaStatus(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cudaGetErrorString(error)));
}
#define BALLAST_CUDA(call) BALLAST_RETURN_IF_ERROR(CudaStatus(call, #call))

// Device memory that lives as long as the object.
template <typename T>
class OnDevice {
 public:
  OnDevice() = default;
  ~OnDevice() { static_cast<void>(cudaFree(data_)); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  absl::Status Allocate(size_t count) {
    BALLAST_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)));
    BALLAST_CUDA(cudaMemset(data_, 0, count * sizeof(T)));
    count_ = count;
    return absl::OkStatus();
  }
  absl::Status Set(const std::vector<T>& host) {
    if (count_ != host.size()) BALLAST_RETURN_IF_ERROR(Allocate(host.size()));
    BALLAST_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return absl::OkStatus();
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Random bf16 of either sign below 1/32, the same piece again and again: zeros would run faster
// than real numbers do. `small`: a short piece.
absl::Status FillWithNoise(OnDevice<std::byte>* to, bool small);

// Times of a launch sequence: captured once, `launches` times in a row, and replayed.
struct Times {
  double median_us = 0, spread_us = 0;
};
using LaunchFunction = std::function<absl::Status(cudaStream_t)>;
absl::Status Measure(int launches, int replays, const LaunchFunction& launch, Times* times);
// The same of sequences beside each other, each a graph on a stream of its own: from when all may
// begin to the end of the last.
absl::Status MeasureTogether(int launches, int replays, const std::vector<LaunchFunction>& all,
                             Times* times);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_GPU_MEASURE_H_
