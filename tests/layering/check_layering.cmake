# Checks the sources under ROOT: include arrows go down only, the four folders of L1 never include each other,
# third-party headers stay in the files that own them, and no file, function or line is too long (reference: the layers in
# ARCHITECTURE.md). Prints every breach and fails if there is one.
#   cmake -DROOT=<folder> -P check_layering.cmake
cmake_minimum_required(VERSION 3.25)
set(MAX_LINES 500)
set(MAX_COLUMNS 100)
set(MAX_FUNCTION_LINES 70)

# What each folder may include of ours.
set(may_base base)
foreach(folder kernels placement comm monitor)
  set(may_${folder} base ${folder})
endforeach()
set(may_runtime base kernels placement comm monitor runtime)
set(may_deploy ${may_runtime} deploy)
set(may_tests ${may_deploy} tests)
set(folders base kernels placement comm monitor runtime deploy tests)

# Which files own a third-party header: "what is included|who may".
set(owners
  "mpi\\.h|comm/mpi_[^/]*\\.cc|tests/mpi/[^/]*\\.cc"
  "nccl(_device)?\\.h|comm/nccl_[^/]*\\.cc|tests/gpu/[^/]*"
  "cuda_runtime\\.h|[^ ]*\\.cuh?|kernels/device_memory\\.cc|comm/(cuda|nccl)_[^/]*\\.cc|deploy/gpu/[^/]*|tests/(gpu|mpi)/[^/]*"
  "cublasLt\\.h|kernels/matmul_cublaslt\\.cc"
  "prometheus/[^>]*|monitor/[^/]*\\.cc|tests/monitor/[^/]*\\.cc")

set(breaches "")
set(num_files 0)

function(check_include path number line)
  string(REGEX REPLACE "/.*" "" from "${path}")
  if(line MATCHES "^#include \"([a-z]+)/[^\"]*\"")
    set(to "${CMAKE_MATCH_1}")
    if(to IN_LIST folders AND NOT to IN_LIST may_${from})
      list(APPEND breaches "${path}:${number}: ${from}/ may not include ${to}/")
    endif()
  elseif(line MATCHES "^#include \"([^\"/]*)\"")
    list(APPEND breaches "${path}:${number}: \"${CMAKE_MATCH_1}\" does not start at the root")
  elseif(line MATCHES "^#include <([^>]*)>")
    set(header "${CMAKE_MATCH_1}")
    foreach(entry IN LISTS owners)
      string(FIND "${entry}" "|" bar)
      string(SUBSTRING "${entry}" 0 ${bar} pattern)
      math(EXPR bar "${bar} + 1")
      string(SUBSTRING "${entry}" ${bar} -1 files)
      if(header MATCHES "^${pattern}$" AND NOT path MATCHES "^(${files})$")
        list(APPEND breaches "${path}:${number}: <${header}> belongs to other files")
      endif()
    endforeach()
  endif()
  set(breaches "${breaches}" PARENT_SCOPE)
endfunction()

function(check_file path)
  file(READ "${ROOT}/${path}" text)
  # Characters that mean something in a list of CMake.
  string(REGEX REPLACE "[][;\\]" "_" text "${text}")
  string(REGEX REPLACE "\n$" "" text "${text}")
  string(REPLACE "\n" ";" lines "${text}")
  list(LENGTH lines num_lines)
  if(num_lines GREATER MAX_LINES)
    list(APPEND breaches "${path}: ${num_lines} lines, allowed: ${MAX_LINES}")
  endif()
  set(number 0)
  set(begin 1)
  foreach(line IN LISTS lines)
    math(EXPR number "${number} + 1")
    string(LENGTH "${line}" columns)
    if(columns GREATER MAX_COLUMNS)
      # Bytes were counted; a character of several bytes is one column.
      string(REGEX REPLACE "[^ -~]+" "?" plain "${line}")
      string(LENGTH "${plain}" columns)
    endif()
    if(columns GREATER MAX_COLUMNS)
      list(APPEND breaches "${path}:${number}: ${columns} columns, allowed: ${MAX_COLUMNS}")
    endif()
    # A function ends with a brace at the left edge; its signature is the last line that began there.
    if(line MATCHES "^[A-Za-z_]")
      set(begin ${number})
    elseif(line STREQUAL "}")
      math(EXPR function_lines "${number} - ${begin} + 1")
      if(function_lines GREATER MAX_FUNCTION_LINES)
        list(APPEND breaches
          "${path}:${begin}: a function of ${function_lines} lines, allowed: ${MAX_FUNCTION_LINES}")
      endif()
    endif()
    if(line MATCHES "^#include")
      check_include("${path}" ${number} "${line}")
    endif()
  endforeach()
  set(breaches "${breaches}" PARENT_SCOPE)
endfunction()

foreach(folder IN LISTS folders)
  file(GLOB_RECURSE paths RELATIVE "${ROOT}"
    "${ROOT}/${folder}/*.h" "${ROOT}/${folder}/*.cc" "${ROOT}/${folder}/*.cu" "${ROOT}/${folder}/*.cuh")
  foreach(path IN LISTS paths)
    if(path MATCHES "^tests/layering/")
      continue()
    endif()
    math(EXPR num_files "${num_files} + 1")
    check_file("${path}")
  endforeach()
endforeach()

if(num_files EQUAL 0)
  message(FATAL_ERROR "no source under ${ROOT}")
endif()
foreach(breach IN LISTS breaches)
  message("${breach}")
endforeach()
list(LENGTH breaches num_breaches)
if(num_breaches GREATER 0)
  message(FATAL_ERROR "${num_breaches} breaches in ${num_files} files")
endif()
message(STATUS "${num_files} files keep the layers")
