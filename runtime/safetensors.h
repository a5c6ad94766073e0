#ifndef BALLAST_RUNTIME_SAFETENSORS_H_
#define BALLAST_RUNTIME_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"

namespace ballast {

class SafetensorsFile;

// A tensor in a mapped file; lives as long as the file.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
  const SafetensorsFile* file = nullptr;

  int64_t num_elements() const;
};

// One memory-mapped safetensors file. The header is hostile input: every number in it is checked
// against the file before it is used; ranges may not overlap or leave holes.
class SafetensorsFile {
 public:
  // ERRORS kNotFound: no such file; kInvalidArgument: what is wrong with it, and where;
  //        kUnimplemented: a tensor of another type than F32 or BF16
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

  // The bytes of a tensor, from the file and not through the mapping: where the file has changed
  // since Open, touching the mapping can end the process.
  // SHAPES to [tensor.bytes.size()]  REQUIRES tensor.file == this
  // ERRORS kDataLoss: the file is too short by now, or cannot be read; names it and the byte
  absl::Status Read(const TensorView& tensor, std::span<std::byte> to) const;

 private:
  SafetensorsFile() = default;
  absl::Status Parse();

  std::string path_;
  int fd_ = -1;
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_SAFETENSORS_H_
