#ifndef BALLAST_TESTS_SUPPORT_SINGLE_RANK_MODEL_H_
#define BALLAST_TESTS_SUPPORT_SINGLE_RANK_MODEL_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "runtime/checkpoint.h"
#include "runtime/decoder.h"
#include "runtime/rebalancer.h"

namespace ballast::testing {

// A whole model on one rank, without server or scheduler: tokens in, logits out.
class SingleRankModel {
 public:
  static absl::StatusOr<std::unique_ptr<SingleRankModel>> Load(const std::string& folder,
                                                               DType dtype,
                                                               const KernelSet& kernels);

  // Runs one sequence from position 0, `chunk` tokens at a time. Logits [tokens.size(), vocab].
  absl::StatusOr<std::vector<float>> Logits(std::span<const int32_t> tokens, int32_t chunk);

  const ModelConfig& config() const { return checkpoint_->config(); }

 private:
  SingleRankModel() : fabric_(1) {}

  LocalFabric fabric_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<ExpertStore> store_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_SINGLE_RANK_MODEL_H_
