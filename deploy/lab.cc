#include "deploy/lab.h"

#include <sched.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>

#include "absl/strings/match.h"
#include "base/file.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "kernels/matmul.h"

namespace ballast {

void AddConfigFlag(CLI::App* app) {
  static std::string config;  // read before the parse, by FindConfigPath
  app->option_defaults()->always_capture_default();
  app->add_option("--config", config, "JSON file with values for these flags");
}

int Finish(const absl::Status& status) {
  if (!status.ok()) std::cerr << "ballast: " << status.message() << "\n";
  return ExitCodeOf(status);
}

absl::StatusOr<NamedArray> ReadArray(const std::string& path) {
  BALLAST_ASSIGN_OR_RETURN(NpyArray array, ReadNpy(path));
  return NamedArray{.name = path, .array = std::move(array)};
}

absl::StatusOr<LoadTable> ReadLoad(const std::string& path) {
  if (absl::EndsWith(path, ".npy")) {
    BALLAST_ASSIGN_OR_RETURN(const NamedArray array, ReadArray(path));
    return LoadFromArray(array);
  }
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return LoadFromCsv(path, text);
}

absl::StatusOr<Topology> TopologyFromFlags(int32_t ranks, int32_t slots, int32_t nodes,
                                           int32_t num_experts) {
  const auto reject = [](const char* flag, int32_t value, const std::string& allowed) {
    return absl::InvalidArgumentError(absl::StrCat(flag, " is ", value, ", allowed: ", allowed));
  };
  if (ranks < 1) return reject("--ranks", ranks, "at least 1");
  if (slots < ranks) return reject("--slots", slots, absl::StrCat("at least --ranks, ", ranks));
  if (slots % ranks != 0) {
    return reject("--slots", slots, absl::StrCat("a multiple of --ranks, ", ranks));
  }
  if (slots < num_experts) {
    return reject("--slots", slots, absl::StrCat("at least the experts, ", num_experts));
  }
  if (nodes < 1 || ranks % nodes != 0) {
    return reject("--nodes", nodes, absl::StrCat("a divisor of --ranks, ", ranks));
  }
  return Topology::Uniform(ranks, slots / ranks, nodes);
}

absl::Status CheckOutputs(const std::vector<std::pair<const char*, std::string>>& path_of_flag) {
  for (const auto& [flag, path] : path_of_flag) {
    const absl::Status status = path.empty() ? absl::OkStatus() : CheckWritable(path);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(flag, ": ", status.message()));
    }
  }
  return absl::OkStatus();
}

DType DTypeOfFlag(const std::string& name) {
  const bool bf16 = name == "bf16" || (name == "auto" && cpu::OneDnnHasBFloat16());
  return bf16 ? DType::kBF16 : DType::kF32;
}

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const std::vector<std::string>& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const std::vector<std::string>& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - row[i].size(), ' ');
      text += i == 0 ? row[i] + padding : "  " + padding + row[i];
    }
    text += '\n';
  }
  return text;
}

std::string Fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

double PercentileOf(std::vector<double> values, double share) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

int CoresHere() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof cores, &cores);
  return std::max(1, CPU_COUNT(&cores));
}

std::string CpuModel() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

ProgressBar::ProgressBar(const char* what)
    : what_(what), on_terminal_(isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  if (on_terminal_ && shown_percent_ >= 0) std::cerr << "\r\033[K" << std::flush;
}

void ProgressBar::Show(int64_t done, int64_t all) {
  constexpr int64_t kWidth = 40;
  const int64_t percent = all > 0 ? done * 100 / all : 100;
  if (!on_terminal_ || percent == shown_percent_) return;
  shown_percent_ = percent;
  const size_t full = static_cast<size_t>(percent * kWidth / 100);
  std::cerr << "\r" << what_ << " [" << std::string(full, '#') << std::string(kWidth - full, '.')
            << "] " << percent << " %" << std::flush;
}

}  // namespace ballast
