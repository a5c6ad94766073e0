// Checkpoints are hostile input: what is wrong is named, and nothing is read outside the file.
#include "runtime/checkpoint.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "base/random.h"
#include "kernels/gated_mlp.h"
#include "kernels/kernel_set.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using Json = nlohmann::json;
using testing::ConfigJson;
using testing::RandomTensors;
using testing::RawTensors;
using testing::SafetensorsBytes;
using testing::TempFolder;
using testing::TinyModel;
using testing::WriteBytes;
using testing::WriteText;

const std::string kBias = "model.layers.1.mlp.gate.e_score_correction_bias";
const std::string kExpert = "model.layers.2.mlp.experts.3.up_proj.weight";

bool Names(const absl::Status& status, const std::string& what) {
  return std::string(status.message()).find(what) != std::string::npos;
}

PackMlp PackWith(GatedMlp* mlp) {
  return [mlp](const void* gate, const void* up, const void* down, DType type, std::byte* packed) {
    return mlp->Pack(gate, up, down, type, packed);
  };
}

// A safetensors file with this header and so many bytes of data.
std::vector<std::byte> FileOf(const std::string& header, size_t data_bytes) {
  std::vector<std::byte> bytes(8 + header.size() + data_bytes);
  const uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  return bytes;
}

absl::Status OpenBytes(const std::vector<std::byte>& bytes) {
  TempFolder folder;
  WriteBytes(folder.path() + "/f.safetensors", bytes);
  return SafetensorsFile::Open(folder.path() + "/f.safetensors").status();
}

TEST_CASE("a safetensors file gives its tensors", "[runtime][checkpoint]") {
  TempFolder folder;
  const std::string path = folder.path() + "/f.safetensors";
  const RawTensors tensors = RandomTensors({.dtype = DType::kBF16});
  WriteBytes(path, SafetensorsBytes(tensors));
  const auto file = SafetensorsFile::Open(path);
  REQUIRE(file.ok());
  REQUIRE((*file)->tensors().size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    CAPTURE(name);
    const TensorView& view = (*file)->tensors().at(name);
    REQUIRE(view.shape == tensor.shape);
    REQUIRE(std::ranges::equal(view.bytes, tensor.bytes));
  }
  REQUIRE(OpenBytes(FileOf(R"({"__metadata__":{"format":"pt"}})", 0)).ok());
}

TEST_CASE("a safetensors header that lies is refused by the tensor's name",
          "[runtime][checkpoint][errors]") {
  const auto header = [](const char* dtype, const char* shape, const char* offsets) {
    return std::string(
               R"({"aa":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"bb":{"dtype":")") +
           dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  REQUIRE(OpenBytes(FileOf(header("F32", "[2]", "[8,16]"), 8 + 8)).ok());
  struct Case {
    const char *dtype, *shape, *offsets, *named;
  };
  const Case cases[] = {
      {"F32", "[2]", "[4,12]", "overlap"},
      {"F32", "[2]", "[0,8]", "overlap"},
      {"F32", "[1]", "[12,16]", "hole"},
      {"F32", "[1]", "[8,12]", "after the last tensor"},
      {"F32", "[2]", "[8,24]", "bb: data_offsets [8, 24]"},
      {"F32", "[2]", "[16,8]", "bb: data_offsets [16, 8]"},
      {"F32", "[3]", "[8,16]", "bb: shape [3]"},
      {"BF16", "[2]", "[8,16]", "bb: shape [2]"},
      {"F32", "[4294967296,4294967296]", "[8,16]", "bb: shape"},
      {"F32", "[9223372036854775808,2]", "[8,16]", "bb: shape"},
      {"F32", "[4611686018427387906]", "[8,16]", "bb: shape"},
      {"F32", "[0,18446744073709551615]", "[8,16]", "bb: shape"},
      {"F32", "[-2]", "[8,16]", "bb: shape"},
      {"F32", "[2.0]", "[8,16]", "bb: shape"},
      {"F32", "\"2\"", "[8,16]", "bb: shape"},
      {"F32", "[1,1,1,1,1,1,1,1,2]", "[8,16]", "bb: shape"},
      {"F32", "[2]", "[8,18446744073709551615]", "bb: data_offsets"},
      {"F32", "[2]", "[-8,0]", "bb: data_offsets"},
      {"F32", "[2]", "[8]", "bb: data_offsets"},
      {"F16", "[4]", "[8,16]", "bb: dtype is \"F16\""},
      {"F64", "[1]", "[8,16]", "bb: dtype is \"F64\""},
  };
  for (const Case& c : cases) {
    const absl::Status status = OpenBytes(FileOf(header(c.dtype, c.shape, c.offsets), 16));
    CAPTURE(c.dtype, c.shape, c.offsets, std::string(status.message()));
    REQUIRE(!status.ok());
    REQUIRE(Names(status, c.named));
  }
  for (const char* text : {"", "[]", "7", "{", "{\"aa\":3}", "{\"aa\":{}}", "{\"aa\":null}"}) {
    CAPTURE(text);
    REQUIRE(!OpenBytes(FileOf(text, 0)).ok());
  }
}

TEST_CASE("a safetensors file cut anywhere is refused", "[runtime][checkpoint][errors]") {
  const auto bytes = SafetensorsBytes({{"a", {"F32", {3}, std::vector<std::byte>(12)}},
                                       {"b", {"BF16", {2}, std::vector<std::byte>(4)}}});
  REQUIRE(OpenBytes(bytes).ok());
  for (size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    REQUIRE(!OpenBytes({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length)}).ok());
  }
  auto longer = bytes;
  longer.push_back(std::byte{0});
  REQUIRE(!OpenBytes(longer).ok());
  auto huge = bytes;
  std::memset(huge.data(), 0xff, 8);
  REQUIRE(Names(OpenBytes(huge), "18446744073709551615"));
  REQUIRE(SafetensorsFile::Open("/nowhere/at.all").status().code() == absl::StatusCode::kNotFound);
  REQUIRE(!SafetensorsFile::Open("/").ok());
}

