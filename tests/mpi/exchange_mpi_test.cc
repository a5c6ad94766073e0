// Ranks that are processes lend each other device memory and exchange rows through it: what runs on
// several devices of a node, with the emulator in each process. A case that fails on any rank
// aborts the whole job.
#define CATCH_CONFIG_RUNNER
#define CATCH_CONFIG_NO_POSIX_SIGNALS
#include <mpi.h>

#include <catch2/catch.hpp>
#include <cstdio>
#include <string>

#include "comm/communicator.h"
#include "comm/mpi_transport.h"
#include "comm/peer_memory.h"
#include "tests/gpu/virtual_ranks.h"
#include "tests/placement/random_instances.h"
#include "tests/support/cuda_shim/emulator.h"

namespace ballast {
namespace {

MpiRuntime* mpi = nullptr;  // of main

TEST_CASE("processes exchange rows through memory that they lend each other") {
  const auto transport = mpi->MakeTransport();
  Communicator world(transport.get(), {.deadline_ms = 60'000});
  for (uint64_t round = 0; round < 4; ++round) {
    cuda_shim::Reseed(100 * round + static_cast<uint64_t>(mpi->rank()));
    Random random(round + 17);  // the same on all ranks
    const Topology topology = Topology::Uniform(mpi->size(), 12 / mpi->size());
    const Placement placement =
        *Placement::Create(1, 7, topology, testing::RandomRow(&random, 12, 7), 0);
    const ArenaShape shape = testing::ShapeFor(placement, 8, 3);
    auto memory = PeerMemory::Create(MakeCudaMemory(), &world, 0, shape.bytes());
    INFO(memory.status().message());
    REQUIRE(memory.ok());

    testing::TestRank rank(placement, shape, mpi->rank());
    for (int32_t r = 0; r < mpi->size(); ++r) rank.exchange().arena[r] = (*memory)->blocks()[r];
    rank.exchange().deadline_ns = 60'000'000'000;
    for (uint32_t step = 0; step < 3; ++step) {
      const std::vector<testing::Batch> batches = testing::RandomBatches(shape, &random);
      rank.Begin(batches[mpi->rank()], step);
      rank.LaunchFirstHalf();
      testing::RequireCuda(cudaDeviceSynchronize());
      rank.RunExperts();
      rank.LaunchSecondHalf();
      testing::RequireCuda(cudaDeviceSynchronize());
      rank.RequireResult();
    }
    REQUIRE((*memory)->Close(&world, 0).ok());
  }
}

TEST_CASE("ranks that want blocks of different sizes get none") {
  if (mpi->size() == 1) return;  // on all ranks alike
  const auto transport = mpi->MakeTransport();
  Communicator world(transport.get(), {.deadline_ms = 60'000});
  const size_t bytes = mpi->rank() == 1 ? 4096 : 8192;
  const auto memory = PeerMemory::Create(MakeCudaMemory(), &world, 0, bytes);
  REQUIRE(absl::IsInvalidArgument(memory.status()));
  REQUIRE(memory.status().message() ==
          "the size of shared device memory must be the same on all ranks: rank 0 has 8192, rank "
          "1 has 4096");
}

}  // namespace
}  // namespace ballast

int main(int argc, char** argv) {
  auto started = ballast::MpiRuntime::Start(&argc, &argv);
  if (!started.ok()) {
    std::fprintf(stderr, "%s\n", std::string(started.status().message()).c_str());
    return 1;
  }
  ballast::mpi = started->get();
  if (Catch::Session().run(argc, argv) != 0) MPI_Abort(MPI_COMM_WORLD, 1);
  ballast::mpi->Finish();
  return 0;
}
