#include "runtime/memory_plan.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "base/aligned_buffer.h"
#include "base/status.h"
#include "kernels/gated_mlp.h"
#include "runtime/engine.h"
#include "runtime/kv_cache.h"

namespace ballast {
namespace {

constexpr int64_t kFloat = sizeof(float);

// Packed bytes of a matrix.
absl::StatusOr<int64_t> MatrixBytes(const KernelSet& kernels, int n, int k, DType dtype) {
  BALLAST_ASSIGN_OR_RETURN(const auto matmul, kernels.make_matmul(n, k, dtype));
  return static_cast<int64_t>(matmul->packed_bytes());
}

absl::StatusOr<int64_t> MlpBytes(const KernelSet& kernels, int hidden, int inter, DType dtype) {
  if (inter == 0) return 0;
  BALLAST_ASSIGN_OR_RETURN(const auto mlp, GatedMlp::Create(kernels, hidden, inter, dtype));
  return static_cast<int64_t>(mlp->packed_bytes());
}

// As Decoder holds them.
absl::StatusOr<int64_t> ParameterBytes(const ModelConfig& c, const KernelSet& kernels,
                                       DType dtype) {
  const int q = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  BALLAST_ASSIGN_OR_RETURN(const int64_t qkv, MatrixBytes(kernels, q + 2 * kv, c.hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(const int64_t out, MatrixBytes(kernels, c.hidden, q, dtype));
  BALLAST_ASSIGN_OR_RETURN(const int64_t head, MatrixBytes(kernels, c.vocab_size, c.hidden, dtype));
  BALLAST_ASSIGN_OR_RETURN(const int64_t dense, MlpBytes(kernels, c.hidden, c.dense_inter, dtype));
  BALLAST_ASSIGN_OR_RETURN(const int64_t shared,
                           MlpBytes(kernels, c.hidden, c.shared_inter, dtype));
  BALLAST_ASSIGN_OR_RETURN(const int64_t gate,
                           MatrixBytes(kernels, c.gate.num_experts, c.hidden, DType::kF32));
  const int64_t embedding = int64_t{c.vocab_size} * c.hidden * kFloat;
  const int64_t rotary = 2 * int64_t{c.context_tokens} * (c.rotary_dim / 2) * kFloat;
  int64_t attention = qkv + out + 2 * c.hidden * kFloat;  // and the norms before it and the MLP
  if (c.attention_bias) attention += (q + 2 * kv) * kFloat;
  if (c.qk_norm) attention += 2 * c.head_dim * kFloat;
  return embedding + head + c.hidden * kFloat + rotary + c.num_layers * attention +
         c.num_dense_layers * dense +
         c.num_moe_layers() * (shared + gate + c.gate.num_experts * kFloat);
}

}  // namespace

absl::StatusOr<MemoryPlan> PlanMemory(const EngineOptions& options, const ModelConfig& config,
                                      const Backend& backend, const Topology& topology,
                                      int32_t rank) {
  MemoryPlan plan;
  BALLAST_ASSIGN_OR_RETURN(plan.parameters,
                           ParameterBytes(config, backend.kernels(), options.dtype));
  BALLAST_ASSIGN_OR_RETURN(
      const ExpertForm form,
      backend.MakeExpertForm(config.hidden, config.expert_inter, options.dtype));
  const int64_t expert = static_cast<int64_t>(RoundUp(form.packed_bytes, kCacheLineBytes));
  int32_t most_slots = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    most_slots = std::max(most_slots, topology.slots_on(r));
  }
  const int64_t chunk = static_cast<int64_t>(kCacheLineBytes + options.chunk_bytes);
  plan.experts = int64_t{topology.slots_on(rank)} * config.num_moe_layers() * expert;
  plan.transfers = (options.staging_experts > 0 ? options.staging_experts : most_slots) * expert +
                   2 * int64_t{topology.num_ranks() - 1} * chunk;
  const int64_t block = KvCache::BlockBytes(config, options.dtype);
  plan.kv_cache = options.kv_bytes / block * block;
  plan.moe_layers = backend.MoeLayersBytes(MoeOptionsOf(options, config), topology);
  return plan;
}

int64_t MachineMemory() {
  int64_t bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  int64_t limit = 0;  // of the control group, where there is one; "max" is not a number
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) bytes = std::min(bytes, limit);
  return bytes;
}

}  // namespace ballast
