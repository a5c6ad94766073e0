// What --device cuda runs on the emulator, which has no cuBLASLt.
#include "kernels/device_kernels.h"

namespace ballast {

const KernelSet& DeviceKernels() {
  return PlainDeviceKernels();
}

}  // namespace ballast
