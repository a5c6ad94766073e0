#ifndef BALLAST_RUNTIME_MODEL_CONFIG_H_
#define BALLAST_RUNTIME_MODEL_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/gate.h"

namespace ballast {

// The shape of a model, from a Hugging Face config.json of architecture Glm4MoeForCausalLM.
struct ModelConfig {
  std::string name;             // of the folder
  int32_t vocab_size = 0;
  int32_t hidden = 0;
  int32_t num_layers = 0;
  int32_t num_dense_layers = 0; // the first layers have a dense MLP, the others are MoE layers
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t rotary_dim = 0;
  double rope_theta = 10000.0;
  float norm_eps = 1e-5f;
  int32_t context_tokens = 0;   // positions that the model knows
  int32_t dense_inter = 0;
  int32_t expert_inter = 0;
  int32_t shared_inter = 0;     // all shared experts side by side; 0: none
  bool attention_bias = false;
  bool qk_norm = false;
  bool tied_embeddings = false;
  std::vector<int32_t> eos_tokens;  // any of them ends a text
  int32_t num_extra_layers = 0;     // next-token-prediction layers behind the others; not loaded
  GateRule gate;

  int32_t num_moe_layers() const { return num_layers - num_dense_layers; }

  // ERRORS kInvalidArgument, kUnimplemented: name the key, its value and what is allowed
  static absl::StatusOr<ModelConfig> FromJson(const std::string& json);
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_MODEL_CONFIG_H_
