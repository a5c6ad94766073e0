#include "kernels/device_kernels.h"

#include "kernels/device_matmul.h"
#include "kernels/device_memory.h"

namespace ballast {

const KernelSet& PlainDeviceKernels() {
  static const KernelSet plain = {.name = "cuda-plain",
                                  .memory = &cuda::DeviceMemory(),
                                  .host_memory = &cuda::PinnedMemory(),
                                  .make_matmul = cuda::MakePlainDeviceMatmul,
                                  .gate = cuda::Gate,
                                  .embed = cuda::Embed,
                                  .add = cuda::Add,
                                  .add_bias = cuda::AddBias,
                                  .rms_norm = cuda::RmsNorm,
                                  .silu_mul = cuda::SiluMul,
                                  .rotary = cuda::Rotary,
                                  .kv_write = cuda::KvWrite,
                                  .attention = cuda::Attention,
                                  .argmax = cuda::Argmax};
  return plain;
}

}  // namespace ballast
