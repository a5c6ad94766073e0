# The CUDA kernels: compiled for the device where BALLAST_WITH_CUDA says so, and everywhere for the emulator of the tests.
set(BALLAST_DEVICE_SOURCES
  kernels/attention.cu
  kernels/block_checksum.cu
  kernels/copy_route.cu
  kernels/decoder_ops.cu
  kernels/device_matmul.cu
  kernels/device_split.cu
  kernels/exchange.cu
  kernels/gate.cu
  kernels/grouped_mlp.cu
  kernels/grouped_mlp_fp8.cu
  kernels/grouped_mlp_tensor.cu
  kernels/row_moves.cu)

# What the serving runtime has for devices, likewise.
set(BALLAST_RUNTIME_DEVICE_SOURCES runtime/carried_moe_layers.cc runtime/device_backend.cc runtime/device_blocks.cc runtime/device_moe_layers.cc
  runtime/device_moe_layout.cc runtime/row_carrier.cc runtime/step_graphs.cc)

if(BALLAST_WITH_CUDA)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  ballast_library(kernels_cuda
    SOURCES ${BALLAST_DEVICE_SOURCES} kernels/device_kernels.cc kernels/device_memory.cc kernels/matmul_cublaslt.cc
    PUBLIC ballast_kernels CUDA::cudart
    PRIVATE CUDA::cublasLt)
  # CMake 3.25 does not know C++20 for CUDA.
  target_compile_options(ballast_kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -fmad=false --expt-relaxed-constexpr>)
  if(BALLAST_WERROR)
    target_compile_options(ballast_kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endif()

# A file of kernels as plain C++, for the emulator.
function(ballast_shim_wrapper source out)
  cmake_path(GET source STEM stem)
  set(wrapper "${PROJECT_BINARY_DIR}/generated/shim/${stem}.cc")
  file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n" @ONLY)
  # Unrolling is for the device.
  set_source_files_properties("${wrapper}" PROPERTIES COMPILE_OPTIONS -Wno-unknown-pragmas)
  set(${out} "${wrapper}" PARENT_SCOPE)
endfunction()

# ballast_device_test(name SOURCES ... [DEVICE_SOURCES ...] [KERNELS ...] LIBS ...)
# One Catch2 program, from one source, for every place where kernels can run: <name>_shim_test for the emulator, and with
# CUDA <name>_gpu_test (label gpu), which is skipped where there is no device unless BALLAST_REQUIRE_GPU=1. DEVICE_SOURCES
# test what the emulator does not have.
function(ballast_device_test name)
  cmake_parse_arguments(arg "" "SHIM_LIB;DEVICE_LIB" "SOURCES;DEVICE_SOURCES;KERNELS;LIBS" ${ARGN})
  set(wrappers "")
  foreach(source IN LISTS arg_KERNELS)
    ballast_shim_wrapper(${source} wrapper)
    list(APPEND wrappers "${wrapper}")
  endforeach()
  ballast_test(${name}_shim SOURCES ${arg_SOURCES} ${wrappers} LIBS ${arg_SHIM_LIB} ballast_kernels_shim ${arg_LIBS})
  if(BALLAST_WITH_CUDA)
    add_executable(${name}_gpu_test
      ${arg_SOURCES} ${arg_DEVICE_SOURCES} ${arg_KERNELS} tests/gpu/main.cc tests/gpu/schedules.cc)
    target_compile_options(${name}_gpu_test PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    target_link_libraries(${name}_gpu_test PRIVATE
      ${arg_DEVICE_LIB} ${arg_LIBS} ballast_kernels_cuda ballast_flags CUDA::cudart Catch2::Catch2)
    catch_discover_tests(${name}_gpu_test TEST_PREFIX "${name}: gpu: "
      PROPERTIES LABELS gpu TIMEOUT 300 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu)
  endif()
endfunction()

# The emulator with the kernels, each in a file of its own that is plain C++.
function(ballast_add_shim)
  set(wrappers "")
  foreach(source IN LISTS BALLAST_DEVICE_SOURCES)
    ballast_shim_wrapper(${source} wrapper)
    list(APPEND wrappers "${wrapper}")
  endforeach()
  add_library(ballast_kernels_shim STATIC
    ${wrappers}
    kernels/device_kernels.cc
    kernels/device_memory.cc
    tests/support/cuda_shim/device_memory.cc
    tests/support/cuda_shim/emulator.cc
    tests/support/cuda_shim/fiber.cc
    tests/support/cuda_shim/guarded.cc
    tests/support/cuda_shim/hopper.cc
    tests/support/cuda_shim/runtime.cc
    tests/support/cuda_shim/schedules.cc)
  # Before the root, so that its headers are found first.
  target_include_directories(ballast_kernels_shim BEFORE PUBLIC tests/support/cuda_shim)
  target_link_libraries(ballast_kernels_shim PUBLIC ballast_kernels PRIVATE ballast_flags)
endfunction()

# All tests of kernels. The emulator switches stacks, which ThreadSanitizer does not follow, and it has one thread.
function(ballast_add_device_tests)
  if(BALLAST_SANITIZE MATCHES "thread")
    return()
  endif()
  ballast_add_shim()
  ballast_device_test(device
    SOURCES
      deploy/gpu/bench_experts.cc
      deploy/gpu/bench_gpu.cc
      deploy/gpu/bench_gpu_report.cc
      deploy/gpu/bench_layer.cc
      deploy/gpu/bench_rank.cc
      deploy/gpu/measure.cc
      tests/gpu/attention_device_test.cc
      tests/gpu/bench_gpu_test.cc
      tests/gpu/block_checksum_device_test.cc
      tests/gpu/decoder_ops_device_test.cc
      tests/gpu/device_memory_test.cc
      tests/gpu/device_matmul_test.cc
      tests/gpu/exchange_device_test.cc
      tests/gpu/gate_device_test.cc
      tests/gpu/grouped_mlp_device_test.cc
      tests/gpu/grouped_mlp_fp8_device_test.cc
      tests/gpu/hopper_device_test.cc
      tests/gpu/layer_device_test.cc
      tests/gpu/row_moves_device_test.cc
      tests/gpu/split_device_test.cc
    DEVICE_SOURCES tests/gpu/matmul_cublaslt_device_test.cc
    KERNELS tests/gpu/hopper_probe.cu
    LIBS ballast_kernels ballast_placement nlohmann_json::nlohmann_json)
  if(TARGET ballast_test_support)
    # CUDA's own build of these is in ballast_runtime_device.
    add_library(ballast_runtime_shim STATIC
      ${BALLAST_RUNTIME_DEVICE_SOURCES} comm/cuda_memory.cc tests/support/shim_kernels.cc)
    target_link_libraries(ballast_runtime_shim PUBLIC ballast_kernels_shim ballast_runtime PRIVATE ballast_flags)
    ballast_device_test(device_runtime
      SOURCES
        tests/gpu/decoder_device_test.cc
        tests/gpu/device_blocks_test.cc
        tests/gpu/expert_store_device_test.cc
      LIBS ballast_test_support
      DEVICE_LIB ballast_runtime_device
      SHIM_LIB ballast_runtime_shim)
    # The command with --device cuda, on the emulator.
    add_executable(ballast_emulated ${BALLAST_COMMAND_SOURCES} deploy/gpu/bench_gpu_none.cc deploy/device_cuda.cc)
    target_link_libraries(ballast_emulated PRIVATE ballast_runtime_shim ${BALLAST_COMMAND_LIBS})
    target_compile_definitions(ballast_emulated PRIVATE BALLAST_VERSION="${PROJECT_VERSION}" BALLAST_COMMIT="emulated")
    # Ranks of several nodes are threads here, over the fake of NCCL, which moves bytes that the host can reach.
    ballast_test(carried_shim
      SOURCES
        tests/gpu/carried_layers_test.cc
        tests/support/fake_nccl.cc
        tests/support/fake_nccl_machine.cc
      LIBS ballast_runtime_shim ballast_test_support)
  endif()
  if(BALLAST_WITH_CUDA)
    add_test(NAME spills
      COMMAND ${CMAKE_COMMAND} -DROOT=${PROJECT_SOURCE_DIR} -DNVCC=${CMAKE_CUDA_COMPILER}
              -DWORK=${CMAKE_CURRENT_BINARY_DIR}/spills -P ${PROJECT_SOURCE_DIR}/tests/gpu/check_spills.cmake)
    set_tests_properties(spills PROPERTIES LABELS tidy TIMEOUT 300)
  endif()
endfunction()