// Opens a checkpoint whose configuration and tensors were changed.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenChanged(
    const TempFolder& folder, const std::function<void(Json*)>& change_config,
    const std::function<void(RawTensors*)>& change_tensors, const TinyModel& model = {}) {
  Json config = Json::parse(ConfigJson(model));
  if (change_config) change_config(&config);
  RawTensors tensors = RandomTensors(model);
  if (change_tensors) change_tensors(&tensors);
  WriteText(folder.path() + "/config.json", config.dump());
  WriteBytes(folder.path() + "/model.safetensors", SafetensorsBytes(tensors));
  return Checkpoint::Open(folder.path());
}

absl::Status ChangedTensors(const std::function<void(RawTensors*)>& change) {
  TempFolder folder;
  return OpenChanged(folder, nullptr, change).status();
}

TEST_CASE("a checkpoint opens with every option of the architecture", "[runtime][checkpoint]") {
  for (const TinyModel& model :
       {TinyModel{}, TinyModel{.qk_norm = true, .attention_bias = true},
        TinyModel{.dtype = DType::kBF16, .num_shared = 0, .tied_embeddings = true},
        TinyModel{.num_dense_layers = 3}, TinyModel{.num_dense_layers = 0}}) {
    TempFolder folder;
    const auto checkpoint = OpenChanged(folder, nullptr, nullptr, model);
    INFO(checkpoint.status().message());
    REQUIRE(checkpoint.ok());
    REQUIRE((*checkpoint)->config().num_moe_layers() == model.num_layers - model.num_dense_layers);
  }
}

TEST_CASE("tensors that do not fit the configuration are named", "[runtime][checkpoint][errors]") {
  absl::Status status = ChangedTensors([](RawTensors* t) { t->erase(kExpert); });
  REQUIRE(Names(status, kExpert + " is missing"));
  status = ChangedTensors(
      [](RawTensors* t) { std::swap((*t)[kExpert].shape[0], (*t)[kExpert].shape[1]); });
  CAPTURE(std::string(status.message()));
  REQUIRE(Names(status, kExpert + " has shape [32, 24]"));
  REQUIRE(Names(status, "[24, 32]"));
  status = ChangedTensors([](RawTensors* t) { (*t)["extra.weight"] = (*t)["model.norm.weight"]; });
  REQUIRE(Names(status, "extra.weight is not part"));
  status = ChangedTensors([](RawTensors* t) {
    (*t)[kBias].dtype = "BF16";
    (*t)[kBias].bytes.resize((*t)[kBias].bytes.size() / 2);
  });
  REQUIRE(Names(status, kBias + " is bf16, allowed: fp32"));
}

