#ifndef BALLAST_RUNTIME_CHECKPOINT_H_
#define BALLAST_RUNTIME_CHECKPOINT_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/aligned_buffer.h"
#include "kernels/matmul.h"
#include "runtime/model_config.h"
#include "runtime/safetensors.h"

namespace ballast {

// Reads a whole file. ERRORS kNotFound, kInvalidArgument (larger than `max_bytes`)
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes);

// Packs the three matrices of a gated MLP, of `type`, in some form.
using PackMlp = std::function<absl::Status(const void* gate, const void* up, const void* down,
                                           DType type, std::byte* packed)>;

// A Hugging Face checkpoint folder: config.json, and model.safetensors or the files that
// model.safetensors.index.json names. Tensors stay on disk until they are asked for.
// THREADS const members from any thread.
class Checkpoint {
 public:
  // ERRORS name the file, key or tensor. Every tensor that the configuration calls for must be
  // there with its shape, and no other.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& folder);

  const ModelConfig& config() const { return config_; }
  const std::string& folder() const { return folder_; }

  // The tensor as fp32. This and what follows read the files as they are now.
  // ERRORS kInvalidArgument: a tensor is missing, or has a NaN or an infinity
  //        kDataLoss: a file has become shorter, or cannot be read
  absl::StatusOr<std::vector<float>> LoadFloats(const std::string& name) const;

  // Packs matrices of [rows, matmul.k()] that stand one below the other.
  absl::Status LoadMatrix(const std::vector<std::string>& names, const Matmul& matmul,
                          AlignedBuffer* packed) const;
  // Packs `<prefix>gate_proj.weight`, up_proj and down_proj into `packed`.
  absl::Status LoadMlp(const std::string& prefix, const PackMlp& pack, std::byte* packed) const;

 private:
  Checkpoint() = default;
  absl::Status OpenFiles();
  absl::Status CheckTensors() const;
  struct Loaded {
    DType dtype;
    AlignedBuffer bytes;
  };
  // The tensor, all its elements finite.
  absl::StatusOr<Loaded> Load(const std::string& name) const;

  std::string folder_;
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const TensorView*> tensors_;
};

// "model.layers.<layer>.mlp.experts.<expert>."
std::string ExpertPrefix(int layer, int expert);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_CHECKPOINT_H_
