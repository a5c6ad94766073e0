#include "runtime/memory_plan.h"

#include <malloc.h>

#include <catch2/catch.hpp>
#include <fstream>
#include <sstream>

#include "base/log.h"
#include "tests/support/cluster.h"
#include "tests/support/run_ranks.h"
#include "tests/support/tiny_checkpoint.h"

namespace ballast {
namespace {

using testing::Cluster;
using testing::ClusterOptions;
using testing::TempFolder;
using testing::TinyModel;
using testing::WriteCheckpoint;

constexpr int kRanks = 3;

// What the plan says of every rank that Cluster starts with these options.
MemoryPlan PlanOf(const ClusterOptions& options, const KernelSet& kernels) {
  const auto checkpoint = Checkpoint::Open(options.model);
  REQUIRE(checkpoint.ok());
  EngineOptions engine;
  engine.dtype = options.dtype;
  engine.kv_bytes = options.kv_bytes;
  engine.chunk_bytes = options.chunk_bytes;
  engine.staging_experts = options.staging_experts;
  const auto plan =
      PlanMemory(engine, (*checkpoint)->config(), HostBackend(kernels),
                 Topology::Uniform(options.num_ranks, options.slots_per_rank), /*rank=*/0);
  REQUIRE(plan.ok());
  return *plan;
}

// SOURCE TRT-LLM#13319, vllm#51986: memory that nobody had announced was taken at start.
TEST_CASE("a rank takes the memory that was announced", "[runtime][memory]") {
  SetLogLevel(LogLevel::kWarning);
  std::vector<TinyModel> models(4);
  models[1].qk_norm = models[1].attention_bias = true;
  models[2].num_shared = 0;
  models[2].tied_embeddings = true;
  models[3].hidden = 40;  // packed products are larger than their matrices
  models[3].num_layers = 5;
  models[3].num_dense_layers = 2;
  for (const TinyModel& model : models) {
    TempFolder folder;
    WriteCheckpoint(folder.path(), model);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const int32_t staging : {0, 9}) {
        const KernelSet& kernels = dtype == DType::kF32 ? DefaultCpuKernels() : PlainKernels();
        const ClusterOptions options{.model = folder.path(),
                                     .num_ranks = kRanks,
                                     .slots_per_rank = 5,
                                     .dtype = dtype,
                                     .kernels = &kernels,
                                     .staging_experts = staging};
        CAPTURE(model.hidden, model.num_shared, model.qk_norm, dtype == DType::kF32, staging);
        const MemoryPlan plan = PlanOf(options, kernels);
        auto cluster = Cluster::Start(options);
        REQUIRE(cluster.ok());
        REQUIRE(testing::FirstError((*cluster)->Stop()) == "");
        for (int rank = 0; rank < kRanks; ++rank) {
          const MemoryPlan taken = (*cluster)->memory(rank);
          CHECK(taken.parameters == plan.parameters);
          CHECK(taken.experts == plan.experts);
          CHECK(taken.transfers == plan.transfers);
          CHECK(taken.kv_cache == plan.kv_cache);
        }
      }
    }
  }
}

// "VmHWM:   1234 kB" of /proc/self/status.
int64_t StatusBytes(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(name + ":", 0) == 0) return std::stoll(line.substr(name.size() + 1)) * 1024;
  }
  FAIL("no " << name);
  return 0;
}

// SOURCE TRT-LLM#18185: loading took several times the memory of what was loaded.
TEST_CASE("loading takes little more memory than what is loaded", "[runtime][memory]") {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return;  // sanitizers keep memory of their own
#endif
  SetLogLevel(LogLevel::kWarning);
  TempFolder folder;
  TinyModel model{.dtype = DType::kBF16};
  model.hidden = model.expert_inter = 512;
  model.num_experts = 16;
  WriteCheckpoint(folder.path(), model);
  const ClusterOptions options{.model = folder.path(), .slots_per_rank = model.num_experts};
  const int64_t planned = PlanOf(options, PlainKernels()).total();
  REQUIRE(planned > 100 << 20);
  malloc_trim(0);

  std::ofstream("/proc/self/clear_refs") << "5";  // the peak begins anew
  const int64_t before = StatusBytes("VmRSS");
  REQUIRE(StatusBytes("VmHWM") < before + (8 << 20));
  auto cluster = Cluster::Start(options);
  REQUIRE(cluster.ok());
  const int64_t taken = StatusBytes("VmHWM") - before;
  REQUIRE(testing::FirstError((*cluster)->Stop()) == "");
  // An expert at a time, as it stands in the file and as fp32, and some threads' stacks.
  CHECK(taken < planned + (24 << 20));
  CHECK(taken > planned / 2);  // it was measured at all
}

}  // namespace
}  // namespace ballast