TEST_CASE("numbers that are none are found when a tensor is loaded",
          "[runtime][checkpoint][errors]") {
  for (const uint32_t bits : {0x7fc00000u, 0x7f800000u, 0xff800000u, 0x7f800001u}) {
    TempFolder folder;
    const auto checkpoint = OpenChanged(folder, nullptr, [&](RawTensors* t) {
      std::memcpy((*t)[kExpert].bytes.data() + 100, &bits, 4);
    });
    REQUIRE(checkpoint.ok());
    const auto values = (*checkpoint)->LoadFloats(kExpert);
    REQUIRE(values.status().code() == absl::StatusCode::kInvalidArgument);
    REQUIRE(Names(values.status(), kExpert));
    auto mlp = GatedMlp::Create(PlainKernels(), 32, 24, DType::kF32);
    REQUIRE(mlp.ok());
    const PackMlp pack = PackWith(mlp->get());
    AlignedBuffer packed((*mlp)->packed_bytes());
    REQUIRE(Names((*checkpoint)->LoadMlp(ExpertPrefix(2, 3), pack, packed.data()), kExpert));
    REQUIRE((*checkpoint)->LoadMlp(ExpertPrefix(2, 4), pack, packed.data()).ok());
  }
}

TEST_CASE("a file that becomes shorter after it was opened is an error where it is read",
          "[runtime][checkpoint][errors]") {
  TempFolder folder;
  testing::WriteCheckpoint(folder.path(), TinyModel{});
  const std::string path = folder.path() + "/model.safetensors";
  const auto checkpoint = Checkpoint::Open(folder.path());
  REQUIRE(checkpoint.ok());
  auto mlp =
      GatedMlp::Create(PlainKernels(), TinyModel{}.hidden, TinyModel{}.expert_inter, DType::kF32);
  REQUIRE(mlp.ok());
  const PackMlp pack = PackWith(mlp->get());
  AlignedBuffer packed((*mlp)->packed_bytes());
  const auto load = [&] { return (*checkpoint)->LoadMlp(ExpertPrefix(2, 3), pack, packed.data()); };
  REQUIRE(load().ok());
  std::filesystem::resize_file(path, 4096);
  const absl::Status status = load();
  INFO(status.message());
  REQUIRE(status.code() == absl::StatusCode::kDataLoss);
  REQUIRE(Names(status, path));
  REQUIRE(Names(status, "has become shorter"));
}

TEST_CASE("configurations that are not served are named by key", "[runtime][checkpoint][errors]") {
  struct Case {
    const char* key;
    Json value;
    const char* named;
  };
  const Case cases[] = {
      {"architectures", {"LlamaForCausalLM"}, "LlamaForCausalLM"},
      {"architectures", "Glm4MoeForCausalLM", "architectures"},
      {"hidden_act", "gelu", "gelu"},
      {"rope_scaling", {{"type", "yarn"}}, "rope_scaling"},
      {"quantization_config", {{"bits", 4}}, "quantization_config"},
      {"hidden_size", 33, "hidden_size"},
      {"hidden_size", "32", "hidden_size"},
      {"hidden_size", -1, "hidden_size"},
      {"vocab_size", 0, "vocab_size"},
      {"num_hidden_layers", 1e9, "num_hidden_layers"},
      {"num_hidden_layers", 99999, "99999"},
      {"num_attention_heads", 3, "num_attention_heads"},
      {"num_key_value_heads", 0, "num_key_value_heads"},
      {"first_k_dense_replace", 4, "first_k_dense_replace"},
      {"head_dim", 512, "head_dim"},
      {"partial_rotary_factor", 0.2, "partial_rotary_factor"},
      {"rms_norm_eps", "small", "rms_norm_eps"},
      {"num_experts_per_tok", 11, "num_experts_per_tok"},
      {"num_experts_per_tok", 33, "num_experts_per_tok"},
      {"n_group", 3, "n_group"},
      {"topk_group", 2, "topk_group"},
      {"eos_token_id", 64, "eos_token_id"},
      {"eos_token_id", "x", "eos_token_id"},
      {"use_qk_norm", 1, "use_qk_norm"},
      {"routed_scaling_factor", -1, "routed_scaling_factor"},
      {"max_position_embeddings", nullptr, "max_position_embeddings"},
  };
  for (const Case& c : cases) {
    TempFolder folder;
    const auto checkpoint = OpenChanged(
        folder, [&](Json* config) { (*config)[c.key] = c.value; }, nullptr);
    CAPTURE(c.key, c.value.dump(), std::string(checkpoint.status().message()));
    REQUIRE(!checkpoint.ok());
    REQUIRE(Names(checkpoint.status(), c.named));
  }
  TempFolder folder;
  const auto missing = OpenChanged(
      folder, [](Json* config) { config->erase("vocab_size"); }, nullptr);
  REQUIRE(Names(missing.status(), "vocab_size is missing"));
  for (const char* text : {"", "[]", "{", "{}"}) {
    WriteText(folder.path() + "/config.json", text);
    REQUIRE(!Checkpoint::Open(folder.path()).ok());
  }
}

