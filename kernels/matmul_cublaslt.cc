#include "kernels/matmul_cublaslt.h"

#include <cublasLt.h>

#include <array>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/device_kernels.h"
#include "kernels/matmul_row_major.h"

namespace ballast::cuda {
namespace {

// The library is asked once which algorithm is best for so many rows. Steps have from a few rows
// (then any algorithm waits for w to be read) to some thousands (then the large tiles that it picks
// from here on are the right ones).
constexpr int kReferenceRows = 256;
// The chosen algorithm has to do for these too: the fewest, and more than any step has.
constexpr std::array<int, 3> kCheckedRows = {1, kReferenceRows, 1 << 16};
// Candidates are sorted, best first, and those with a split of k may come first.
constexpr int kMaxCandidates = 64;
constexpr uint32_t kAlignmentBytes = 16;

// cuBLASLt counts columns first: a row-major [rows, k] matrix is its k x rows one. So y is
// w (transposed) times x, and m is the number of columns of x and y: no leading dimension, on which
// what an algorithm can do depends.
class CublasLtMatmul : public RowMajorMatmul {
 public:
  CublasLtMatmul(int n, int k, DType dtype) : RowMajorMatmul(n, k, dtype) {}
  ~CublasLtMatmul() override {
    if (handle_ != nullptr) static_cast<void>(cublasLtDestroy(handle_));
  }

  absl::Status Create() {
    if (n() <= 0 || k() <= 0) {
      return absl::InvalidArgumentError(absl::StrCat("a product of cuBLASLt with ", n(), " x ", k(),
                                                     " parameters: both have to be positive"));
    }
    const cudaDataType_t type = dtype() == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
    // Pedantic: neither TF32 nor sums of bf16 in place of fp32, whatever the environment says.
    const cublasComputeType_t compute =
        dtype() == DType::kF32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    BALLAST_RETURN_IF_ERROR(Said(cublasLtCreate(&handle_), "a handle"));
    BALLAST_RETURN_IF_ERROR(
        Said(cublasLtMatmulDescInit(&product_, compute, CUDA_R_32F), "a description"));
    BALLAST_RETURN_IF_ERROR(
        Said(cublasLtMatmulDescSetAttribute(&product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                            sizeof transposed),
             "a description"));
    const auto columns = static_cast<uint64_t>(n());
    BALLAST_RETURN_IF_ERROR(
        Said(cublasLtMatrixLayoutInit(&w_, type, static_cast<uint64_t>(k()), columns, k()),
             "the layout of w"));
    return ChooseAlgorithm();
  }

  absl::Status Run(const void* x, int m, const std::byte* packed, float* y,
                   Stream stream) override {
    if (m == 0) return absl::OkStatus();
    const float one = 1.0f, zero = 0.0f;
    Rows rows;
    BALLAST_RETURN_IF_ERROR(RowsOf(m, &rows));
    const cublasStatus_t status =
        cublasLtMatmul(handle_, &product_, &one, packed, &w_, x, &rows.x, &zero, y, &rows.y, y,
                       &rows.y, &algorithm_, nullptr, 0, stream);
    if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
    return Said(status, absl::StrCat(m, " rows").c_str());
  }

 private:
  struct Rows {
    cublasLtMatrixLayoutOpaque_t x, y;
  };

  absl::Status RowsOf(int m, Rows* rows) const {
    const cudaDataType_t type = dtype() == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
    const auto width_x = static_cast<uint64_t>(k()), width_y = static_cast<uint64_t>(n());
    const auto count = static_cast<uint64_t>(m);
    BALLAST_RETURN_IF_ERROR(
        Said(cublasLtMatrixLayoutInit(&rows->x, type, width_x, count, k()), "the layout of x"));
    return Said(cublasLtMatrixLayoutInit(&rows->y, CUDA_R_32F, width_y, count, n()),
                "the layout of y");
  }

  absl::Status ChooseAlgorithm() {
    cublasLtMatmulPreferenceOpaque_t preference;  // as it begins it allows no workspace
    BALLAST_RETURN_IF_ERROR(Said(cublasLtMatmulPreferenceInit(&preference), "a preference"));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      BALLAST_RETURN_IF_ERROR(
          Said(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &kAlignmentBytes,
                                                    sizeof kAlignmentBytes),
               "a preference"));
    }
    Rows rows;
    BALLAST_RETURN_IF_ERROR(RowsOf(kReferenceRows, &rows));
    std::array<cublasLtMatmulHeuristicResult_t, kMaxCandidates> results;
    int found = 0;
    BALLAST_RETURN_IF_ERROR(
        Said(cublasLtMatmulAlgoGetHeuristic(handle_, &product_, &w_, &rows.x, &rows.y, &rows.y,
                                            &preference, kMaxCandidates, results.data(), &found),
             "the choice of an algorithm"));
    for (const auto& result : std::span(results).first(static_cast<size_t>(found))) {
      if (result.state != CUBLAS_STATUS_SUCCESS || !Suits(result.algo)) continue;
      algorithm_ = result.algo;
      return absl::OkStatus();
    }
    return absl::UnimplementedError(absl::StrCat(
        "cuBLASLt has no algorithm that sums in one piece for ", Name(), ", of ", found));
  }

  // One piece, no workspace, any number of rows.
  bool Suits(const cublasLtMatmulAlgo_t& algorithm) {
    int32_t pieces = 0;
    uint32_t reduction = 0;
    const bool known =
        cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &pieces,
                                             sizeof pieces, nullptr) == CUBLAS_STATUS_SUCCESS &&
        cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                             &reduction, sizeof reduction,
                                             nullptr) == CUBLAS_STATUS_SUCCESS;
    // 0 and 1 both mean that k is not split.
    if (!known || pieces < 0 || pieces > 1 || reduction != CUBLASLT_REDUCTION_SCHEME_NONE) {
      return false;
    }
    for (const int m : kCheckedRows) {
      Rows rows;
      cublasLtMatmulHeuristicResult_t result;
      if (!RowsOf(m, &rows).ok() ||
          cublasLtMatmulAlgoCheck(handle_, &product_, &w_, &rows.x, &rows.y, &rows.y, &algorithm,
                                  &result) != CUBLAS_STATUS_SUCCESS ||
          result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize != 0) {
        return false;
      }
    }
    return true;
  }

  std::string Name() const {
    return absl::StrCat("a ", NameOf(dtype()), " product with ", n(), " x ", k(), " parameters");
  }

  absl::Status Said(cublasStatus_t status, const char* what) const {
    if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
    const std::string text =
        absl::StrCat("cuBLASLt: ", what, ", of ", Name(), ": ", cublasLtGetStatusString(status));
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? absl::UnimplementedError(text)
                                                 : absl::InternalError(text);
  }

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDescOpaque_t product_;
  cublasLtMatrixLayoutOpaque_t w_;
  cublasLtMatmulAlgo_t algorithm_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Matmul>> MakeCublasLtMatmul(int n, int k, DType dtype) {
  auto matmul = std::make_unique<CublasLtMatmul>(n, k, dtype);
  BALLAST_RETURN_IF_ERROR(matmul->Create());
  return matmul;
}

}  // namespace ballast::cuda

namespace ballast {

const KernelSet& DeviceKernels() {
  static const KernelSet kernels = [] {
    KernelSet set = PlainDeviceKernels();
    set.name = "cuda";
    set.make_matmul = cuda::MakeCublasLtMatmul;
    return set;
  }();
  return kernels;
}

}  // namespace ballast
