#include "base/npy.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/file.h"
#include "base/status.h"

namespace ballast {
namespace {

static_assert(std::endian::native == std::endian::little, "elements are copied as they are");

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6;
constexpr size_t kAlignment = 64;  // of the data, from the begin of the file
constexpr size_t kMostDimensions = 8;

struct TypeRow {
  NpyType type;
  const char* name;
  const char* descr;
  size_t bytes;
};
constexpr TypeRow kTypes[] = {{NpyType::kU8, "u8", "|u1", 1},   {NpyType::kU16, "u16", "<u2", 2},
                              {NpyType::kI32, "i32", "<i4", 4}, {NpyType::kI64, "i64", "<i8", 8},
                              {NpyType::kF32, "f32", "<f4", 4}, {NpyType::kF64, "f64", "<f8", 8}};

const TypeRow& RowOf(NpyType type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row;
  }
  BALLAST_CHECK(false);
}

template <typename T>
T Load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
void Store(int64_t value, std::byte* at) {
  const T converted = static_cast<T>(value);
  std::memcpy(at, &converted, sizeof converted);
}

// What a message quotes of a file: enough to find the place, in printable characters.
std::string Quote(const std::string& text) {
  constexpr size_t kLongestQuote = 40;
  std::string quoted;
  for (char c : text.substr(0, kLongestQuote)) {
    quoted += std::isprint(static_cast<unsigned char>(c)) != 0 ? c : '?';
  }
  return absl::StrCat("'", quoted, text.size() > kLongestQuote ? "...'" : "'");
}

// The dictionary of Python literals that heads the file:
//   {'descr': '<u2', 'fortran_order': False, 'shape': (3, 4), }
class HeaderReader {
 public:
  explicit HeaderReader(std::string text) : text_(std::move(text)) {}

  // ERRORS kInvalidArgument, without the file's name
  absl::Status Read(NpyArray* array);

 private:
  absl::Status Wrong(const char* what) const {
    return absl::InvalidArgumentError(
        absl::StrCat("the header has no ", what, " at byte ", at_, ": ", Quote(text_.substr(at_))));
  }
  void SkipSpace() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool Take(char c) {
    SkipSpace();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool TakeWord(const char* word) {
    SkipSpace();
    if (text_.compare(at_, std::strlen(word), word) != 0) return false;
    at_ += std::strlen(word);
    return true;
  }
  bool TakeText(std::string* out) {
    SkipSpace();
    if (at_ == text_.size() || (text_[at_] != '\'' && text_[at_] != '"')) return false;
    const size_t end = text_.find(text_[at_], at_ + 1);
    if (end == std::string::npos) return false;
    *out = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return true;
  }
  absl::Status ReadType(NpyArray* array);
  absl::Status ReadShape(NpyArray* array);

  std::string text_;
  size_t at_ = 0;
};

absl::Status HeaderReader::ReadType(NpyArray* array) {
  std::string descr;
  if (!TakeText(&descr)) return Wrong("text for 'descr'");
  for (const TypeRow& row : kTypes) {
    if (descr == row.descr || (row.bytes == 1 && descr == "<u1")) {
      array->type = row.type;
      return absl::OkStatus();
    }
  }
  std::string allowed;
  for (const TypeRow& row : kTypes)
    absl::StrAppend(&allowed, allowed.empty() ? "" : ", ", row.descr);
  return absl::InvalidArgumentError(
      absl::StrCat("the element type is ", Quote(descr), ", allowed: ", allowed));
}

absl::Status HeaderReader::ReadShape(NpyArray* array) {
  if (!Take('(')) return Wrong("shape in parentheses");
  while (!Take(')')) {
    SkipSpace();
    int64_t extent = 0;
    const size_t first = at_;
    while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0) {
      const int64_t digit = text_[at_++] - '0';
      if (extent > (std::numeric_limits<int64_t>::max() - digit) / 10) {
        return absl::InvalidArgumentError("the shape has a number that overflows 64 bits");
      }
      extent = extent * 10 + digit;
    }
    if (at_ == first) return Wrong("number in the shape");
    array->shape.push_back(extent);
    if (array->shape.size() > kMostDimensions) {
      return absl::InvalidArgumentError(
          absl::StrCat("the shape has more than ", kMostDimensions, " dimensions"));
    }
    if (Take(',')) continue;
    if (!Take(')')) return Wrong("end of the shape");
    break;
  }
  return absl::OkStatus();
}

absl::Status HeaderReader::Read(NpyArray* array) {
  bool has_type = false, has_order = false, has_shape = false;
  if (!Take('{')) return Wrong("'{'");
  while (!Take('}')) {
    std::string key;
    if (!TakeText(&key) || !Take(':')) return Wrong("key");
    if (key == "descr" && !has_type) {
      BALLAST_RETURN_IF_ERROR(ReadType(array));
      has_type = true;
    } else if (key == "fortran_order" && !has_order) {
      if (TakeWord("True")) {
        return absl::InvalidArgumentError(
            "the array is in Fortran order, allowed: C order (numpy.ascontiguousarray converts)");
      }
      if (!TakeWord("False")) return Wrong("False for 'fortran_order'");
      has_order = true;
    } else if (key == "shape" && !has_shape) {
      BALLAST_RETURN_IF_ERROR(ReadShape(array));
      has_shape = true;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("the header's key ", Quote(key), " is unknown or stands twice"));
    }
    if (Take(',')) continue;
    if (!Take('}')) return Wrong("'}'");
    break;
  }
  SkipSpace();
  if (at_ != text_.size()) return Wrong("end");
  if (has_type && has_order && has_shape) return absl::OkStatus();
  return absl::InvalidArgumentError("the header lacks descr, fortran_order or shape");
}

