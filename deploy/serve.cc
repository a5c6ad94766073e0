#include "deploy/serve.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "base/log.h"
#include "comm/mpi_transport.h"
#include "deploy/commands.h"
#include "deploy/server.h"

namespace ballast {

namespace {

// All that --dry-run does beyond what a start checks.
int ShowMemory(const Server& server, MpiRuntime* mpi) {
  const absl::StatusOr<std::string> memory = server.DescribeMemory();
  if (mpi->rank() == 0 && memory.ok()) std::printf("%s", memory->c_str());
  mpi->Finish();
  return memory.ok() ? kExitOk : kExitUsage;
}

}  // namespace

int Serve(const ServeFlags& flags, int* argc, char*** argv) {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  SetLogLevel(flags.log_level == "debug"     ? LogLevel::kDebug
              : flags.log_level == "warning" ? LogLevel::kWarning
              : flags.log_level == "error"   ? LogLevel::kError
                                             : LogLevel::kInfo);
  auto mpi = MpiRuntime::Start(argc, argv);
  if (!mpi.ok()) {
    std::fprintf(stderr, "ballast: %s\n", std::string(mpi.status().message()).c_str());
    return kExitUsage;
  }
  SetLogRank((*mpi)->rank());

  Server server(flags, mpi->get());
  absl::Status status = server.Prepare();
  // The lowest rank that failed speaks; all leave together, once it has: mpirun kills every rank
  // when the first one leaves.
  const int failed_rank = status.ok() ? -1 : (*mpi)->size() - (*mpi)->rank();
  const int speaker = (*mpi)->size() - (*mpi)->Highest(failed_rank);
  if (speaker <= (*mpi)->size() - 1) {
    if (speaker == (*mpi)->rank()) {
      std::fprintf(stderr, "ballast: %s\n", std::string(status.message()).c_str());
    }
    (*mpi)->Finish();
    return kExitUsage;
  }
  if (flags.dry_run) return ShowMemory(server, mpi->get());
  status = server.Start();
  if (status.ok()) status = server.Run();
  if (!status.ok()) {
    if (!server.said_why()) {
      std::fprintf(stderr, "ballast: rank %d: %s\n", (*mpi)->rank(),
                   std::string(status.message()).c_str());
    }
    // An orderly end needs all ranks, and one of them may be gone.
    std::fflush(nullptr);
    _exit(ExitCodeOf(status));
  }
  const bool complete = server.complete();
  server.Stop();
  std::fflush(nullptr);
  if (!complete) _exit(kExitOk);  // an orderly end of MPI would wait for those that are gone
  // One that is lost only now is not waited for either.
  std::thread([] {
    std::this_thread::sleep_for(std::chrono::seconds(10));
    _exit(kExitRetry);
  }).detach();
  (*mpi)->Finish();
  return kExitOk;
}

}  // namespace ballast
