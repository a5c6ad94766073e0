# Compiles the hot kernels for sm_90a and reads what the assembler says of each: no register may be spilled, no array may
# lie in local memory (a stack frame), and products of a warpgroup may not be serialised.
#   cmake -DROOT=<folder> -DNVCC=<compiler> -DWORK=<folder> -P check_spills.cmake
cmake_minimum_required(VERSION 3.25)

# "source|what the mangled names of its hot kernels match". Of the gate: 16 experts per lane at most.
set(hot
  "kernels/attention.cu|AttentionKernel"
  "kernels/block_checksum.cu|BlockChecksumKernel"
  "kernels/copy_route.cu|RouteKernel|TileCountsKernel"
  "kernels/device_matmul.cu|Kernel"
  "kernels/device_split.cu|SplitKernel|ExchangeCountsKernel"
  "kernels/exchange.cu|DispatchKernel|ExpandKernel|CombineKernel|VirtualRanksKernel"
  "kernels/gate.cu|GateKernelILi(1|2|4|8|16)EE"
  "kernels/grouped_mlp.cu|PlainMlpKernel"
  "kernels/grouped_mlp_fp8.cu|Fp8MlpKernel|QuantiseRowsKernel"
  "kernels/grouped_mlp_tensor.cu|TensorMlpKernel"
  "kernels/row_moves.cu|GatherRowsKernel|CombineRowsKernel")

file(MAKE_DIRECTORY "${WORK}")
set(faults "")
foreach(entry IN LISTS hot)
  string(REGEX MATCH "^([^|]*)\\|(.*)$" matched "${entry}")
  set(source "${CMAKE_MATCH_1}")
  set(pattern "${CMAKE_MATCH_2}")
  execute_process(
    COMMAND "${NVCC}" -std=c++20 -O3 -DNDEBUG -fmad=false --expt-relaxed-constexpr "-I${ROOT}" -gencode=arch=compute_90a,code=sm_90a
            -Xptxas -v -cubin -o "${WORK}/kernels.cubin" "${ROOT}/${source}"
    RESULT_VARIABLE result OUTPUT_VARIABLE report ERROR_VARIABLE report)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${source} does not compile:\n${report}")
  endif()
  if(report MATCHES "(Potential Performance Loss|setmaxnreg)[^\n]*")
    list(APPEND faults "${source}: ${CMAKE_MATCH_0}")
  endif()
  string(REGEX MATCHALL "Compiling entry function '[^']*'[^\n]*\n[^\n]*\n[^\n]*bytes stack frame[^\n]*" kernels
         "${report}")
  set(num_hot 0)
  foreach(kernel IN LISTS kernels)
    string(REGEX MATCH "function '([^']*)'" matched "${kernel}")
    set(name "${CMAKE_MATCH_1}")
    if(NOT name MATCHES "${pattern}")
      continue()
    endif()
    math(EXPR num_hot "${num_hot} + 1")
    string(REGEX MATCH "([0-9]+) bytes stack frame, ([0-9]+) bytes spill stores, ([0-9]+) bytes spill loads" numbers
           "${kernel}")
    if(NOT numbers STREQUAL "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
      list(APPEND faults "${source}: ${name}: ${numbers}")
    endif()
  endforeach()
  if(num_hot EQUAL 0)
    list(APPEND faults "${source}: no kernel matches ${pattern}")
  endif()
  message(STATUS "${source}: ${num_hot} hot kernels")
endforeach()
foreach(fault IN LISTS faults)
  message("${fault}")
endforeach()
list(LENGTH faults num_faults)
if(num_faults GREATER 0)
  message(FATAL_ERROR "${num_faults} faults")
endif()