TEST_CASE("a checkpoint in several files is one checkpoint", "[runtime][checkpoint]") {
  TempFolder folder;
  const TinyModel model;
  RawTensors first = RandomTensors(model), second;
  Json index = {{"weight_map", Json::object()}};
  for (auto it = first.begin(); it != first.end();) {
    const bool moves = it->first.find("layers.2.") != std::string::npos;
    index["weight_map"][it->first] = moves ? "b.safetensors" : "a.safetensors";
    if (moves) second.insert(*it);
    it = moves ? first.erase(it) : std::next(it);
  }
  const std::string index_path = folder.path() + "/model.safetensors.index.json";
  WriteText(folder.path() + "/config.json", ConfigJson(model));
  WriteText(index_path, index.dump());
  WriteBytes(folder.path() + "/a.safetensors", SafetensorsBytes(first));
  WriteBytes(folder.path() + "/b.safetensors", SafetensorsBytes(second));
  REQUIRE(Checkpoint::Open(folder.path()).ok());

  first.insert(*second.begin());
  WriteBytes(folder.path() + "/a.safetensors", SafetensorsBytes(first));
  REQUIRE(Names(Checkpoint::Open(folder.path()).status(), "is in two files"));
  index["weight_map"][kExpert] = "../b.safetensors";
  WriteText(index_path, index.dump());
  REQUIRE(Names(Checkpoint::Open(folder.path()).status(), "../b.safetensors"));
  index["weight_map"] = 3;
  WriteText(index_path, index.dump());
  REQUIRE(Names(Checkpoint::Open(folder.path()).status(), "weight_map"));
}

TEST_CASE("mutated checkpoints end in a status", "[runtime][checkpoint][property]") {
  const TinyModel model{.vocab = 8,
                        .hidden = 8,
                        .num_layers = 1,
                        .num_dense_layers = 0,
                        .num_heads = 1,
                        .num_kv_heads = 1,
                        .head_dim = 2,
                        .dense_inter = 2,
                        .expert_inter = 2,
                        .num_experts = 2,
                        .top_k = 1,
                        .num_shared = 0};
  TempFolder folder;
  WriteText(folder.path() + "/config.json", ConfigJson(model));
  const auto good = SafetensorsBytes(RandomTensors(model));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), 8);
  Random random(31);
  int opened = 0, refused = 0;
  for (int round = 0; round < 1500; ++round) {
    auto bytes = good;
    const uint32_t edits = 1 + random.Below(3);
    for (uint32_t i = 0; i < edits; ++i) {
      const uint32_t at = random.Below(static_cast<uint32_t>(8 + header_bytes));
      switch (random.Below(4)) {
        case 0:
          bytes[at] = static_cast<std::byte>(random.Below(256));
          break;
        case 1:
          bytes[at] = static_cast<std::byte>('0' + random.Below(10));
          break;
        case 2:
          bytes.erase(bytes.begin() + at);
          break;
        default:
          bytes.resize(random.Below(static_cast<uint32_t>(bytes.size())) + 8);
          break;
      }
      if (bytes.size() < 8 + header_bytes) break;
    }
    WriteBytes(folder.path() + "/model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(folder.path());
    ++(checkpoint.ok() ? opened : refused);
    if (!checkpoint.ok()) continue;
    for (const auto& [name, tensor] : RandomTensors(model)) {
      const auto values = (*checkpoint)->LoadFloats(name);
      if (values.ok()) REQUIRE(values->size() * 2 <= bytes.size());
    }
  }
  CAPTURE(opened, refused);
  REQUIRE(refused > 1000);
}

}  // namespace
}  // namespace ballast
