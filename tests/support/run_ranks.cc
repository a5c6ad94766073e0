#include "tests/support/run_ranks.h"

#include <memory>
#include <string>
#include <thread>

namespace ballast::testing {

std::vector<absl::Status> RunRanks(int num_ranks, const RankFunction& fn, int64_t deadline_ms) {
  LocalFabric fabric(num_ranks);
  std::vector<std::unique_ptr<Transport>> transports;
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int rank = 0; rank < num_ranks; ++rank) {
    transports.push_back(fabric.MakeTransport(rank));
    communicators.push_back(std::make_unique<Communicator>(
        transports.back().get(), Communicator::Options{.deadline_ms = deadline_ms}));
  }
  std::vector<absl::Status> statuses(static_cast<size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const size_t r = static_cast<size_t>(rank);
      statuses[r] = fn(transports[r].get(), communicators[r].get(), rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

std::string FirstError(const std::vector<absl::Status>& statuses) {
  for (size_t rank = 0; rank < statuses.size(); ++rank) {
    if (statuses[rank].ok()) continue;
    return "rank " + std::to_string(rank) + ": " + std::string(statuses[rank].message());
  }
  return "";
}

}  // namespace ballast::testing
