#ifndef BALLAST_KERNELS_KERNEL_SET_H_
#define BALLAST_KERNELS_KERNEL_SET_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/decoder_ops.h"
#include "kernels/gate.h"
#include "kernels/matmul.h"
#include "kernels/memory.h"

namespace ballast {

// One backend: the same operations, with the same signatures, chosen at start.
struct KernelSet {
  const char* name;
  Memory* memory;       // of all arrays that the operations are given
  Memory* host_memory;  // of arrays on the host that are copied from there: pinned for a device
  absl::StatusOr<std::unique_ptr<Matmul>> (*make_matmul)(int n, int k, DType dtype);
  absl::Status (*gate)(const GateArgs&, Stream);
  absl::Status (*embed)(const EmbedArgs&, Stream);
  absl::Status (*add)(const AddArgs&, Stream);
  absl::Status (*add_bias)(const AddBiasArgs&, Stream);
  absl::Status (*rms_norm)(const RmsNormArgs&, Stream);
  absl::Status (*silu_mul)(const SiluMulArgs&, Stream);
  absl::Status (*rotary)(const RotaryArgs&, Stream);
  absl::Status (*kv_write)(const KvWriteArgs&, Stream);
  absl::Status (*attention)(const AttentionArgs&, Stream);
  absl::Status (*argmax)(const ArgmaxArgs&, Stream);
};

const KernelSet& PlainKernels();       // loops only: the specification
const KernelSet* OneDnnKernels();      // products through oneDNN; nullptr where not built in
const KernelSet& DefaultCpuKernels();  // the faster of the two

}  // namespace ballast

#endif  // BALLAST_KERNELS_KERNEL_SET_H_
