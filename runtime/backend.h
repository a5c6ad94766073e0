// What an engine computes with: the processor, or a device (device_backend.h).
#ifndef BALLAST_RUNTIME_BACKEND_H_
#define BALLAST_RUNTIME_BACKEND_H_

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/kernel_set.h"
#include "kernels/stream.h"
#include "runtime/block_memory.h"
#include "runtime/checkpoint.h"
#include "runtime/expert_reader.h"
#include "runtime/moe_layers.h"

namespace ballast {

// What decides how a step that decodes is launched, besides what the step before had too.
struct StepShape {
  int32_t tokens = 0, logits = 0, greedy = 0;
  auto operator<=>(const StepShape&) const = default;
};

// How one routed expert is packed: what travels between ranks, and what its checksum covers.
struct ExpertForm {
  size_t packed_bytes = 0;
  PackMlp pack;  // THREADS one at a time
};

// REQUIRES lives longer than what it made. THREADS one (the step thread), but for MakeExpertForm
class Backend {
 public:
  virtual ~Backend() = default;
  // Their operations go on `stream`, on arrays in the kernels' memory.
  virtual const KernelSet& kernels() const = 0;
  virtual Stream stream() const = 0;
  virtual absl::StatusOr<std::unique_ptr<MoeLayers>> MakeMoeLayers(
      const MoeLayers::Options& options) = 0;
  // Runs `work`, or what it put on the stream when shape and version were the same the last time.
  virtual absl::Status RunStep(const StepShape& shape, int64_t version,
                               const std::function<absl::Status()>& work) = 0;
  // The memory of this rank's experts. COLLECTIVE on a device: all ranks of the job, with the same
  // numbers. ERRORS kResourceExhausted, and those of lending memory to other ranks
  virtual absl::StatusOr<std::unique_ptr<BlockMemory>> MakeBlocks(size_t block_bytes,
                                                                  int32_t num_blocks) = 0;
  // The ranks that share a generation from now on: whose blocks can be fetched.
  // SHAPES job_ranks as in MoeLayers::Connect. COLLECTIVE. ERRORS those of AllGather and of a
  // device
  virtual absl::Status ConnectBlocks(Communicator* communicator,
                                     std::span<const int32_t> job_ranks) = 0;
  // Bytes that such layers take besides what the decoder and the experts do.
  virtual int64_t MoeLayersBytes(const MoeLayers::Options& options,
                                 const Topology& topology) const = 0;
  // Bytes of memory that may be taken, and whether they are for this rank alone (a device), or for
  // all ranks of the machine.
  virtual int64_t all_memory() const = 0;
  virtual bool has_own_memory() const = 0;
  // THREADS any
  virtual absl::StatusOr<ExpertForm> MakeExpertForm(int hidden, int inter, DType dtype) const = 0;
};

// The processor. REQUIRES `kernels` are the host's
class HostBackend : public Backend {
 public:
  explicit HostBackend(const KernelSet& kernels) : kernels_(kernels) {}
  const KernelSet& kernels() const override { return kernels_; }
  Stream stream() const override { return nullptr; }
  absl::StatusOr<std::unique_ptr<MoeLayers>> MakeMoeLayers(
      const MoeLayers::Options& options) override;
  absl::Status RunStep(const StepShape&, int64_t,
                       const std::function<absl::Status()>& work) override {
    return work();
  }
  absl::StatusOr<std::unique_ptr<BlockMemory>> MakeBlocks(size_t block_bytes,
                                                          int32_t num_blocks) override;
  absl::Status ConnectBlocks(Communicator*, std::span<const int32_t>) override {
    return absl::OkStatus();
  }
  int64_t MoeLayersBytes(const MoeLayers::Options&, const Topology&) const override { return 0; }
  int64_t all_memory() const override;
  bool has_own_memory() const override { return false; }
  absl::StatusOr<ExpertForm> MakeExpertForm(int hidden, int inter, DType dtype) const override;

 private:
  const KernelSet& kernels_;
};

// Reads experts of the checkpoint in the backend's form; for an ExpertReader's thread.
// REQUIRES both outlive it
ReadExpert ReaderOf(const Checkpoint& checkpoint, const Backend& backend, DType dtype);

}  // namespace ballast

#endif  // BALLAST_RUNTIME_BACKEND_H_
