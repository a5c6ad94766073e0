#ifndef BALLAST_KERNELS_DEVICE_KERNELS_H_
#define BALLAST_KERNELS_DEVICE_KERNELS_H_

#include "kernels/kernel_set.h"

namespace ballast {

// The operations on a device, with products of our own: every one has the bits of PlainKernels.
// Built where CUDA is, as is the other.
const KernelSet& PlainDeviceKernels();
// What serves: with cuBLASLt's products (matmul_cublaslt.h).
const KernelSet& DeviceKernels();

}  // namespace ballast

#endif  // BALLAST_KERNELS_DEVICE_KERNELS_H_
