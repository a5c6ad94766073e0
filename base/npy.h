// Arrays in NumPy's .npy files.
#ifndef BALLAST_BASE_NPY_H_
#define BALLAST_BASE_NPY_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace ballast {

enum class NpyType { kU8, kU16, kI32, kI64, kF32, kF64 };

size_t SizeOf(NpyType type);
// "u8", "u16", "i32", "i64", "f32", "f64".
const char* NameOf(NpyType type);

// An array in C order: the last index runs fastest.
struct NpyArray {
  NpyType type = NpyType::kU8;
  std::vector<int64_t> shape;   // empty: one number
  std::vector<std::byte> data;  // num_elements() elements, little-endian, one after another

  int64_t num_elements() const;
  bool is_integer() const { return type != NpyType::kF32 && type != NpyType::kF64; }
  // Element `index` of the flattened array.
  // REQUIRES 0 <= index < num_elements(); is_integer() for IntegerAt
  int64_t IntegerAt(int64_t index) const;
  double NumberAt(int64_t index) const;

  bool operator==(const NpyArray&) const = default;
};

// An array of `type` with the values, each converted. REQUIRES they fit the shape and the type.
NpyArray MakeNpyArray(NpyType type, std::vector<int64_t> shape, std::span<const int64_t> values);

// "[3, 4]", for messages.
std::string ShapeText(std::span<const int64_t> shape);

// Reads format 1.0 and 2.0, little-endian, C order, of the types above and at most 8 dimensions.
// `name` begins every message. Never reads outside `bytes`, never allocates more than they fill.
// ERRORS kInvalidArgument says what is wrong: the magic, the version, the header, the type, Fortran
//        order, a shape that overflows, bytes missing at the end or left over after it
absl::StatusOr<NpyArray> ParseNpy(const std::string& name, const std::string& bytes);

// Format 1.0 as NumPy writes it: all that stands before the data, padded so that these begin at a
// multiple of 64.
std::string NpyHeader(NpyType type, std::span<const int64_t> shape);
// The header, then the data.
std::string SerializeNpy(const NpyArray& array);

// ERRORS kNotFound: no such file; kInvalidArgument as ParseNpy; the message names the path
absl::StatusOr<NpyArray> ReadNpy(const std::string& path);
absl::Status WriteNpy(const std::string& path, const NpyArray& array);

}  // namespace ballast

#endif  // BALLAST_BASE_NPY_H_
