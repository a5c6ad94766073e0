#include "runtime/model_config.h"

#include <nlohmann/json.hpp>

#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

using Json = nlohmann::json;

// Reads keys of config.json; the first failure sticks and names the key.
class Reader {
 public:
  explicit Reader(const Json& json) : json_(json) {}

  int32_t Int(const char* key, int64_t low, int64_t high) {
    const auto it = json_.find(key);
    if (it == json_.end()) return Fail(key, "missing"), 0;
    if (!it->is_number_integer()) return Fail(key, it->dump() + ", not an integer"), 0;
    const int64_t value = it->get<int64_t>();
    if (value < low || value > high) {
      return Fail(key, absl::StrCat(value, ", allowed: ", low, " to ", high)), 0;
    }
    return static_cast<int32_t>(value);
  }
  int32_t IntOr(const char* key, int64_t low, int64_t high, int32_t otherwise) {
    const auto it = json_.find(key);
    return it == json_.end() || it->is_null() ? otherwise : Int(key, low, high);
  }
  double Number(const char* key, double low, double high, double otherwise) {
    const auto it = json_.find(key);
    if (it == json_.end() || it->is_null()) return otherwise;
    if (!it->is_number()) return Fail(key, it->dump() + ", not a number"), 0;
    const double value = it->get<double>();
    if (!(value >= low && value <= high)) {
      return Fail(key, absl::StrCat(value, ", allowed: ", low, " to ", high)), 0;
    }
    return value;
  }
  bool Bool(const char* key, bool otherwise) {
    const auto it = json_.find(key);
    if (it == json_.end() || it->is_null()) return otherwise;
    if (!it->is_boolean()) return Fail(key, it->dump() + ", not true or false"), false;
    return it->get<bool>();
  }
  // A token id or a list of them; none when the key is missing.
  std::vector<int32_t> Tokens(const char* key, int32_t vocab) {
    const auto it = json_.find(key);
    if (it == json_.end() || it->is_null()) return {};
    std::vector<int32_t> tokens;
    for (const Json& value : it->is_array() ? *it : Json::array({*it})) {
      if (!value.is_number_integer() || value.get<int64_t>() < 0 || value.get<int64_t>() >= vocab) {
        Fail(key, absl::StrCat(it->dump(), ", allowed: token ids below ", vocab));
        return {};
      }
      tokens.push_back(value.get<int32_t>());
    }
    return tokens;
  }
  void Fail(const char* key, const std::string& what) {
    if (status_.ok()) {
      status_ = absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " is ", what));
    }
  }
  const absl::Status& status() const { return status_; }

 private:
  const Json& json_;
  absl::Status status_;
};

absl::Status CheckArchitecture(const Json& json) {
  const auto it = json.find("architectures");
  if (it == json.end() || !it->is_array() || it->size() != 1 || !it->front().is_string()) {
    return absl::InvalidArgumentError("config.json: architectures is not a list of one name");
  }
  const std::string name = it->front().get<std::string>();
  if (name != "Glm4MoeForCausalLM") {
    return absl::UnimplementedError(
        absl::StrCat("config.json: architectures is ", name, ", supported: Glm4MoeForCausalLM"));
  }
  const auto act = json.find("hidden_act");
  if (act != json.end() && *act != "silu") {
    return absl::UnimplementedError(
        absl::StrCat("config.json: hidden_act is ", act->dump(), ", supported: \"silu\""));
  }
  const auto scaling = json.find("rope_scaling");
  if (scaling != json.end() && !scaling->is_null()) {
    return absl::UnimplementedError(
        absl::StrCat("config.json: rope_scaling is ", scaling->dump(), ", supported: null"));
  }
  const auto rope = json.find("rope_parameters");
  if (rope != json.end() && !rope->is_null() &&
      (!rope->is_object() || rope->value("rope_type", Json("default")) != "default")) {
    return absl::UnimplementedError(absl::StrCat("config.json: rope_parameters is ", rope->dump(),
                                                 ", supported: an object of rope_type default"));
  }
  if (json.contains("quantization_config")) {
    return absl::UnimplementedError("config.json: quantization_config is set, supported: none");
  }
  return absl::OkStatus();
}

