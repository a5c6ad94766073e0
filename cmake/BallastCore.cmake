# What the kernels' own build has too: base, placement, kernels.

# ---- L0 -------------------------------------------------------------------------------------------------------------
ballast_library(base
  SOURCES base/block_checksum.cc base/check.cc base/file.cc base/log.cc base/npy.cc
  PUBLIC absl::status absl::statusor absl::strings)

# ---- L1: these four never include each other --------------------------------------------------------------------------
# A policy is a file (placement/policy.h says how): what lies in the folder is compiled and listed.
file(GLOB policy_files CONFIGURE_DEPENDS placement/policies/*.cc)
set(policy_list "")
foreach(file IN LISTS policy_files)
  cmake_path(GET file STEM stem)
  string(APPEND policy_list "BALLAST_POLICY_FILE(${stem})\n")
endforeach()
file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/generated/placement/policy_files.inc" CONTENT "${policy_list}" @ONLY)

ballast_library(placement
  SOURCES
    ${policy_files}
    placement/cluster_model.cc
    placement/controller.cc
    placement/cost_model.cc
    placement/eplb.cc
    placement/esft.cc
    placement/full_plan.cc
    placement/migration_plan.cc
    placement/placement.cc
    placement/placement_check.cc
    placement/placement_formats.cc
    placement/policy.cc
    placement/rank_prices.cc
    placement/regret.cc
    placement/regroup.cc
    placement/replay.cc
    placement/replica_budget.cc
    placement/row_search.cc
    placement/rules.cc
    placement/split.cc
    placement/split_cost.cc
    placement/split_exact.cc
    placement/trace.cc
    placement/traffic_memory.cc
    placement/water_fill.cc
  PUBLIC ballast_base
  PRIVATE nlohmann_json::nlohmann_json)

target_include_directories(ballast_placement PRIVATE "${PROJECT_BINARY_DIR}/generated")
# Vectors of sixteen floats are passed between our own functions only.
target_compile_options(ballast_placement PRIVATE -Wno-psabi)

set(BALLAST_MATMUL_SOURCE kernels/matmul_no_onednn.cc)
if(BALLAST_WITH_ONEDNN)
  set(BALLAST_MATMUL_SOURCE kernels/matmul_onednn.cc)
endif()
ballast_library(kernels
  SOURCES
    kernels/decoder_ops.cc
    kernels/device_hosts.cc
    kernels/dispatch.cc
    kernels/exchange.cc
    kernels/gate.cc
    kernels/gated_mlp.cc
    kernels/grouped_mlp.cc
    kernels/grouped_mlp_fp8.cc
    kernels/kernel_set.cc
    kernels/memory.cc
    kernels/matmul_plain.cc
    kernels/row_moves.cc
    ${BALLAST_MATMUL_SOURCE}
  PUBLIC ballast_base
  PRIVATE $<$<BOOL:${BALLAST_WITH_ONEDNN}>:OneDnn::OneDnn> $<$<BOOL:${BALLAST_WITH_ONEDNN}>:OpenMP::OpenMP_CXX>)
# The kernels are written so that these change speed only: no reassociation, no contraction.
target_compile_options(ballast_kernels PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno -fno-trapping-math>)

include(BallastDevice)

