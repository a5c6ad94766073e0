// Stands for matmul_onednn.cc where BALLAST_WITH_ONEDNN is off.
#include "base/status.h"
#include "kernels/matmul.h"

namespace ballast::cpu {

absl::StatusOr<std::unique_ptr<Matmul>> MakeOneDnnMatmul(int, int, DType) {
  return absl::UnimplementedError("this build has no oneDNN (BALLAST_WITH_ONEDNN is OFF)");
}

void SetMatmulThreads(int) {}

bool OneDnnHasBFloat16() { return false; }

}  // namespace ballast::cpu
