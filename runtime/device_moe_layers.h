#ifndef BALLAST_RUNTIME_DEVICE_MOE_LAYERS_H_
#define BALLAST_RUNTIME_DEVICE_MOE_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/device_memory.h"
#include "kernels/exchange.h"
#include "kernels/grouped_mlp.h"
#include "kernels/kernel_set.h"
#include "runtime/device_moe_layout.h"
#include "runtime/expert_arena.h"
#include "runtime/moe_layers.h"

namespace ballast {

// Device memory that ranks of the job can address: this rank's own, zeroed, and where the others'
// are. They stay until the process ends. COLLECTIVE all ranks of the job. SHAPES the result [R]
using LendMemory = std::function<absl::StatusOr<std::vector<std::byte*>>(size_t bytes)>;

// MoE layers on a device: gate, counts, split, route, dispatch, expand, experts, combine
// (kernels/exchange.h), all put on one stream without a word to the host. What the host needs of
// them, the counts, comes at the end of a step.
//
// A placement is put to use by one copy in the order of the stream. A rank that is waited for in
// vain, or a host that does not want to wait any longer, ends the exchange on the device; the next
// Connect begins another generation.
class DeviceMoeLayers : public MoeLayers {
 public:
  struct Device {
    const KernelSet* kernels = nullptr;
    Stream stream = nullptr;  // of everything but a word that ends an exchange
    MlpPath path = MlpPath::kBest;
    int32_t max_blocks = 1056;  // Exchange
    LendMemory lend;
    std::function<ExpertArena()> experts;
  };
  // ERRORS kUnimplemented: another split than exact; kInvalidArgument: a shape that kernels refuse
  static absl::StatusOr<std::unique_ptr<MoeLayers>> Create(const Options& options,
                                                           const Device& device);
  ~DeviceMoeLayers() override;

  // Bytes of device memory that the first Connect of such layers takes: arena, tables, rows.
  static size_t MemoryBytes(const Options& options, const Topology& topology);

  // All memory is taken in the first one, which is with all ranks of the job.
  absl::Status Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                       const Topology& topology) override;
  absl::Status Use(const Placement& placement, const ExpertStore& store) override;
  // Reads the tables back: waits for the stream.
  absl::Status Check(const Placement& placement, const ExpertStore& store) override;
  absl::Status Halt() override { return arenas_.empty() ? absl::OkStatus() : Settle(); }
  absl::Status Run(const Args& args) override;
  absl::Status Pace() override;
  absl::Status Finish(std::vector<LayerCounts>* counts) override;
  absl::StatusOr<std::span<const int32_t>> Ids(int32_t layer, int32_t num_tokens) override;
  std::optional<int64_t> launch_version() override;
  uint64_t TakeChoiceHash() override { return std::exchange(choice_hash_, 0); }
  const Matmul& gate_matmul() const override { return *gate_matmul_; }

 private:
  DeviceMoeLayers(const Options& options, const Device& device, cuda::OwnedStream side);
  absl::Status TakeMemory(const Topology& topology);
  absl::StatusOr<uint32_t> NextNumber();
  absl::Status Settle();
  absl::Status GiveUp();
  absl::Status CheckAlive(int64_t began_ns) const;
  absl::Status MakeTables(const Placement& placement, const ExpertStore& store,
                          std::vector<std::byte>* tables) const;
  absl::Status RunGate(const Args& args);
  absl::Status Split(const Args& args);
  absl::Status RunExperts(const Args& args);
  absl::Status Await(const std::function<absl::StatusOr<bool>()>& is_done);
  absl::Status TakeStatus();

  const Options options_;
  const Device device_;
  const ExpertShape expert_;
  const size_t row_bytes_;
  cuda::OwnedStream side_;
  std::unique_ptr<Matmul> gate_matmul_;
  Communicator* comm_ = nullptr;
  // Of all generations.
  std::unique_ptr<const DeviceMoeLayout> layout_;
  std::vector<std::byte*> arenas_;  // [places]
  // Of one generation.
  Exchange exchange_;
  std::vector<int32_t> members_;         // their places
  std::vector<int32_t> hosts_of_layer_;  // [layers] number of hosts
  int32_t num_groups_ = 0;               // experts of a layer that this rank has room for
  std::vector<std::byte> tables_in_use_;
  uint64_t choice_hash_ = 0;
  int64_t launch_version_ = 0;
  const std::byte* launched_arena_ = nullptr;  // of experts
  // Of a step.
  std::vector<cuda::Event> marks_;  // round and round, after each layer that is not captured
  size_t next_mark_ = 0;
  std::vector<int32_t> ids_, gathered_, by_source_;

  // On the device.
  Buffer tables_, state_, place_;
  Buffer logits_, ids_log_, weights_, histogram_, gate_workspace_;
  Buffer log_;  // [layers]: counts [places, 2, E], quota [max_hosts], load [places]
  Buffer send_, row_begin_, group_begin_, group_rows_;
  Buffer copy_rank_, copy_row_, tile_counts_;
  Buffer rows_;  // [row_capacity, row_bytes], and what is activated of them
  // On the host, pinned.
  Buffer staged_tables_, read_log_, word_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_DEVICE_MOE_LAYERS_H_
