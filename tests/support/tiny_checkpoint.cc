#include "tests/support/tiny_checkpoint.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/random.h"

namespace ballast::testing {
namespace {

// Builds the tensors one after the other from one stream of random numbers.
class TensorMaker {
 public:
  explicit TensorMaker(const TinyModel& model) : model_(model), random_(model.seed) {}

  // Uniform in `centre` ± `spread`.
  void Add(const std::string& name, std::vector<int64_t> shape, DType dtype, double spread,
           double centre = 0.0) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    RawTensor tensor{dtype == DType::kF32 ? "F32" : "BF16", std::move(shape), {}};
    tensor.bytes.resize(static_cast<size_t>(count) * SizeOf(dtype));
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      const float value = static_cast<float>(centre + spread * (2 * random_.Uniform() - 1));
      const BFloat16 rounded = ToBFloat16(value);
      if (dtype == DType::kF32) {
        std::memcpy(tensor.bytes.data() + i * 4, &value, 4);
      } else {
        std::memcpy(tensor.bytes.data() + i * 2, &rounded, 2);
      }
    }
    tensors_.emplace(name, std::move(tensor));
  }
  void AddMatrix(const std::string& name, int64_t rows, int64_t columns) {
    Add(name, {rows, columns}, model_.dtype, 2.0 / std::sqrt(static_cast<double>(columns)));
  }
  void AddNorm(const std::string& name, int64_t width) {
    Add(name, {width}, DType::kF32, 0.25, 1.0);
  }
  void AddMlp(const std::string& prefix, int64_t hidden, int64_t inter) {
    AddMatrix(prefix + "gate_proj.weight", inter, hidden);
    AddMatrix(prefix + "up_proj.weight", inter, hidden);
    AddMatrix(prefix + "down_proj.weight", hidden, inter);
  }
  void AddLayer(int32_t layer);
  RawTensors Take() { return std::move(tensors_); }

 private:
  const TinyModel& model_;
  Random random_;
  RawTensors tensors_;
};

void TensorMaker::AddLayer(int32_t layer) {
  const TinyModel& m = model_;
  const std::string p = absl::StrCat("model.layers.", layer, ".");
  const int64_t q = int64_t{m.num_heads} * m.head_dim, kv = int64_t{m.num_kv_heads} * m.head_dim;
  AddNorm(p + "input_layernorm.weight", m.hidden);
  AddNorm(p + "post_attention_layernorm.weight", m.hidden);
  for (const auto& [name, rows] : {std::pair{"q", q}, {"k", kv}, {"v", kv}}) {
    AddMatrix(absl::StrCat(p, "self_attn.", name, "_proj.weight"), rows, m.hidden);
    if (m.attention_bias) {
      Add(absl::StrCat(p, "self_attn.", name, "_proj.bias"), {rows}, DType::kF32, 0.5);
    }
  }
  AddMatrix(p + "self_attn.o_proj.weight", m.hidden, q);
  if (m.qk_norm) {
    AddNorm(p + "self_attn.q_norm.weight", m.head_dim);
    AddNorm(p + "self_attn.k_norm.weight", m.head_dim);
  }
  if (layer < m.num_dense_layers) return AddMlp(p + "mlp.", m.hidden, m.dense_inter);
  AddMatrix(p + "mlp.gate.weight", m.num_experts, m.hidden);
  // Wide enough to make some experts hot, and negative for some.
  Add(p + "mlp.gate.e_score_correction_bias", {m.num_experts}, DType::kF32, 0.3);
  for (int32_t e = 0; e < m.num_experts; ++e) {
    AddMlp(absl::StrCat(p, "mlp.experts.", e, "."), m.hidden, m.expert_inter);
  }
  if (m.num_shared > 0) {
    AddMlp(p + "mlp.shared_experts.", m.hidden, int64_t{m.num_shared} * m.expert_inter);
  }
}

}  // namespace

TempFolder::TempFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "ballast-test-XXXXXX").string();
  BALLAST_CHECK(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ConfigJson(const TinyModel& m) {
  const nlohmann::json json = {{"architectures", {"Glm4MoeForCausalLM"}},
                               {"vocab_size", m.vocab},
                               {"hidden_size", m.hidden},
                               {"intermediate_size", m.dense_inter},
                               {"moe_intermediate_size", m.expert_inter},
                               {"num_hidden_layers", m.num_layers},
                               {"first_k_dense_replace", m.num_dense_layers},
                               {"num_attention_heads", m.num_heads},
                               {"num_key_value_heads", m.num_kv_heads},
                               {"head_dim", m.head_dim},
                               {"max_position_embeddings", m.context},
                               {"attention_bias", m.attention_bias},
                               {"use_qk_norm", m.qk_norm},
                               {"tie_word_embeddings", m.tied_embeddings},
                               {"hidden_act", "silu"},
                               {"n_routed_experts", m.num_experts},
                               {"n_shared_experts", m.num_shared},
                               {"num_experts_per_tok", m.top_k},
                               {"n_group", m.num_groups},
                               {"topk_group", m.top_groups},
                               {"routed_scaling_factor", 1.5}};
  return json.dump(2);
}

RawTensors RandomTensors(const TinyModel& model) {
  TensorMaker maker(model);
  maker.Add("model.embed_tokens.weight", {model.vocab, model.hidden}, model.dtype, 1.0);
  maker.AddNorm("model.norm.weight", model.hidden);
  if (!model.tied_embeddings) maker.AddMatrix("lm_head.weight", model.vocab, model.hidden);
  for (int32_t layer = 0; layer < model.num_layers; ++layer) maker.AddLayer(layer);
  return maker.Take();
}

std::vector<std::byte> SafetensorsBytes(const RawTensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  size_t at = 0;
  // fp32 first: then every tensor is aligned.
  std::vector<const RawTensor*> order;
  for (const char* dtype : {"F32", "BF16"}) {
    for (const auto& [name, tensor] : tensors) {
      if (tensor.dtype != dtype) continue;
      header[name] = {{"dtype", tensor.dtype},
                      {"shape", tensor.shape},
                      {"data_offsets", {at, at + tensor.bytes.size()}}};
      at += tensor.bytes.size();
      order.push_back(&tensor);
    }
  }
  std::string text = header.dump();
  while (text.size() % 8 != 0) text += ' ';
  std::vector<std::byte> bytes(8 + text.size());
  const uint64_t length = text.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, text.data(), text.size());
  for (const RawTensor* tensor : order) {
    bytes.insert(bytes.end(), tensor->bytes.begin(), tensor->bytes.end());
  }
  return bytes;
}

void WriteBytes(const std::string& path, const std::vector<std::byte>& bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(bytes.data()),
            static_cast<std::streamsize>(bytes.size()));
  BALLAST_CHECK(out.good());
}

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  BALLAST_CHECK(out.good());
}

void WriteCheckpoint(const std::string& folder, const TinyModel& model) {
  WriteText(folder + "/config.json", ConfigJson(model));
  WriteBytes(folder + "/model.safetensors", SafetensorsBytes(RandomTensors(model)));
}

}  // namespace ballast::testing