// Product of the extents times the bytes of an element, or -1 when it overflows.
int64_t BytesOf(const NpyArray& array) {
  int64_t bytes = static_cast<int64_t>(SizeOf(array.type));
  bool empty = false;
  for (int64_t extent : array.shape) empty |= extent == 0;
  if (empty) return 0;
  for (int64_t extent : array.shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return -1;
  }
  return bytes;
}

// Parses all but the file's name into the messages.
absl::StatusOr<NpyArray> Parse(const std::string& bytes) {
  const auto cut_off = [&](const char* where) {
    return absl::InvalidArgumentError(
        absl::StrCat("cut off in ", where, " (the file has ", bytes.size(), " bytes)"));
  };
  if (bytes.compare(0, kMagicBytes, kMagic, kMagicBytes) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("not a .npy file: it begins with ", Quote(bytes.substr(0, kMagicBytes + 2))));
  }
  if (bytes.size() < kMagicBytes + 2) return cut_off("the version");
  const int major = static_cast<unsigned char>(bytes[kMagicBytes]);
  const int minor = static_cast<unsigned char>(bytes[kMagicBytes + 1]);
  if ((major != 1 && major != 2) || minor != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("format version ", major, ".", minor, ", allowed: 1.0 and 2.0"));
  }
  const size_t length_bytes = major == 1 ? 2 : 4;
  const size_t header_at = kMagicBytes + 2 + length_bytes;
  if (bytes.size() < header_at) return cut_off("the length of the header");
  size_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data() + kMagicBytes + 2, length_bytes);
  if (header_bytes > bytes.size() - header_at) return cut_off("the header");

  NpyArray array;
  BALLAST_RETURN_IF_ERROR(HeaderReader(bytes.substr(header_at, header_bytes)).Read(&array));
  const int64_t data_bytes = BytesOf(array);
  if (data_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the shape ", ShapeText(array.shape), " overflows 64 bits"));
  }
  const size_t data_at = header_at + header_bytes;
  const int64_t present = static_cast<int64_t>(bytes.size() - data_at);
  if (present != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", present, " bytes of data; the shape ", ShapeText(array.shape), " of ",
                     NameOf(array.type), " needs ", data_bytes,
                     present < data_bytes ? " (cut off)" : " (bytes left over)"));
  }
  array.data.resize(static_cast<size_t>(data_bytes));
  if (data_bytes > 0) std::memcpy(array.data.data(), bytes.data() + data_at, array.data.size());
  return array;
}

}  // namespace

