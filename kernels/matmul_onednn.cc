#include <omp.h>

#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>

#include "base/status.h"
#include "kernels/matmul.h"

namespace ballast::cpu {
namespace {

using dnnl::memory;

dnnl::engine& CpuEngine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

memory::data_type TypeOf(DType type) {
  return type == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

// The parameters are reordered once into the layout that the library asks for; one primitive with
// exactly kRowBlock rows serves every batch size.
class OneDnnMatmul : public Matmul {
 public:
  OneDnnMatmul(int n, int k, DType dtype) : Matmul(n, k, dtype), stream_(CpuEngine()) {
    const auto type = TypeOf(dtype);
    const memory::desc x({kRowBlock, k}, type, memory::format_tag::ab);
    const memory::desc w({k, n}, type, memory::format_tag::any);
    const memory::desc y({kRowBlock, n}, memory::data_type::f32, memory::format_tag::ab);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), attributes,
                                                   CpuEngine());
    matmul_ = dnnl::matmul(description);
    packed_desc_ = description.weights_desc();
    x_ = memory(x, CpuEngine(), nullptr);
    w_ = memory(packed_desc_, CpuEngine(), nullptr);
    y_ = memory(y, CpuEngine(), nullptr);
    scratch_ = memory(description.scratchpad_desc(), CpuEngine());
    arguments_ = {{DNNL_ARG_SRC, x_},
                  {DNNL_ARG_WEIGHTS, w_},
                  {DNNL_ARG_DST, y_},
                  {DNNL_ARG_SCRATCHPAD, scratch_}};
  }

  size_t packed_bytes() const override { return packed_desc_.get_size(); }

  absl::Status Pack(const void* w, DType w_type, std::byte* packed) const override {
    try {
      // Row-major [n, k] is column-major [k, n].
      memory from({{k(), n()}, TypeOf(w_type), memory::format_tag::ba}, CpuEngine(),
                  const_cast<void*>(w));
      memory to(packed_desc_, CpuEngine(), packed);
      dnnl::stream stream(CpuEngine());
      dnnl::reorder(from, to).execute(stream, from, to);
      stream.wait();
    } catch (const dnnl::error& error) {
      return absl::InternalError(absl::StrCat("oneDNN could not pack a matrix of ", n(), " x ", k(),
                                              ": ", error.message));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const void* x, int m, const std::byte* packed, float* y) override {
    const auto* row = static_cast<const std::byte*>(x);
    const size_t x_block_bytes = SizeOf(dtype()) * kRowBlock * static_cast<size_t>(k());
    const size_t y_block = kRowBlock * static_cast<size_t>(n());
    try {
      w_.set_data_handle(const_cast<std::byte*>(packed));
      for (int begin = 0; begin < m; begin += kRowBlock) {
        x_.set_data_handle(const_cast<std::byte*>(row));
        y_.set_data_handle(y);
        matmul_.execute(stream_, arguments_);
        row += x_block_bytes;
        y += y_block;
      }
      stream_.wait();
    } catch (const dnnl::error& error) {
      return absl::InternalError(absl::StrCat("oneDNN failed on a product with ", n(), " x ", k(),
                                              " parameters: ", error.message));
    }
    return absl::OkStatus();
  }

 private:
  dnnl::stream stream_;
  dnnl::matmul matmul_;
  memory::desc packed_desc_;
  memory x_, w_, y_, scratch_;
  std::unordered_map<int, memory> arguments_;
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

void SetMatmulThreads(int num_threads) { omp_set_num_threads(num_threads); }

bool OneDnnHasBFloat16() { return MakeOneDnnMatmul(64, 64, DType::kBF16).ok(); }

}  // namespace ballast::cpu
