#ifndef BALLAST_RUNTIME_CARRIED_MOE_LAYERS_H_
#define BALLAST_RUNTIME_CARRIED_MOE_LAYERS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/nccl_api.h"
#include "kernels/device_memory.h"
#include "kernels/grouped_mlp.h"
#include "runtime/expert_arena.h"
#include "runtime/moe_layers.h"
#include "runtime/row_carrier.h"

namespace ballast {

// MoE layers on devices that cannot address each other: NCCL carries the rows. Rows and arithmetic
// are the device's; who sends what is decided on the host, as on a processor (moe_layer.h):
//
//   device   gate -> [ids] -> rows out -> experts -> results back -> combine
//   host             counts, split, route -> entries -> groups
//
// A token's row goes once to each rank that needs it. The rows travel on a stream of their own
// (row_carrier.h), beside `while_waiting`. Nobody enters a call of NCCL for a layer before all have
// said what they send in it. The host waits for the device once a layer, for what the gate chose.
//
// After an error what is under way stays so until Halt or Connect, which end it.
class CarriedMoeLayers : public MoeLayers {
 public:
  struct Device {
    NcclApi* nccl = nullptr;
    int max_ctas = 0;         // thread blocks of the device that NCCL may hold; 0: it decides
    Stream stream = nullptr;  // of all that computes
    MlpPath path = MlpPath::kBest;
    std::function<ExpertArena()> experts;  // asked once a layer
  };
  // ERRORS kInvalidArgument: a shape that kernels refuse
  static absl::StatusOr<std::unique_ptr<MoeLayers>> Create(const Options& options,
                                                           const Device& device);
  ~CarriedMoeLayers() override;

  // Bytes of device memory that the first Connect of such layers takes; NCCL's own not among them.
  static size_t MemoryBytes(const Options& options, const Topology& topology);

  // All memory is taken in the first one, which is with all ranks of the job. NCCL's communicator
  // shrinks where ranks were lost only, and else is made anew.
  absl::Status Connect(Communicator* communicator, std::span<const int32_t> job_ranks,
                       const Topology& topology) override;
  absl::Status Use(const Placement& placement, const ExpertStore& store) override;
  // Reads the table of blocks back: waits for the stream.
  absl::Status Check(const Placement& placement, const ExpertStore& store) override;
  absl::Status Halt() override { return carrier_->Halt(); }
  absl::Status Run(const Args& args) override;
  absl::Status Finish(std::vector<LayerCounts>* counts) override;
  absl::StatusOr<std::span<const int32_t>> Ids(int32_t layer, int32_t num_tokens) override;
  uint64_t TakeChoiceHash() override { return std::exchange(choice_hash_, 0); }
  const Matmul& gate_matmul() const override { return *gate_matmul_; }

 private:
  struct Sizes;
  // What an exchange carries: rows to the experts, or their results back.
  enum class Freight { kRows, kResults };

  CarriedMoeLayers(const Options& options, const Device& device);
  absl::Status TakeMemory(const Topology& topology);
  absl::StatusOr<std::vector<int32_t>> BlocksOf(DispatchTable* table) const;

  absl::Status RunGate(const Args& args);
  absl::Status SplitBatch(const Args& args);
  absl::Status Announce(const Args& args);
  absl::Status SendRows(const Args& args);
  absl::Status PutInGroups(const Args& args);
  absl::Status RunExperts(const Args& args);
  absl::Status Return(const Args& args);

  void PlanExchange(Freight freight);
  absl::Status Gather(size_t word, size_t num_rows, const std::byte* in, std::byte* out);
  absl::Status Upload(size_t begin, size_t end);
  int32_t* IdsOf(int32_t layer) const;
  size_t Copies(int32_t num_tokens) const {
    return static_cast<size_t>(num_tokens) * static_cast<size_t>(options_.gate.top_k);
  }
  // How many rows, or copies, go from a rank to another one in this layer.
  size_t NumRows(size_t from, size_t to) const { return traffic_[2 * (from * num_ranks_ + to)]; }
  size_t NumCopies(size_t from, size_t to) const {
    return traffic_[2 * (from * num_ranks_ + to) + 1];
  }

  const Options options_;
  const Device device_;
  const ExpertShape expert_;
  const size_t row_bytes_;
  std::unique_ptr<RowCarrier> carrier_;
  std::unique_ptr<Matmul> gate_matmul_;
  std::unique_ptr<const Sizes> sizes_;  // null: no memory is taken
  // Of a generation.
  Communicator* comm_ = nullptr;
  size_t num_ranks_ = 0;
  std::optional<Communicator::Exchange> entries_;
  std::unique_ptr<DispatchTable> table_;
  // Of a layer.
  Split split_;
  RankPart part_;
  Route route_;
  Grouped grouped_;
  AlignedBuffer no_rows_;
  std::vector<int32_t> gathered_;                // [R, 2, E] counts of all ranks
  std::vector<int32_t> by_source_;               // [R, E] kinds added up
  std::vector<uint32_t> announced_;              // [R, 2] rows and copies that go to each rank
  std::vector<uint32_t> traffic_;                // [R, R, 2] of all ranks
  std::vector<size_t> send_bytes_, recv_bytes_;  // [R] of the entries
  std::vector<std::span<std::byte>> out_;
  std::vector<std::span<const std::byte>> in_;
  std::vector<size_t> next_row_;
  std::vector<int32_t> last_token_;
  struct {
    size_t begin, rows;      // of the groups
    size_t to_expert, back;  // where a row by expert, or one that goes back, is taken from
    size_t combine, end;     // where the result of a copy is
  } at_ = {};                // in words_; before them stands which rows go out
  // Of a step.
  std::vector<LayerCounts> counts_;  // [layers]
  uint64_t choice_hash_ = 0;

  // On the device.
  Buffer logits_, ids_, weights_, histogram_, gate_workspace_;
  Buffer blocks_;     // [layers, most groups]
  Buffer words_;      // indices of a layer, as `staged_` has them
  Buffer own_;        // rows that go out; then the results that come back
  Buffer arrived_;    // rows as they come; then results by expert
  Buffer by_expert_;  // rows by expert; then results in the order in which they go back
  Buffer activated_;
  Buffer staging_;  // NcclCommunicator::Options
  // On the host, pinned.
  Buffer read_ids_;  // [layers, T, K]
  Buffer read_histogram_, staged_, staged_blocks_;
};

}  // namespace ballast

#endif  // BALLAST_RUNTIME_CARRIED_MOE_LAYERS_H_
