# How a folder becomes a target.

add_library(ballast_flags INTERFACE)
target_compile_features(ballast_flags INTERFACE cxx_std_20)
target_compile_options(ballast_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow>
  # A fused multiply-add must stand where the source says std::fma, or the bits of a row would depend on inlining.
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>
  # Nobody reads errno after a square root, and with it none can be taken for a whole vector.
  $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno>
  $<$<BOOL:${BALLAST_WERROR}>:$<$<COMPILE_LANGUAGE:CXX>:-Werror>>)
# GCC 12 builds {a, a, 0, 0} of 64-bit words as {a, a, a, a} where it may move 32 bytes at once (AVX-512): a constant's
# leading zero words are not counted. With 16 bytes at once there is nothing to miscount.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 12
   AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13 AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_options(ballast_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-mmove-max=128;-mstore-max=128>)
endif()
# GCC takes the members that a std::variant does not hold for uninitialised when one is moved.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(ballast_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized>)
endif()
if(BALLAST_MARCH)
  target_compile_options(ballast_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-march=${BALLAST_MARCH}>)
endif()
if(BALLAST_SANITIZE)
  target_compile_options(ballast_flags INTERFACE
    -fsanitize=${BALLAST_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  target_link_options(ballast_flags INTERFACE -fsanitize=${BALLAST_SANITIZE})
endif()

# ballast_library(folder SOURCES ... [PUBLIC targets...] [PRIVATE targets...])
# Makes the static library ballast_<folder>; include paths start at the repository root.
function(ballast_library folder)
  cmake_parse_arguments(arg "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(ballast_${folder} STATIC ${arg_SOURCES})
  add_library(Ballast::${folder} ALIAS ballast_${folder})
  target_include_directories(ballast_${folder} PUBLIC "${PROJECT_SOURCE_DIR}")
  target_link_libraries(ballast_${folder} PUBLIC ${arg_PUBLIC} PRIVATE ballast_flags ${arg_PRIVATE})
  target_compile_features(ballast_${folder} PUBLIC cxx_std_20)
  set_target_properties(ballast_${folder} PROPERTIES POSITION_INDEPENDENT_CODE ON)
endfunction()

# With a sanitizer the sources of a test program itself are not optimised: half of the time to build is theirs, what they test
# is in libraries, and nothing is instrumented less.
function(ballast_compile_quickly target)
  if(BALLAST_SANITIZE)
    target_compile_options(${target} PRIVATE -O0)
  endif()
endfunction()

# ballast_test(name SOURCES ... LIBS ...)
# One Catch2 program, registered as one test per case under the label `unit`.
function(ballast_test name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBS" ${ARGN})
  add_executable(${name}_test ${arg_SOURCES})
  target_link_libraries(${name}_test PRIVATE ${arg_LIBS} ballast_flags Catch2::Catch2WithMain)
  ballast_compile_quickly(${name}_test)
  catch_discover_tests(${name}_test TEST_PREFIX "${name}: "
    PROPERTIES LABELS unit TIMEOUT ${BALLAST_UNIT_TEST_SECONDS} SKIP_REGULAR_EXPRESSION "BALLAST_TRACES is not set")
endfunction()

# ballast_mpi_test(name NP 1 2 4 SOURCES ... LIBS ...)
# One program with a main of its own, run under mpirun at each number of processes: name.np1, ... The label is `mpi`.
function(ballast_mpi_test name)
  cmake_parse_arguments(arg "" "" "NP;SOURCES;LIBS" ${ARGN})
  add_executable(${name}_mpi_test ${arg_SOURCES})
  target_link_libraries(${name}_mpi_test PRIVATE ${arg_LIBS} ballast_flags MPI::MPI_CXX)
  # Open MPI leaves memory behind and orders its own locks badly; mpirun as root and with more ranks than cores has to
  # be asked for.
  set(environment
    OMPI_ALLOW_RUN_AS_ROOT=1
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    OMPI_MCA_btl_vader_single_copy_mechanism=none
    ASAN_OPTIONS=detect_leaks=0
    TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/mpi/tsan_suppressions.txt)
  foreach(np IN LISTS arg_NP)
    add_test(NAME ${name}.np${np}
      COMMAND ${MPIEXEC_EXECUTABLE} --oversubscribe --bind-to none ${MPIEXEC_NUMPROC_FLAG} ${np}
              $<TARGET_FILE:${name}_mpi_test>)
    set_tests_properties(${name}.np${np} PROPERTIES
      LABELS mpi TIMEOUT 120 PROCESSORS ${np} ENVIRONMENT "${environment}")
  endforeach()
endfunction()

# ballast_serve_test(name [ALONE] [COMMAND target] SOURCES ... LIBS ...)
# One Catch2 program that runs the command (or another target) with mpirun, registered as one test per case under the label `serve`. ALONE: no
# other test runs meanwhile, for the time within which a server hears a signal.
function(ballast_serve_test name)
  cmake_parse_arguments(arg "ALONE" "COMMAND" "SOURCES;LIBS" ${ARGN})
  if(NOT arg_COMMAND)
    set(arg_COMMAND ballast)
  endif()
  add_executable(${name}_test ${arg_SOURCES})
  target_link_libraries(${name}_test PRIVATE ${arg_LIBS} ballast_flags Catch2::Catch2WithMain)
  target_compile_definitions(${name}_test PRIVATE
    BALLAST_SOURCE_DIR="${PROJECT_SOURCE_DIR}" BALLAST_COMMAND="$<TARGET_FILE:${arg_COMMAND}>")
  ballast_compile_quickly(${name}_test)
  add_dependencies(${name}_test ${arg_COMMAND})
  # Open MPI leaks by design. Under a sanitizer a part of them has to do: they take minutes.
  if(BALLAST_SANITIZE)
    set(cases TEST_SPEC "[sanitized]")
  endif()
  catch_discover_tests(${name}_test TEST_PREFIX "${name}: " ${cases}
    PROPERTIES LABELS serve TIMEOUT 600 RUN_SERIAL ${arg_ALONE} ENVIRONMENT ASAN_OPTIONS=detect_leaks=0)
endfunction()
