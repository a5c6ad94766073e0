#include <omp.h>

#include <algorithm>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/status.h"
#include "kernels/matmul.h"

namespace ballast::cpu {
namespace {

using dnnl::memory;

// Columns are cut into tiles of this many, so that threads have something to share even when there
// is one block of rows. The cut is fixed: it must not depend on the number of threads.
constexpr int kTileColumns = 512;
// Multiply-adds below which waking other threads costs more than it brings.
constexpr int64_t kParallelWork = int64_t{1} << 23;

int matmul_threads = 1;

dnnl::engine& CpuEngine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::data_type TypeOf(DType type) {
  return type == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

// kRowBlock rows times one tile of columns. Made for one thread: how the library cuts a product,
// and with it the order of its sums, may follow the number of threads it is made for.
class TileProduct {
 public:
  TileProduct(int columns, int k, int y_stride, DType dtype) {
    omp_set_num_threads(1);
    const auto type = TypeOf(dtype);
    const memory::desc x({kRowBlock, k}, type, memory::format_tag::ab);
    const memory::desc w({k, columns}, type, memory::format_tag::any);
    const memory::desc y({kRowBlock, columns}, memory::data_type::f32, memory::dims{y_stride, 1});
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), attributes,
                                                   CpuEngine());
    matmul_ = dnnl::matmul(description);
    packed_desc_ = description.weights_desc();
    x_desc_ = x;
    y_desc_ = y;
    scratch_desc_ = description.scratchpad_desc();
  }

  // What one thread needs to run the product.
  struct Context {
    explicit Context(const TileProduct& tile)
        : stream(CpuEngine()),
          x(tile.x_desc_, CpuEngine(), nullptr),
          w(tile.packed_desc_, CpuEngine(), nullptr),
          y(tile.y_desc_, CpuEngine(), nullptr),
          scratch(tile.scratch_desc_, CpuEngine()),
          arguments{{DNNL_ARG_SRC, x},
                    {DNNL_ARG_WEIGHTS, w},
                    {DNNL_ARG_DST, y},
                    {DNNL_ARG_SCRATCHPAD, scratch}} {}
    dnnl::stream stream;
    memory x, w, y, scratch;
    std::unordered_map<int, memory> arguments;
  };

  void Run(const std::byte* x, const std::byte* packed, float* y, Context* context) const {
    context->x.set_data_handle(const_cast<std::byte*>(x));
    context->w.set_data_handle(const_cast<std::byte*>(packed));
    context->y.set_data_handle(y);
    matmul_.execute(context->stream, context->arguments);
  }

  void Pack(const std::byte* w, int columns, int k, DType w_type, std::byte* packed) const {
    // Row-major [n, k] is column-major [k, n].
    memory from({{k, columns}, TypeOf(w_type), memory::format_tag::ba}, CpuEngine(),
                const_cast<std::byte*>(w));
    memory to(packed_desc_, CpuEngine(), packed);
    dnnl::stream stream(CpuEngine());
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
  }

  size_t packed_bytes() const { return RoundUp(packed_desc_.get_size(), kCacheLineBytes); }

 private:
  dnnl::matmul matmul_;
  memory::desc packed_desc_, x_desc_, y_desc_, scratch_desc_;
};

class OneDnnMatmul : public Matmul {
 public:
  OneDnnMatmul(int n, int k, DType dtype) : Matmul(n, k, dtype) {
    for (int begin = 0; begin < n; begin += kTileColumns) {
      const int columns = std::min(kTileColumns, n - begin);
      if (begin == 0 || columns < kTileColumns) products_.emplace_back(columns, k, n, dtype);
      tiles_.push_back({begin, columns, products_.size() - 1, packed_bytes_});
      packed_bytes_ += products_.back().packed_bytes();
    }
    for (int thread = 0; thread < std::max(matmul_threads, 1); ++thread) {
      contexts_.emplace_back();
      for (const TileProduct& product : products_) contexts_.back().emplace_back(product);
    }
  }

  size_t packed_bytes() const override { return packed_bytes_; }

  absl::Status Pack(const void* w, DType w_type, std::byte* packed) const override {
    const size_t row_bytes = static_cast<size_t>(k()) * SizeOf(w_type);
    try {
      for (const Tile& tile : tiles_) {
        products_[tile.product].Pack(
            static_cast<const std::byte*>(w) + static_cast<size_t>(tile.begin) * row_bytes,
            tile.columns, k(), w_type, packed + tile.packed_offset);
      }
    } catch (const dnnl::error& error) {
      return absl::InternalError(
          absl::StrCat("oneDNN could not pack a matrix of ", n(), " x ", k(), ": ", error.message));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const void* x, int m, const std::byte* packed, float* y, Stream) override {
    const int blocks = (m + kRowBlock - 1) / kRowBlock;
    const int jobs = blocks * static_cast<int>(tiles_.size());
    const int64_t work = int64_t{blocks} * kRowBlock * n() * k();
    const int threads =
        work < kParallelWork ? 1 : std::min(static_cast<int>(contexts_.size()), jobs);
    if (threads == 1) {
      try {
        for (int job = 0; job < jobs; ++job) RunTile(job, x, packed, y, 0);
      } catch (const dnnl::error& error) {
        return Failed(error.message);
      }
      return absl::OkStatus();
    }
    const char* failure = nullptr;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int job = 0; job < jobs; ++job) {
      try {
        RunTile(job, x, packed, y, omp_get_thread_num());
      } catch (const dnnl::error& error) {
#pragma omp critical
        failure = error.message;
      }
    }
    return failure == nullptr ? absl::OkStatus() : Failed(failure);
  }

 private:
  struct Tile {
    int begin, columns;
    size_t product, packed_offset;
  };

  // Jobs go over the tiles first: neighbouring jobs share the parameters.
  void RunTile(int job, const void* x, const std::byte* packed, float* y, int thread) {
    const int blocks_before = job / static_cast<int>(tiles_.size());
    const Tile& tile = tiles_[static_cast<size_t>(job) % tiles_.size()];
    const size_t row = static_cast<size_t>(blocks_before) * kRowBlock;
    products_[tile.product].Run(
        static_cast<const std::byte*>(x) + row * static_cast<size_t>(k()) * SizeOf(dtype()),
        packed + tile.packed_offset, y + row * static_cast<size_t>(n()) + tile.begin,
        &contexts_[static_cast<size_t>(thread)][tile.product]);
  }

  absl::Status Failed(const char* why) const {
    return absl::InternalError(
        absl::StrCat("oneDNN failed on a product with ", n(), " x ", k(), " parameters: ", why));
  }

  std::vector<TileProduct> products_;  // one, or two where the last tile is narrower
  std::vector<Tile> tiles_;
  size_t packed_bytes_ = 0;
  std::vector<std::vector<TileProduct::Context>> contexts_;  // [thread][product]
};

}  // namespace

absl::StatusOr<std::unique_ptr<Matmul>> MakeOneDnnMatmul(int n, int k, DType dtype) {
  try {
    return std::make_unique<OneDnnMatmul>(n, k, dtype);
  } catch (const dnnl::error& error) {
    return absl::UnimplementedError(absl::StrCat("oneDNN has no ", NameOf(dtype), " product of ", n,
                                                 " x ", k, " here: ", error.message));
  }
}

void SetMatmulThreads(int num_threads) {
  matmul_threads = num_threads;
}

bool OneDnnHasBFloat16() {
  return MakeOneDnnMatmul(64, 64, DType::kBF16).ok();
}

}  // namespace ballast::cpu
