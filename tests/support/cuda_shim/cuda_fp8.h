// Stands for the CUDA toolkit's header of this name: see cuda_runtime.h beside it.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_FP8_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_FP8_H_

#include <cstdint>

#include "kernels/e4m3.h"

enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };
inline uint8_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t) {
  return ballast::ToE4M3(x);
}

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_FP8_H_
