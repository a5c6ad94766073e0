#include "runtime/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/json_depth.h"
#include "base/status.h"

namespace ballast {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;

// One entry of the header, checked against `data_bytes`.
absl::StatusOr<TensorView> ParseEntry(const std::string& where, const Json& entry,
                                      std::span<const std::byte> data) {
  const auto bad = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", what));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
      !entry.contains("data_offsets")) {
    return bad("needs dtype, shape and data_offsets");
  }
  const Json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  TensorView tensor;
  if (dtype == "F32") {
    tensor.dtype = DType::kF32;
  } else if (dtype == "BF16") {
    tensor.dtype = DType::kBF16;
  } else {
    return absl::UnimplementedError(
        absl::StrCat(where, ": dtype is ", dtype.dump(), ", supported: \"F32\", \"BF16\""));
  }
  if (!shape.is_array() || shape.size() > 8) return bad("shape is not a list of up to 8 numbers");
  uint64_t elements = 1;
  for (const Json& dimension : shape) {
    if (!dimension.is_number_unsigned()) return bad("shape " + shape.dump() + " has a bad entry");
    const uint64_t size = dimension.get<uint64_t>();
    if (size != 0 && elements > data.size() / size) {
      return bad("shape " + shape.dump() + " is larger than the file");
    }
    elements *= size;
    tensor.shape.push_back(static_cast<int64_t>(size));
  }
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return bad("data_offsets is not a pair of numbers");
  }
  const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
  if (begin > end || end > data.size()) {
    return bad(absl::StrCat("data_offsets [", begin, ", ", end, "] leave the file's ", data.size(),
                            " bytes of data (truncated?)"));
  }
  if (end - begin != elements * SizeOf(tensor.dtype)) {
    return bad(absl::StrCat("shape ", shape.dump(), " of ", dtype.dump(), " needs ",
                            elements * SizeOf(tensor.dtype), " bytes, data_offsets give ",
                            end - begin));
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

}  // namespace

int64_t TensorView::num_elements() const {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->path_ = path;
  file->fd_ = fd;
  struct stat info {};
  if (::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size >= 8) {
    file->map_bytes_ = static_cast<size_t>(info.st_size);
    void* map = ::mmap(nullptr, file->map_bytes_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map != MAP_FAILED) file->map_ = map;
  }
  if (file->map_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a file of at least 8 bytes"));
  }
  BALLAST_RETURN_IF_ERROR(file->Parse());
  return file;
}

SafetensorsFile::~SafetensorsFile() {
  if (map_ != nullptr) ::munmap(map_, map_bytes_);
  if (fd_ >= 0) ::close(fd_);
}

absl::Status SafetensorsFile::Read(const TensorView& tensor, std::span<std::byte> to) const {
  const auto begin = static_cast<size_t>(tensor.bytes.data() - static_cast<const std::byte*>(map_));
  for (size_t done = 0; done < to.size();) {
    const ssize_t got =
        ::pread(fd_, to.data() + done, to.size() - done, static_cast<off_t>(begin + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return absl::DataLossError(
          absl::StrCat(path_, ": cannot read byte ", begin + done, ": ",
                       got < 0 ? std::strerror(errno) : "the file has become shorter"));
    }
    done += static_cast<size_t>(got);
  }
  return absl::OkStatus();
}

absl::Status SafetensorsFile::Parse() {
  const auto* bytes = static_cast<const std::byte*>(map_);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes, 8);
  if (header_bytes > kMaxHeaderBytes || header_bytes > map_bytes_ - 8) {
    return absl::InvalidArgumentError(absl::StrCat(
        path_, ": the header says it has ", header_bytes, " bytes, the file has ", map_bytes_,
        " (truncated, or not safetensors); allowed: up to ", kMaxHeaderBytes));
  }
  const auto* text = reinterpret_cast<const char*>(bytes + 8);
  if (JsonNestsTooDeep({text, header_bytes})) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": the header nests deeper than ", kMostJsonDepth));
  }
  const Json header = Json::parse(text, text + header_bytes, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": the header is not a JSON object"));
  }
  const std::span<const std::byte> data(bytes + 8 + header_bytes, map_bytes_ - 8 - header_bytes);
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    BALLAST_ASSIGN_OR_RETURN(TensorView tensor,
                             ParseEntry(absl::StrCat(path_, ": ", name), entry, data));
    tensor.file = this;
    ranges.emplace_back(tensor.bytes.data(), tensor.bytes.data() + tensor.bytes.size());
    tensors_.emplace(name, std::move(tensor));
  }
  std::sort(ranges.begin(), ranges.end());
  const std::byte* at = data.data();
  for (const auto& [begin, end] : ranges) {
    if (begin != at) {
      return absl::InvalidArgumentError(absl::StrCat(path_,
                                                     ": tensors overlap or leave a hole at byte ",
                                                     begin - data.data(), " of the data"));
    }
    at = end;
  }
  if (at != data.data() + data.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path_, ": ", data.data() + data.size() - at, " bytes after the last tensor"));
  }
  return absl::OkStatus();
}

}  // namespace ballast
