# The CUDA kernels: compiled for the device where BALLAST_WITH_CUDA says so, and everywhere for the emulator of the tests.
set(BALLAST_DEVICE_SOURCES
  kernels/attention.cu
  kernels/copy_route.cu
  kernels/decoder_ops.cu
  kernels/device_matmul.cu
  kernels/device_split.cu
  kernels/exchange.cu
  kernels/gate.cu)

if(BALLAST_WITH_CUDA)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  ballast_library(kernels_cuda SOURCES ${BALLAST_DEVICE_SOURCES} PUBLIC ballast_kernels CUDA::cudart)
  # CMake 3.25 does not know C++20 for CUDA.
  target_compile_options(ballast_kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -fmad=false --expt-relaxed-constexpr>)
  if(BALLAST_WERROR)
    target_compile_options(ballast_kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endif()

# ballast_device_test(name SOURCES ... LIBS ...)
# One Catch2 program, from one source, for every place where kernels can run: <name>_shim_test for the emulator, and with
# CUDA <name>_gpu_test (label gpu), which is skipped where there is no device unless BALLAST_REQUIRE_GPU=1.
function(ballast_device_test name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBS" ${ARGN})
  ballast_test(${name}_shim SOURCES ${arg_SOURCES} LIBS ballast_kernels_shim ${arg_LIBS})
  if(BALLAST_WITH_CUDA)
    add_executable(${name}_gpu_test ${arg_SOURCES} tests/gpu/main.cc tests/gpu/schedules.cc)
    target_link_libraries(${name}_gpu_test PRIVATE
      ${arg_LIBS} ballast_kernels_cuda ballast_flags CUDA::cudart Catch2::Catch2)
    catch_discover_tests(${name}_gpu_test TEST_PREFIX "${name}: gpu: "
      PROPERTIES LABELS gpu TIMEOUT 300 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu)
  endif()
endfunction()

# The emulator with the kernels, each in a file of its own that is plain C++.
function(ballast_add_shim)
  set(wrappers "")
  foreach(source IN LISTS BALLAST_DEVICE_SOURCES)
    cmake_path(GET source STEM stem)
    set(wrapper "${PROJECT_BINARY_DIR}/generated/shim/${stem}.cc")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n" @ONLY)
    list(APPEND wrappers "${wrapper}")
  endforeach()
  add_library(ballast_kernels_shim STATIC
    ${wrappers}
    tests/support/cuda_shim/emulator.cc
    tests/support/cuda_shim/fiber.cc
    tests/support/cuda_shim/guarded.cc
    tests/support/cuda_shim/runtime.cc
    tests/support/cuda_shim/schedules.cc)
  # Before the root, so that its headers are found first.
  target_include_directories(ballast_kernels_shim BEFORE PUBLIC tests/support/cuda_shim)
  target_link_libraries(ballast_kernels_shim PUBLIC ballast_kernels PRIVATE ballast_flags)
  # Unrolling is for the device.
  target_compile_options(ballast_kernels_shim PRIVATE -Wno-unknown-pragmas)
endfunction()
