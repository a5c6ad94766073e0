#ifndef BALLAST_TESTS_SUPPORT_TINY_CHECKPOINT_H_
#define BALLAST_TESTS_SUPPORT_TINY_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "tests/support/temp_folder.h"

namespace ballast::testing {

// The shape of a small random Glm4Moe checkpoint.
struct TinyModel {
  uint64_t seed = 1;
  DType dtype = DType::kF32;  // of the matrices; norms and the correction bias are fp32
  int32_t vocab = 64, hidden = 32, num_layers = 3, num_dense_layers = 1;
  int32_t num_heads = 4, num_kv_heads = 2, head_dim = 16;
  int32_t dense_inter = 48, expert_inter = 24;
  int32_t num_experts = 10, top_k = 3, num_groups = 1, top_groups = 1;
  int32_t num_shared = 1;
  int32_t context = 512;
  bool qk_norm = false, attention_bias = false, tied_embeddings = false;
};

// One tensor of a safetensors file.
struct RawTensor {
  std::string dtype;  // as the header spells it
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

// config.json of the model.
std::string ConfigJson(const TinyModel& model);
// Every tensor of the model, random from its seed.
RawTensors RandomTensors(const TinyModel& model);
// The bytes of a safetensors file.
std::vector<std::byte> SafetensorsBytes(const RawTensors& tensors);

void WriteBytes(const std::string& path, const std::vector<std::byte>& bytes);
void WriteText(const std::string& path, const std::string& text);

// Writes config.json and model.safetensors.
void WriteCheckpoint(const std::string& folder, const TinyModel& model);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_TINY_CHECKPOINT_H_
