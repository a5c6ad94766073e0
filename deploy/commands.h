// The sub-commands of `ballast`. Each adds itself to the command line and returns what runs it.
#ifndef BALLAST_DEPLOY_COMMANDS_H_
#define BALLAST_DEPLOY_COMMANDS_H_

#include <CLI/App.hpp>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace ballast {

// Exit codes of the command.
enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,   // a server that does not answer, a machine that is not fit
  kExitUsage = 2,    // a flag, a file or a model that cannot be used
  kExitRetry = 75,   // the job broke while it ran: a peer was lost
};

// The exit code that belongs to a failure.
int ExitCodeOf(const absl::Status& status);

// Says "ballast: message" for a fault that every rank of the job finds by itself before MPI is
// started, as in the command line; returns kExitUsage. Rank 0 alone speaks. mpirun kills all ranks
// when the first one leaves, so the others give rank 0 the time to: they wait to be killed, or for
// five seconds where mpirun does not (--enable-recovery).
int RefuseOnAllRanks(const std::string& message);

// Runs a sub-command after its flags were read; returns the exit code.
using RunCommand = std::function<int(int* argc, char*** argv)>;

RunCommand AddServeCommand(CLI::App* app);
RunCommand AddPlanCommand(CLI::App* app);
RunCommand AddReplayCommand(CLI::App* app);
RunCommand AddBenchCommand(CLI::App* app);
RunCommand AddConvertCommand(CLI::App* app);
RunCommand AddRecordCommand(CLI::App* app);
RunCommand AddDoctorCommand(CLI::App* app);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_COMMANDS_H_
