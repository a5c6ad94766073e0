// A whole MoE layer on the device: exchange and experts, against the CPU's kernels.
#include <cmath>
#include <vector>

#include "kernels/vector_math.h"
#include "tests/gpu/schedules.h"
#include "tests/gpu/virtual_ranks.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::Batch;
using testing::DeviceArray;
using testing::RandomBatch;
using testing::RequireCuda;
using testing::ShapeFor;
using testing::TestRanks;

constexpr int32_t kHidden = 24, kInter = 16, kExperts = 6;

// Random parameters, and what an expert does with a row by the CPU's dot products.
class Experts {
 public:
  explicit Experts(Random* random) : packed_(kExperts * shape().packed_bytes()) {
    for (int32_t e = 0; e < kExperts; ++e) {
      for (std::vector<float>* matrix : {&gate_[e], &up_[e], &down_[e]}) {
        matrix->resize(static_cast<size_t>(kHidden) * kInter);
        for (float& w : *matrix) w = static_cast<float>(random->Uniform() - 0.5);
      }
      REQUIRE(PackExpert(shape(), gate_[e].data(), up_[e].data(), down_[e].data(), DType::kF32,
                         packed_.data() + static_cast<size_t>(e) * shape().packed_bytes())
                  .ok());
    }
  }
  static ExpertShape shape() { return {.hidden = kHidden, .inter = kInter, .dtype = DType::kF32}; }
  const std::vector<std::byte>& packed() const { return packed_; }

  std::vector<float> Run(int32_t e, const float* x) const {
    std::vector<float> activated(kInter), y(kHidden);
    for (int32_t i = 0; i < kInter; ++i) {
      const float gate = cpu::Dot(x, gate_[e].data() + i * kHidden, kHidden);
      activated[i] = cpu::Silu(gate) * cpu::Dot(x, up_[e].data() + i * kHidden, kHidden);
    }
    for (int32_t i = 0; i < kHidden; ++i) {
      y[i] = cpu::Dot(activated.data(), down_[e].data() + i * kInter, kInter);
    }
    return y;
  }

 private:
  std::vector<float> gate_[kExperts], up_[kExperts], down_[kExperts];
  std::vector<std::byte> packed_;
};

// k ascending, in fp32, as the CPU's combine.
std::vector<float> LayerOf(const Batch& batch, int32_t top_k, const Experts& experts) {
  std::vector<float> out = batch.base;
  for (size_t copy = 0; copy < batch.ids.size(); ++copy) {
    const size_t row = copy / static_cast<size_t>(top_k) * kHidden;
    const std::vector<float> y = experts.Run(batch.ids[copy], batch.x.data() + row);
    for (size_t i = 0; i < kHidden; ++i) {
      out[row + i] = std::fma(batch.weights[copy], y[i], out[row + i]);
    }
  }
  return out;
}

TEST_CASE("a layer of any number of ranks has the bits of one", "[device][layer][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 31);
    const Experts experts(&random);
    const DeviceArray<std::byte> arena(experts.packed());
    const int32_t num_ranks = 1 << round % 4;
    const Topology topology = Topology::Uniform(num_ranks, (8 + num_ranks) / num_ranks);
    const auto make = [&](int64_t epoch) {
      return *Placement::Create(1, kExperts, topology,
                                testing::RandomRow(&random, topology.num_slots(), kExperts), epoch);
    };
    const ArenaShape shape = ShapeFor(make(0), 5, 3, kHidden);
    TestRanks ranks(make(0), shape);
    for (uint32_t step = 0; step < 2; ++step) {  // a flip between the two
      std::vector<Batch> batches;
      for (int32_t r = 0; r < num_ranks; ++r) {
        batches.push_back(RandomBatch(shape, static_cast<int32_t>(random.Below(6)), &random));
        for (float& x : batches.back().x) x = static_cast<float>(2 * random.Uniform() - 1);
        for (float& w : batches.back().weights) w = static_cast<float>(random.Uniform());
      }
      ranks.Begin(batches, step);
      const Placement placement = make(step);
      if (step > 0) {
        for (int32_t r = 0; r < num_ranks; ++r) ranks.rank(r).Flip(placement);
      }
      for (int32_t r = 0; r < num_ranks; ++r) {
        ranks.rank(r).LaunchFirstHalf();
        ranks.rank(r).LaunchExperts(Experts::shape(), arena.data());
        ranks.rank(r).LaunchSecondHalf();
      }
      RequireCuda(cudaDeviceSynchronize());
      for (int32_t r = 0; r < num_ranks; ++r) {
        CAPTURE(round, num_ranks, step, r);
        REQUIRE(ranks.rank(r).status().ok());
        REQUIRE(ranks.rank(r).out() == LayerOf(batches[r], shape.top_k, experts));
      }
    }
  });
}

// What changes between steps is in device memory: a graph that was captured once goes on over
// flips.
TEST_CASE("a captured layer replays across a flip", "[device][layer][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 460);
    const Experts experts(&random);
    const DeviceArray<std::byte> arena(experts.packed());
    const Topology topology = Topology::Uniform(3, 3);
    const auto make = [&](int64_t epoch) {
      return *Placement::Create(1, kExperts, topology, testing::RandomRow(&random, 9, kExperts),
                                epoch);
    };
    const ArenaShape shape = ShapeFor(make(0), 6, 2, kHidden);
    TestRanks ranks(make(0), shape);
    const auto batches = [&] {
      std::vector<Batch> all;
      for (int32_t r = 0; r < 3; ++r) all.push_back(RandomBatch(shape, 6 - 2 * r, &random));
      return all;
    };
    ranks.Begin(batches(), 0);
    std::vector<cudaGraphExec_t> graphs(3);
    for (int32_t r = 0; r < 3; ++r) {
      testing::TestRank& rank = ranks.rank(r);
      cudaGraph_t graph;
      RequireCuda(cudaStreamBeginCapture(rank.stream(), cudaStreamCaptureModeThreadLocal));
      rank.LaunchFirstHalf();
      rank.LaunchExperts(Experts::shape(), arena.data());
      rank.LaunchSecondHalf();
      RequireCuda(cudaStreamEndCapture(rank.stream(), &graph));
      RequireCuda(cudaGraphInstantiate(&graphs[r], graph, 0));
      RequireCuda(cudaGraphDestroy(graph));
    }
    for (int64_t step = 0; step < 4; ++step) {
      const std::vector<Batch> now = batches();
      const Placement placement = make(step);
      for (int32_t r = 0; r < 3; ++r) {
        ranks.rank(r).SetBatch(now[r]);
        if (step % 2 == 1) ranks.rank(r).Flip(placement);
      }
      for (int32_t r = 0; r < 3; ++r) {
        RequireCuda(cudaGraphLaunch(graphs[r], ranks.rank(r).stream()));
      }
      RequireCuda(cudaDeviceSynchronize());
      for (int32_t r = 0; r < 3; ++r) {
        CAPTURE(round, step, r);
        REQUIRE(ranks.rank(r).status().ok());
        REQUIRE(ranks.rank(r).out() == LayerOf(now[r], shape.top_k, experts));
      }
    }
    for (cudaGraphExec_t graph : graphs) RequireCuda(cudaGraphExecDestroy(graph));
  });
}

}  // namespace
}  // namespace ballast
