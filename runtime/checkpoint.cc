#include "runtime/checkpoint.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

constexpr size_t kMaxJsonBytes = 100'000'000;

using Shape = std::vector<int64_t>;

std::string ToText(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i ? ", " : "", shape[i]);
  return text + "]";
}

template <typename T>
bool AllFinite(const T* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(ToFloat(values[i]))) return false;
  }
  return true;
}

void AddMlp(const std::string& prefix, int64_t hidden, int64_t inter,
            std::map<std::string, Shape>* shapes) {
  (*shapes)[prefix + "gate_proj.weight"] = {inter, hidden};
  (*shapes)[prefix + "up_proj.weight"] = {inter, hidden};
  (*shapes)[prefix + "down_proj.weight"] = {hidden, inter};
}

// Every tensor of the architecture with its shape.
std::map<std::string, Shape> ExpectedTensors(const ModelConfig& c) {
  std::map<std::string, Shape> shapes;
  shapes["model.embed_tokens.weight"] = {c.vocab_size, c.hidden};
  shapes["model.norm.weight"] = {c.hidden};
  if (!c.tied_embeddings) shapes["lm_head.weight"] = {c.vocab_size, c.hidden};
  const int64_t q = int64_t{c.num_heads} * c.head_dim, kv = int64_t{c.num_kv_heads} * c.head_dim;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const std::string p = absl::StrCat("model.layers.", layer, ".");
    shapes[p + "input_layernorm.weight"] = {c.hidden};
    shapes[p + "post_attention_layernorm.weight"] = {c.hidden};
    for (const auto& [name, rows] : {std::pair{"q", q}, {"k", kv}, {"v", kv}}) {
      shapes[absl::StrCat(p, "self_attn.", name, "_proj.weight")] = {rows, c.hidden};
      if (c.attention_bias) shapes[absl::StrCat(p, "self_attn.", name, "_proj.bias")] = {rows};
    }
    shapes[p + "self_attn.o_proj.weight"] = {c.hidden, q};
    if (c.qk_norm) {
      shapes[p + "self_attn.q_norm.weight"] = {c.head_dim};
      shapes[p + "self_attn.k_norm.weight"] = {c.head_dim};
    }
    if (layer < c.num_dense_layers) {
      AddMlp(p + "mlp.", c.hidden, c.dense_inter, &shapes);
      continue;
    }
    shapes[p + "mlp.gate.weight"] = {c.gate.num_experts, c.hidden};
    shapes[p + "mlp.gate.e_score_correction_bias"] = {c.gate.num_experts};
    for (int e = 0; e < c.gate.num_experts; ++e) {
      AddMlp(ExpertPrefix(layer, e), c.hidden, c.expert_inter, &shapes);
    }
    if (c.shared_inter > 0) AddMlp(p + "mlp.shared_experts.", c.hidden, c.shared_inter, &shapes);
  }
  return shapes;
}

// Whether the tensor belongs to a next-token-prediction layer, which serving does not use.
bool IsExtraLayer(const std::string& name, const ModelConfig& config) {
  for (int i = 0; i < config.num_extra_layers; ++i) {
    if (name.starts_with(absl::StrCat("model.layers.", config.num_layers + i, "."))) return true;
  }
  return false;
}

}  // namespace

std::string ExpertPrefix(int layer, int expert) {
  return absl::StrCat("model.layers.", layer, ".mlp.experts.", expert, ".");
}

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be read: ", std::strerror(errno)));
  }
  std::string content;
  char piece[1 << 16];
  while (in.read(piece, sizeof piece), in.gcount() > 0) {
    content.append(piece, static_cast<size_t>(in.gcount()));
    if (content.size() > max_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": more than the ", max_bytes, " bytes that are allowed"));
    }
  }
  return content;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& folder) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->folder_ = folder;
  BALLAST_ASSIGN_OR_RETURN(const std::string text,
                           ReadFile(folder + "/config.json", kMaxJsonBytes));
  BALLAST_ASSIGN_OR_RETURN(checkpoint->config_, ModelConfig::FromJson(text));
  std::string name = folder;
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  checkpoint->config_.name = name.substr(name.find_last_of('/') + 1);
  BALLAST_RETURN_IF_ERROR(checkpoint->OpenFiles());
  BALLAST_RETURN_IF_ERROR(checkpoint->CheckTensors());
  return checkpoint;
}

