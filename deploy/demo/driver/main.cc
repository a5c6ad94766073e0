// `ballast-demo`: sends real text to a running server in phases (drive) and compares two such runs
// (report). Exit codes: 0 fine; 1 failed, or the texts differ; 2 usage.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "base/file.h"
#include "base/status.h"
#include "deploy/demo/driver/drive.h"
#include "deploy/demo/driver/measures.h"
#include "deploy/demo/driver/report.h"

namespace ballast {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

struct ReportOptions {
  std::string static_path, dynamic_path;
  std::string out_dir = "build/demo";
};

absl::Status RunDrive(const DriveOptions& options, const std::string& out_path) {
  BALLAST_ASSIGN_OR_RETURN(const RunRecord run, Drive(options));
  return WriteFile(out_path, ToJson(run));
}

absl::StatusOr<RunRecord> ReadRun(const std::string& path) {
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseRunRecord(text);
}

absl::Status RunReport(const ReportOptions& options) {
  BALLAST_ASSIGN_OR_RETURN(const RunRecord fixed, ReadRun(options.static_path));
  BALLAST_ASSIGN_OR_RETURN(const RunRecord dynamic, ReadRun(options.dynamic_path));
  BALLAST_ASSIGN_OR_RETURN(const Comparison comparison, Compare(fixed, dynamic));
  std::error_code error;
  std::filesystem::create_directories(options.out_dir, error);
  BALLAST_RETURN_IF_ERROR(WriteFile(options.out_dir + "/result.json", ToJson(comparison)));
  BALLAST_RETURN_IF_ERROR(
      WriteFile(options.out_dir + "/report.html", ReportHtml(fixed, dynamic, comparison)));
  std::fputs(ToTable(comparison).c_str(), stdout);
  std::printf("report: %s/report.html\n", options.out_dir.c_str());
  if (comparison.texts_identical) return absl::OkStatus();
  return absl::DataLossError("the placement changed a text");
}

int Main(int argc, char** argv) {
  CLI::App app("Drives the demo of Ballast and reports on it.", "ballast-demo");
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();

  DriveOptions drive_options;
  std::string out_path;
  CLI::App* drive = app.add_subcommand("drive", "Send phases of real text to a running server");
  drive->add_option("--port", drive_options.port, "Port of the server on this machine")
      ->check(CLI::Range(1, 65535));
  drive->add_option("--prompts", drive_options.prompts_dir, "Folder with <domain>.txt")->required();
  drive->add_option("--step-log", drive_options.step_log_path, "The server's --step-log file")
      ->required();
  drive->add_option("--out", out_path, "Where the record of the run goes")->required();
  drive->add_option("--phases", drive_options.phases, "Phases in order")->delimiter(',');
  drive->add_option("--requests-per-phase", drive_options.requests_per_phase, "Requests per phase")
      ->check(CLI::Range(1, 1'000'000));
  drive->add_option("--concurrency", drive_options.concurrency, "Requests at a time")
      ->check(CLI::Range(1, 1024));
  drive->add_option("--max-tokens", drive_options.max_tokens, "Tokens per request")
      ->check(CLI::Range(1, 1'000'000));
  drive->add_option("--seed", drive_options.seed, "Seed of prompts and sampling");

  ReportOptions report_options;
  CLI::App* report = app.add_subcommand("report", "Compare a static run with a dynamic one");
  report->add_option("--static", report_options.static_path, "Record of the static run")
      ->required();
  report->add_option("--dynamic", report_options.dynamic_path, "Record of the dynamic run")
      ->required();
  report->add_option("--out-dir", report_options.out_dir, "Folder for result.json, report.html");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  const absl::Status status =
      drive->parsed() ? RunDrive(drive_options, out_path) : RunReport(report_options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "ballast-demo: %s\n", std::string(status.message()).c_str());
  return kExitFailed;
}

}  // namespace
}  // namespace ballast

int main(int argc, char** argv) {
  return ballast::Main(argc, argv);
}
