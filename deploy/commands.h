// The sub-commands of `ballast`. Each adds itself to the command line and returns what runs it.
#ifndef BALLAST_DEPLOY_COMMANDS_H_
#define BALLAST_DEPLOY_COMMANDS_H_

#include <CLI/App.hpp>
#include <functional>

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