size_t SizeOf(NpyType type) {
  return RowOf(type).bytes;
}
const char* NameOf(NpyType type) {
  return RowOf(type).name;
}

int64_t NpyArray::num_elements() const {
  // Beside a zero, the other extents may be too large to multiply.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

int64_t NpyArray::IntegerAt(int64_t index) const {
  const std::byte* at = data.data() + static_cast<size_t>(index) * SizeOf(type);
  switch (type) {
    case NpyType::kU8:
      return Load<uint8_t>(at);
    case NpyType::kU16:
      return Load<uint16_t>(at);
    case NpyType::kI32:
      return Load<int32_t>(at);
    case NpyType::kI64:
      return Load<int64_t>(at);
    case NpyType::kF32:
    case NpyType::kF64:
      break;
  }
  BALLAST_CHECK(false);
}

double NpyArray::NumberAt(int64_t index) const {
  const std::byte* at = data.data() + static_cast<size_t>(index) * SizeOf(type);
  if (type == NpyType::kF32) return Load<float>(at);
  if (type == NpyType::kF64) return Load<double>(at);
  return static_cast<double>(IntegerAt(index));
}

NpyArray MakeNpyArray(NpyType type, std::vector<int64_t> shape, std::span<const int64_t> values) {
  NpyArray array{.type = type, .shape = std::move(shape), .data = {}};
  BALLAST_CHECK(array.num_elements() == static_cast<int64_t>(values.size()));
  array.data.resize(values.size() * SizeOf(type));
  for (size_t i = 0; i < values.size(); ++i) {
    std::byte* at = array.data.data() + i * SizeOf(type);
    switch (type) {
      case NpyType::kU8:
        Store<uint8_t>(values[i], at);
        break;
      case NpyType::kU16:
        Store<uint16_t>(values[i], at);
        break;
      case NpyType::kI32:
        Store<int32_t>(values[i], at);
        break;
      case NpyType::kI64:
        Store<int64_t>(values[i], at);
        break;
      case NpyType::kF32:
        Store<float>(values[i], at);
        break;
      case NpyType::kF64:
        Store<double>(values[i], at);
        break;
    }
  }
  return array;
}

std::string ShapeText(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i > 0 ? ", " : "", shape[i]);
  return text + "]";
}

absl::StatusOr<NpyArray> ParseNpy(const std::string& name, const std::string& bytes) {
  absl::StatusOr<NpyArray> array = Parse(bytes);
  if (array.ok()) return array;
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", array.status().message()));
}

std::string NpyHeader(NpyType type, std::span<const int64_t> extents) {
  std::string shape = "(";
  for (size_t i = 0; i < extents.size(); ++i) {
    absl::StrAppend(&shape, i > 0 ? " " : "", extents[i],
                    i + 1 < extents.size() || extents.size() == 1 ? "," : "");
  }
  std::string header = absl::StrCat("{'descr': '", RowOf(type).descr,
                                    "', 'fortran_order': False, 'shape': ", shape, "), }");
  const size_t before = kMagicBytes + 2 + sizeof(uint16_t);
  const size_t end = (before + header.size() + 1 + kAlignment - 1) / kAlignment * kAlignment;
  header.append(end - before - header.size() - 1, ' ');
  header += '\n';
  std::string bytes(kMagic, kMagicBytes);
  bytes += std::string("\x01\x00", 2);
  bytes += static_cast<char>(header.size() & 0xff);
  bytes += static_cast<char>(header.size() >> 8);
  return bytes + header;
}

std::string SerializeNpy(const NpyArray& array) {
  std::string bytes = NpyHeader(array.type, array.shape);
  bytes.append(reinterpret_cast<const char*>(array.data.data()), array.data.size());
  return bytes;
}

absl::StatusOr<NpyArray> ReadNpy(const std::string& path) {
  BALLAST_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  return ParseNpy(path, bytes);
}

absl::Status WriteNpy(const std::string& path, const NpyArray& array) {
  return WriteFile(path, SerializeNpy(array));
}

}  // namespace ballast
