#include "kernels/kernel_set.h"

namespace ballast {
namespace {

KernelSet MakeCpuSet(const char* name, decltype(KernelSet::make_matmul) make_matmul) {
  return {.name = name,
          .memory = &HostMemory(),
          .host_memory = &HostMemory(),
          .make_matmul = make_matmul,
          .gate = cpu::Gate,
          .embed = cpu::Embed,
          .add = cpu::Add,
          .add_bias = cpu::AddBias,
          .rms_norm = cpu::RmsNorm,
          .silu_mul = cpu::SiluMul,
          .rotary = cpu::Rotary,
          .kv_write = cpu::KvWrite,
          .attention = cpu::Attention,
          .argmax = cpu::Argmax};
}

}  // namespace

const KernelSet& PlainKernels() {
  static const KernelSet plain = MakeCpuSet("plain", cpu::MakePlainMatmul);
  return plain;
}

const KernelSet* OneDnnKernels() {
  static const bool available = cpu::MakeOneDnnMatmul(64, 64, DType::kF32).ok();
  static const KernelSet onednn = MakeCpuSet("onednn", cpu::MakeOneDnnMatmul);
  return available ? &onednn : nullptr;
}

const KernelSet& DefaultCpuKernels() {
  const KernelSet* fast = OneDnnKernels();
  return fast != nullptr ? *fast : PlainKernels();
}

}  // namespace ballast