// Relations between keys that no single range can express.
absl::Status CheckShape(const ModelConfig& c) {
  const auto bad = [](auto&&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("config.json: ", parts...));
  };
  if (c.num_heads % c.num_kv_heads != 0) {
    return bad("num_attention_heads is ", c.num_heads,
               ", allowed: a multiple of num_key_value_heads (", c.num_kv_heads, ")");
  }
  if (c.num_dense_layers > c.num_layers) {
    return bad("first_k_dense_replace is ", c.num_dense_layers,
               ", allowed: at most num_hidden_layers (", c.num_layers, ")");
  }
  if (c.hidden % 8 != 0) return bad("hidden_size is ", c.hidden, ", allowed: a multiple of 8");
  if (c.rotary_dim % 2 != 0 || c.rotary_dim > c.head_dim) {
    return bad("partial_rotary_factor gives ", c.rotary_dim,
               " rotary dimensions, allowed: an even ", "number up to head_dim (", c.head_dim, ")");
  }
  const GateRule& g = c.gate;
  if (g.num_experts % g.num_groups != 0 || g.top_groups > g.num_groups ||
      g.top_k > g.num_experts / g.num_groups * g.top_groups) {
    return bad("n_routed_experts ", g.num_experts, ", n_group ", g.num_groups, ", topk_group ",
               g.top_groups, " and num_experts_per_tok ", g.top_k, " do not fit together");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ModelConfig::FromJson(const std::string& text) {
  if (JsonNestsTooDeep(text)) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json nests deeper than ", kMostJsonDepth));
  }
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("config.json is not a JSON object");
  BALLAST_RETURN_IF_ERROR(CheckArchitecture(json));
  Reader r(json);
  ModelConfig c;
  c.vocab_size = r.Int("vocab_size", 1, 1 << 24);
  c.hidden = r.Int("hidden_size", 8, 1 << 16);
  c.num_layers = r.Int("num_hidden_layers", 1, 1024);
  c.num_dense_layers = r.IntOr("first_k_dense_replace", 0, 1024, 0);
  c.num_heads = r.Int("num_attention_heads", 1, 1024);
  c.num_kv_heads = r.IntOr("num_key_value_heads", 1, 1024, c.num_heads);
  c.head_dim = r.IntOr("head_dim", 2, 256, c.num_heads > 0 ? c.hidden / c.num_heads : 0);
  // Newer files keep the rotary settings in an object of their own.
  const auto rope_object = json.find("rope_parameters");
  const bool has_rope_object = rope_object != json.end() && !rope_object->is_null();
  Reader rope(has_rope_object ? *rope_object : json);
  const double rotary = rope.Number("partial_rotary_factor", 0.0, 1.0, 0.5);
  c.rotary_dim = static_cast<int32_t>(c.head_dim * rotary);
  c.rope_theta = rope.Number("rope_theta", 1.0, 1e12, 10000.0);
  c.norm_eps = static_cast<float>(r.Number("rms_norm_eps", 0.0, 1.0, 1e-5));
  c.context_tokens = r.Int("max_position_embeddings", 1, 1 << 24);
  c.dense_inter = r.Int("intermediate_size", 1, 1 << 20);
  c.expert_inter = r.Int("moe_intermediate_size", 1, 1 << 20);
  c.shared_inter = r.IntOr("n_shared_experts", 0, 64, 0) * c.expert_inter;
  c.attention_bias = r.Bool("attention_bias", false);
  c.qk_norm = r.Bool("use_qk_norm", false);
  c.tied_embeddings = r.Bool("tie_word_embeddings", false);
  c.eos_tokens = r.Tokens("eos_token_id", c.vocab_size);
  c.num_extra_layers = r.IntOr("num_nextn_predict_layers", 0, 64, 0);
  c.gate.num_experts = r.Int("n_routed_experts", 1, 2048);
  c.gate.top_k = r.Int("num_experts_per_tok", 1, 32);
  c.gate.num_groups = r.IntOr("n_group", 1, 2048, 1);
  c.gate.top_groups = r.IntOr("topk_group", 1, 2048, 1);
  c.gate.renormalise = r.Bool("norm_topk_prob", true);
  c.gate.scale = static_cast<float>(r.Number("routed_scaling_factor", 0.0, 1e6, 1.0));
  if (!r.status().ok()) return r.status();
  if (!rope.status().ok()) return rope.status();
  BALLAST_RETURN_IF_ERROR(CheckShape(c));
  return c;
}

}  // namespace ballast