absl::Status Checkpoint::OpenFiles() {
  std::set<std::string> names = {"model.safetensors"};
  const std::string index_path = folder_ + "/model.safetensors.index.json";
  if (std::ifstream(index_path).good()) {
    BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(index_path, kMaxJsonBytes));
    if (JsonNestsTooDeep(text)) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": nests deeper than ", kMostJsonDepth));
    }
    const auto index = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
      return absl::InvalidArgumentError(index_path + ": has no object weight_map");
    }
    names.clear();
    for (const auto& [tensor, file] : index["weight_map"].items()) {
      if (!file.is_string() || file.get<std::string>().find('/') != std::string::npos) {
        return absl::InvalidArgumentError(absl::StrCat(
            index_path, ": weight_map of ", tensor, " is ", file.dump(), ", allowed: a file name"));
      }
      names.insert(file.get<std::string>());
    }
  }
  for (const std::string& name : names) {
    BALLAST_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(folder_ + "/" + name));
    for (const auto& [tensor, view] : file->tensors()) {
      if (!tensors_.emplace(tensor, &view).second) {
        return absl::InvalidArgumentError(
            absl::StrCat(folder_, ": tensor ", tensor, " is in two files"));
      }
    }
    files_.push_back(std::move(file));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckTensors() const {
  const auto expected = ExpectedTensors(config_);
  for (const auto& [name, shape] : expected) {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
      return absl::InvalidArgumentError(absl::StrCat(folder_, ": tensor ", name, " is missing"));
    }
    if (it->second->shape != shape) {
      return absl::InvalidArgumentError(absl::StrCat(folder_, ": tensor ", name, " has shape ",
                                                     ToText(it->second->shape),
                                                     ", config.json calls for ", ToText(shape)));
    }
    // The correction bias decides between near-ties: rounding it to bf16 changes answers.
    if (name.ends_with("e_score_correction_bias") && it->second->dtype != DType::kF32) {
      return absl::InvalidArgumentError(
          absl::StrCat(folder_, ": tensor ", name, " is bf16, allowed: fp32"));
    }
  }
  for (const auto& [name, view] : tensors_) {
    if (!expected.contains(name) && !IsExtraLayer(name, config_)) {
      return absl::InvalidArgumentError(
          absl::StrCat(folder_, ": tensor ", name, " is not part of the architecture"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint::Loaded> Checkpoint::Load(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return absl::InvalidArgumentError(absl::StrCat(folder_, ": tensor ", name, " is missing"));
  }
  const TensorView& tensor = *it->second;
  Loaded loaded{tensor.dtype, AlignedBuffer(tensor.bytes.size())};
  BALLAST_RETURN_IF_ERROR(tensor.file->Read(tensor, loaded.bytes.bytes()));
  const size_t count = static_cast<size_t>(tensor.num_elements());
  const bool finite = tensor.dtype == DType::kF32 ? AllFinite(loaded.bytes.as<float>(), count)
                                                  : AllFinite(loaded.bytes.as<BFloat16>(), count);
  if (!finite) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder_, ": tensor ", name, " has a NaN or an infinity"));
  }
  return loaded;
}

absl::StatusOr<std::vector<float>> Checkpoint::LoadFloats(const std::string& name) const {
  BALLAST_ASSIGN_OR_RETURN(const Loaded tensor, Load(name));
  std::vector<float> values(tensor.bytes.size() / SizeOf(tensor.dtype));
  if (tensor.dtype == DType::kF32) {
    std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  } else {
    const auto* from = tensor.bytes.as<BFloat16>();
    for (size_t i = 0; i < values.size(); ++i) values[i] = ToFloat(from[i]);
  }
  return values;
}

absl::Status Checkpoint::LoadMatrix(const std::vector<std::string>& names, const Matmul& matmul,
                                    AlignedBuffer* packed) const {
  std::vector<float> stacked;
  for (const std::string& name : names) {
    BALLAST_ASSIGN_OR_RETURN(const std::vector<float> part, LoadFloats(name));
    stacked.insert(stacked.end(), part.begin(), part.end());
  }
  *packed = AlignedBuffer(matmul.packed_bytes());
  return matmul.Pack(stacked.data(), DType::kF32, packed->data());
}

absl::Status Checkpoint::LoadMlp(const std::string& prefix, const PackMlp& pack,
                                 std::byte* packed) const {
  BALLAST_ASSIGN_OR_RETURN(const Loaded gate, Load(prefix + "gate_proj.weight"));
  BALLAST_ASSIGN_OR_RETURN(const Loaded up, Load(prefix + "up_proj.weight"));
  BALLAST_ASSIGN_OR_RETURN(const Loaded down, Load(prefix + "down_proj.weight"));
  if (gate.dtype != up.dtype || gate.dtype != down.dtype) {
    return absl::InvalidArgumentError(
        absl::StrCat(folder_, ": the matrices of ", prefix, " have different dtypes"));
  }
  return pack(gate.bytes.data(), up.bytes.data(), down.bytes.data(), gate.dtype, packed);
}

}  // namespace ballast
