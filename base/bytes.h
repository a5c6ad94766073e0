// Little-endian byte strings for messages and files: a writer, and a reader that cannot overrun.
#ifndef BALLAST_BASE_BYTES_H_
#define BALLAST_BASE_BYTES_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

namespace ballast {

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

// Appends numbers and arrays to a byte vector.
class ByteWriter {
 public:
  template <typename T>
  void Put(T value) {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
    Append(&value, sizeof(T));
  }
  // Length (uint32), then the elements.
  template <typename T>
  void PutArray(std::span<const T> values) {
    static_assert(std::is_arithmetic_v<T> || std::is_same_v<T, std::byte>);
    Put(static_cast<uint32_t>(values.size()));
    Append(values.data(), values.size_bytes());
  }
  template <typename T>
  void PutArray(const std::vector<T>& values) { PutArray(std::span<const T>(values)); }

  std::vector<std::byte> Take() { return std::move(bytes_); }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  void Append(const void* data, size_t size) {
    const size_t at = bytes_.size();
    bytes_.resize(at + size);
    if (size > 0) std::memcpy(bytes_.data() + at, data, size);
  }
  std::vector<std::byte> bytes_;
};

// Reads what ByteWriter wrote. After the first read past the end, ok() is false for good and every
// read gives zero or an empty array: callers check once, at the end.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <typename T>
  T Get() {
    T value{};
    if (rest_.size() < sizeof(T)) {
      Fail();
      return value;
    }
    std::memcpy(&value, rest_.data(), sizeof(T));
    rest_ = rest_.subspan(sizeof(T));
    return value;
  }
  template <typename T>
  std::vector<T> GetArray() {
    const size_t count = Get<uint32_t>();
    if (count > rest_.size() / sizeof(T)) {
      Fail();
      return {};
    }
    std::vector<T> values(count);
    if (count > 0) std::memcpy(values.data(), rest_.data(), count * sizeof(T));
    rest_ = rest_.subspan(count * sizeof(T));
    return values;
  }

  bool ok() const { return ok_; }
  // Everything was read, nothing was missing.
  bool AtEnd() const { return ok_ && rest_.empty(); }

 private:
  void Fail() {
    ok_ = false;
    rest_ = {};
  }
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace ballast

#endif  // BALLAST_BASE_BYTES_H_
