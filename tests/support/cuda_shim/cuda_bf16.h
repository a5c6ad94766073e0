// Stands for the CUDA toolkit's header of this name: see cuda_runtime.h beside it.
#ifndef BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_BF16_H_
#define BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_BF16_H_

#include "base/dtype.h"

struct __nv_bfloat16 {
  ballast::BFloat16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return ballast::ToFloat(x.value);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {ballast::ToBFloat16(x)};
}

#endif  // BALLAST_TESTS_SUPPORT_CUDA_SHIM_CUDA_BF16_H_
