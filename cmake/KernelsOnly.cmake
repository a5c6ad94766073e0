# BALLAST_KERNELS_ONLY: the kernels, their tests and their measurements, for a machine with a GPU and none of the other
# packages. Needs CUDA, Abseil, nlohmann-json (headers) and Catch2.
include(BallastCore)
add_executable(ballast-bench-gpu
  deploy/gpu/bench_experts.cc
  deploy/gpu/bench_gpu.cc
  deploy/gpu/bench_gpu_main.cc
  deploy/gpu/bench_gpu_report.cc
  deploy/gpu/bench_layer.cc
  deploy/gpu/bench_rank.cc
  deploy/gpu/measure.cc)
target_link_libraries(ballast-bench-gpu PRIVATE ballast_kernels_cuda ballast_flags CUDA::cudart)
enable_testing()
find_package(Catch2 REQUIRED)
include(Catch)
ballast_add_device_tests()
