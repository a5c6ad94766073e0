// The communicator over real processes. Cases run in order on all ranks; one that fails on any rank
// aborts the whole job, so that nobody waits for a rank that has left.
#include <mpi.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "base/status.h"
#include "comm/communicator.h"
#include "comm/mpi_transport.h"
#include "tests/comm/conformance.h"

namespace ballast {
namespace {

struct Setup {
  MpiRuntime* mpi;
  Transport* transport;
  Communicator* communicator;
};

absl::Status Expect(bool condition, const char* what) {
  return condition ? absl::OkStatus() : absl::InternalError(std::string(what) + " does not hold");
}

absl::Status RanksKnowTheirPlace(const Setup& setup) {
  int rank = -1, size = -1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  BALLAST_RETURN_IF_ERROR(Expect(setup.mpi->rank() == rank, "rank"));
  BALLAST_RETURN_IF_ERROR(Expect(setup.mpi->size() == size, "size"));
  BALLAST_RETURN_IF_ERROR(Expect(setup.transport->rank() == rank, "rank of the transport"));
  // One machine: one node.
  BALLAST_RETURN_IF_ERROR(Expect(setup.mpi->local_size() == size, "local size"));
  BALLAST_RETURN_IF_ERROR(Expect(setup.mpi->local_rank() == rank, "local rank"));
  BALLAST_RETURN_IF_ERROR(Expect(setup.mpi->node() == 0, "node"));
  return Expect(setup.mpi->node_of_rank() == std::vector<int32_t>(static_cast<size_t>(size), 0),
                "nodes");
}

absl::Status StartUpAgrees(const Setup& setup) {
  std::string text = setup.mpi->rank() == 0 ? "the leader's word" : "somebody else's";
  BALLAST_RETURN_IF_ERROR(setup.mpi->Broadcast(&text));
  BALLAST_RETURN_IF_ERROR(Expect(text == "the leader's word", "the leader's bytes arrive"));
  return Expect(setup.mpi->Highest(10 - setup.mpi->rank()) == 10, "the highest value wins");
}

absl::Status AllGatherConforms(const Setup& setup) {
  return testing::CheckAllGather(setup.communicator);
}

absl::Status ExchangeConforms(const Setup& setup) {
  return testing::CheckExchange(setup.communicator);
}

absl::Status OrderConforms(const Setup& setup) { return testing::CheckOrder(setup.transport); }

// Runs on a communicator of its own, which is dead afterwards.
absl::Status EpochsThatDifferAreNamed(const Setup& setup) {
  if (setup.mpi->size() == 1) return absl::OkStatus();  // on all ranks alike
  Communicator other(setup.transport, {.deadline_ms = 10'000});
  const int64_t mine = 0;
  std::vector<int64_t> all(static_cast<size_t>(setup.mpi->size()));
  const absl::Status status =
      other.AllGather(100 + setup.mpi->rank(), std::as_bytes(std::span(&mine, 1)),
                      std::as_writable_bytes(std::span(all)));
  BALLAST_RETURN_IF_ERROR(Expect(status.code() == absl::StatusCode::kInternal, "an error"));
  const std::string text(status.message());
  return Expect(text.find("epoch 10") != text.rfind("epoch 10"), "both epochs are named");
}

int RunAll(MpiRuntime* mpi) {
  struct Case {
    const char* name;
    absl::Status (*run)(const Setup&);
  };
  const Case cases[] = {{"ranks know their place", RanksKnowTheirPlace},
                        {"start-up agrees", StartUpAgrees},
                        {"all-gather conforms", AllGatherConforms},
                        {"exchange conforms", ExchangeConforms},
                        {"order conforms", OrderConforms},
                        // Last: messages of the failed exchange may stay behind.
                        {"epochs that differ are named", EpochsThatDifferAreNamed}};
  const auto transport = mpi->MakeTransport();
  Communicator communicator(transport.get(), {.deadline_ms = 60'000});
  for (const Case& test : cases) {
    const absl::Status status = test.run({mpi, transport.get(), &communicator});
    if (!status.ok()) {
      std::fprintf(stderr, "FAILED on rank %d: %s: %s\n", mpi->rank(), test.name,
                   std::string(status.message()).c_str());
      MPI_Abort(MPI_COMM_WORLD, 1);
    }
    if (mpi->rank() == 0) std::printf("passed: %s\n", test.name);
  }
  return 0;
}

}  // namespace
}  // namespace ballast

int main(int argc, char** argv) {
  auto mpi = ballast::MpiRuntime::Start(&argc, &argv);
  if (!mpi.ok()) {
    std::fprintf(stderr, "%s\n", std::string(mpi.status().message()).c_str());
    return 1;
  }
  const int result = ballast::RunAll(mpi->get());
  (*mpi)->Finish();
  return result;
}
