// The `ballast` command.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "deploy/commands.h"
#include "deploy/flags.h"

namespace ballast {

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDataLoss:
      return kExitRetry;
    default:
      return kExitUsage;
  }
}

namespace {

// Under mpirun every rank reads the same command line; one of them is enough to speak of it.
bool SpeaksForAll() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  return rank == nullptr || std::string(rank) == "0";
}

}  // namespace

int RefuseOnAllRanks(const std::string& message) {
  if (SpeaksForAll()) {
    // In one piece: mpirun writes to the same place.
    const std::string line = "ballast: " + message + "\n";
    std::fwrite(line.data(), 1, line.size(), stderr);
  } else {
    std::this_thread::sleep_for(std::chrono::seconds(5));
  }
  return kExitUsage;
}

namespace {

int Main(int argc, char** argv) {
  CLI::App app("Ballast: an expert-parallel runtime for Mixture-of-Experts models", "ballast");
  app.require_subcommand(1);
  app.set_help_all_flag("--help-all", "Help of all sub-commands");
  app.set_version_flag("--version", "ballast " BALLAST_VERSION);
  std::vector<std::pair<CLI::App*, RunCommand>> commands;

  CLI::App* serve = app.add_subcommand("serve", "Serve a model over HTTP (run under mpirun)");
  commands.emplace_back(serve, AddServeCommand(serve));
  CLI::App* plan = app.add_subcommand("plan", "Plan a placement for a known load");
  commands.emplace_back(plan, AddPlanCommand(plan));
  CLI::App* replay = app.add_subcommand("replay", "Replay recorded routing against policies");
  commands.emplace_back(replay, AddReplayCommand(replay));
  CLI::App* convert =
      app.add_subcommand("convert", "Convert traces, loads and placements to other formats");
  commands.emplace_back(convert, AddConvertCommand(convert));
  CLI::App* record = app.add_subcommand("record", "Record the routing of a running server");
  commands.emplace_back(record, AddRecordCommand(record));
  CLI::App* bench = app.add_subcommand("bench", "Measure splits, planners or migrations");
  commands.emplace_back(bench, AddBenchCommand(bench));
  CLI::App* doctor =
      app.add_subcommand("doctor", "Check this machine, or measure its constants");
  commands.emplace_back(doctor, AddDoctorCommand(doctor));
  CLI::App* version = app.add_subcommand("version", "Print the version");
  commands.emplace_back(version, [](int*, char***) {
    std::cout << "ballast " << BALLAST_VERSION << "\n";
    return int{kExitOk};
  });
  std::vector<std::string> names;
  for (auto& [command, run] : commands) {
    NameEnvironment(command);
    command->option_defaults()->always_capture_default();
    names.push_back(command->get_name());
  }
  if (argc > 1 && argv[1][0] != '-' && std::ranges::find(names, argv[1]) == names.end()) {
    return RefuseOnAllRanks(absl::StrCat("sub-command ", argv[1], " is unknown, allowed: ",
                                         absl::StrJoin(names, ", "), NearestOf(argv[1], names)));
  }
  const std::string config = FindConfigPath(argc, argv);
  if (!config.empty()) {
    for (auto& [command, run] : commands) {
      if (argc < 2 || command->get_name() != argv[1]) continue;
      const absl::Status applied = ApplyConfigFile(config, command);
      if (applied.ok()) continue;
      return RefuseOnAllRanks(std::string(applied.message()));
    }
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      if (SpeaksForAll()) app.exit(error);  // --help, --version
      return kExitOk;
    }
    const CLI::App* chosen = &app;
    std::string name;
    if (!app.get_subcommands().empty()) {
      chosen = app.get_subcommands().front();
      name = " " + chosen->get_name();
    }
    return RefuseOnAllRanks(absl::StrCat(Explain(error, *chosen, argc, argv), "\n(`ballast", name,
                                         " --help` lists what is allowed)"));
  }
  for (auto& [command, run] : commands) {
    if (command->parsed()) return run(&argc, &argv);
  }
  return kExitUsage;
}

}  // namespace
}  // namespace ballast

int main(int argc, char** argv) { return ballast::Main(argc, argv); }
