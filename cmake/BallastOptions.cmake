# Every option of the build, with its default.
option(BALLAST_WITH_ONEDNN "Matrix products through oneDNN (OFF: the plain kernels only)" ON)
option(BALLAST_WITH_CUDA "Compile the CUDA kernels" OFF)
option(BALLAST_WITH_NCCL "Compile what talks to NCCL (needs CUDA's toolkit)" OFF)
option(BALLAST_KERNELS_ONLY "Only the kernels, their tests and measurements (with BALLAST_WITH_CUDA)" OFF)
option(BALLAST_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(BALLAST_WERROR "Warnings are errors" OFF)
set(BALLAST_UNIT_TEST_SECONDS 300 CACHE STRING "Longest time that a unit test may take")
set(BALLAST_MARCH "native" CACHE STRING
    "Processor that the host code is compiled for (-march); empty: the compiler's default")
set(BALLAST_SANITIZE "" CACHE STRING "Sanitizers, as for -fsanitize= (address,undefined or thread)")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
