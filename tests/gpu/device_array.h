// An array in device memory, for tests.
#ifndef BALLAST_TESTS_GPU_DEVICE_ARRAY_H_
#define BALLAST_TESTS_GPU_DEVICE_ARRAY_H_

#include <cuda_runtime.h>

#include <catch2/catch.hpp>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace ballast::testing {

inline void RequireCuda(cudaError_t error) {
  INFO(cudaGetErrorString(error));
  REQUIRE(error == cudaSuccess);
}

// Begins poisoned (every byte 0xa5), so that an element nobody wrote shows.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    RequireCuda(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, bytes())));
    Fill(0xa5);
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) { Write(host); }
  ~DeviceArray() { static_cast<void>(cudaFree(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  void Fill(int byte) {
    RequireCuda(cudaMemset(data_, byte, bytes()));
    Settle();
  }
  void Write(const std::vector<T>& host) {
    REQUIRE(host.size() == size_);
    RequireCuda(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
    Settle();
  }
  // The elements after those keep what they had.
  void WriteFirst(const std::vector<T>& host) {
    REQUIRE(host.size() <= size_);
    RequireCuda(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    Settle();
  }
  // Waits for everything first.
  std::vector<T> Read() const {
    RequireCuda(cudaDeviceSynchronize());
    std::vector<T> host(size_);
    RequireCuda(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return host;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  std::span<T> span() const { return {data_, size_}; }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  // Copies from the heap, and what sets memory, may return before they are done.
  static void Settle() { RequireCuda(cudaStreamSynchronize(nullptr)); }

  T* data_ = nullptr;
  size_t size_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_DEVICE_ARRAY_H_
