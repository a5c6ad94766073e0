#include "runtime/device_backend.h"

#include "base/status.h"
#include "kernels/grouped_mlp.h"

namespace ballast {

absl::StatusOr<std::unique_ptr<DeviceBackend>> DeviceBackend::Create(Options options) {
  BALLAST_ASSIGN_OR_RETURN(cuda::OwnedStream stream,
                           cuda::OwnedStream::Create(cuda::OwnedStream::Priority::kNormal));
  return std::unique_ptr<DeviceBackend>(new DeviceBackend(std::move(options), std::move(stream)));
}

absl::StatusOr<std::unique_ptr<MoeLayers>> DeviceBackend::MakeMoeLayers(
    const MoeLayers::Options& options) {
  return DeviceMoeLayers::Create(options, {.kernels = options_.kernels,
                                           .stream = stream_.get(),
                                           .path = options_.path,
                                           .max_blocks = options_.max_blocks,
                                           .lend = options_.lend,
                                           .experts = options_.experts});
}

absl::StatusOr<ExpertForm> DeviceBackend::MakeExpertForm(int hidden, int inter, DType dtype) const {
  const ExpertShape shape{.hidden = hidden, .inter = inter, .dtype = dtype};
  return ExpertForm{.packed_bytes = shape.packed_bytes(),
                    .pack = [shape](const void* gate, const void* up, const void* down, DType type,
                                    std::byte* packed) {
                      return PackExpert(shape, gate, up, down, type, packed);
                    }};
}

}  // namespace ballast
