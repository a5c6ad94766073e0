#include "kernels/grouped_mlp.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/vector_math.h"

namespace ballast {
namespace {

constexpr int kRun = 8;  // rows of gate, then as many of up

size_t Elements(const ExpertShape& shape) {
  return static_cast<size_t>(shape.inter) * static_cast<size_t>(shape.hidden);
}

absl::Status CheckShape(const ExpertShape& shape) {
  for (const auto& [name, size] :
       {std::pair{"hidden", shape.hidden}, std::pair{"inter", shape.inter}}) {
    if (size <= 0 || size % kRun != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("grouped mlp: ", name, " is ", size, ", allowed: positive multiples of 8"));
    }
  }
  return absl::OkStatus();
}

template <typename From, typename To>
void Convert(const void* from, size_t first, size_t count, To* to) {
  for (size_t i = 0; i < count; ++i) {
    to[i] = FromFloat<To>(ToFloat(static_cast<const From*>(from)[first + i]));
  }
}

template <typename From, typename To>
void Pack(const ExpertShape& shape, const void* gate, const void* up, const void* down,
          std::byte* packed) {
  const size_t hidden = static_cast<size_t>(shape.hidden);
  To* both = reinterpret_cast<To*>(packed);
  for (int32_t row = 0; row < 2 * shape.inter; ++row) {
    const size_t from = static_cast<size_t>(row / (2 * kRun) * kRun + row % kRun) * hidden;
    const void* part = row / kRun % 2 == 0 ? gate : up;
    Convert<From>(part, from, hidden, both + static_cast<size_t>(row) * hidden);
  }
  Convert<From>(down, 0, Elements(shape), reinterpret_cast<To*>(packed + shape.down_offset()));
}

}  // namespace

size_t ExpertShape::down_offset() const {
  return 2 * Elements(*this) * SizeOf(dtype);
}

size_t ExpertShape::packed_bytes() const {
  return 3 * Elements(*this) * SizeOf(dtype);
}

absl::Status PackExpert(const ExpertShape& shape, const void* gate, const void* up,
                        const void* down, DType type, std::byte* packed) {
  BALLAST_RETURN_IF_ERROR(CheckShape(shape));
  const bool from_f32 = type == DType::kF32;
  if (shape.dtype == DType::kF32) {
    (from_f32 ? Pack<float, float> : Pack<BFloat16, float>)(shape, gate, up, down, packed);
  } else {
    (from_f32 ? Pack<float, BFloat16> : Pack<BFloat16, BFloat16>)(shape, gate, up, down, packed);
  }
  return absl::OkStatus();
}

absl::Status CheckAligned(const char* name, const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("grouped mlp: ", name, " is not aligned to 16 bytes"));
}

absl::Status CheckExpertGroups(const ExpertGroups& g, size_t packed_bytes) {
  if (g.num_groups < 0 || g.num_groups > kMaxMlpGroups) {
    return absl::InvalidArgumentError(
        absl::StrCat("grouped mlp: ", g.num_groups, " groups, allowed: 0 to ", kMaxMlpGroups));
  }
  if (g.num_rows < 0 || g.max_rows < 0 || g.max_rows > g.num_rows) {
    return absl::InvalidArgumentError(absl::StrCat("grouped mlp: max_rows is ", g.max_rows, " of ",
                                                   g.num_rows, " rows, allowed: 0 to all"));
  }
  if (g.num_blocks < 1 || g.block_bytes < packed_bytes || g.block_bytes % 16 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("grouped mlp: ", g.num_blocks, " blocks of ", g.block_bytes,
                     " bytes, allowed: 1 or more, of a multiple of 16 from ", packed_bytes, " up"));
  }
  return CheckAligned("arena", g.arena);
}

absl::Status CheckGroupedMlp(const GroupedMlpArgs& a) {
  BALLAST_RETURN_IF_ERROR(CheckShape(a.shape));
  BALLAST_RETURN_IF_ERROR(CheckExpertGroups(a.groups, a.shape.packed_bytes()));
  BALLAST_RETURN_IF_ERROR(CheckAligned("x", a.x));
  BALLAST_RETURN_IF_ERROR(CheckAligned("activated", a.activated));
  return CheckAligned("y", a.y);
}

namespace cpu {
namespace {

template <typename T>
void RunRow(const ExpertShape& shape, const T* x, const std::byte* block, T* activated, T* y) {
  const T* both = reinterpret_cast<const T*>(block);
  const T* down = reinterpret_cast<const T*>(block + shape.down_offset());
  for (int32_t i = 0; i < shape.inter; ++i) {
    const T* gate = both + static_cast<size_t>(i / kRun * 2 * kRun + i % kRun) * shape.hidden;
    const T* up = gate + static_cast<size_t>(kRun) * shape.hidden;
    activated[i] = FromFloat<T>(Silu(Dot(x, gate, shape.hidden)) * Dot(x, up, shape.hidden));
  }
  for (int32_t i = 0; i < shape.hidden; ++i) {
    const T* row = down + static_cast<size_t>(i) * shape.inter;
    y[i] = FromFloat<T>(Dot(activated, row, shape.inter));
  }
}

template <typename T>
void Run(const GroupedMlpArgs& a) {
  const ExpertGroups& groups = a.groups;
  for (int32_t g = 0; g < groups.num_groups; ++g) {
    const std::byte* block =
        groups.arena + static_cast<size_t>(groups.block[g]) * groups.block_bytes;
    for (int32_t i = 0; i < groups.rows[g]; ++i) {
      const size_t row = static_cast<size_t>(groups.begin[g] + i);
      RunRow(a.shape, static_cast<const T*>(a.x) + row * a.shape.hidden, block,
             static_cast<T*>(a.activated) + row * a.shape.inter,
             static_cast<T*>(a.y) + row * a.shape.hidden);
    }
  }
}

}  // namespace

absl::Status GroupedMlp(const GroupedMlpArgs& a, Stream) {
  BALLAST_RETURN_IF_ERROR(CheckGroupedMlp(a));
  if (a.shape.dtype == DType::kF32) {
    Run<float>(a);
  } else {
    Run<BFloat16>(a);
  }
  return absl::OkStatus();
}

}  // namespace cpu
}  // namespace ballast
