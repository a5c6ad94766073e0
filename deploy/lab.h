// What the laboratory's commands (plan, replay, bench, convert) share.
#ifndef BALLAST_DEPLOY_LAB_H_
#define BALLAST_DEPLOY_LAB_H_

#include <CLI/App.hpp>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/dtype.h"
#include "placement/placement.h"
#include "placement/trace.h"

namespace ballast {

// Adds --config, which is read before the parse, and names the environment variables in --help.
void AddConfigFlag(CLI::App* app);

// Prints "ballast: message" on stderr unless `status` is OK; returns the exit code.
int Finish(const absl::Status& status);

absl::StatusOr<NamedArray> ReadArray(const std::string& path);
// .npy, or text for any other name.
absl::StatusOr<LoadTable> ReadLoad(const std::string& path);

// Equal ranks in equal nodes.
// ERRORS kInvalidArgument names the flags --ranks, --slots, --nodes with their values
absl::StatusOr<Topology> TopologyFromFlags(int32_t ranks, int32_t slots, int32_t nodes,
                                           int32_t num_experts);

// Whether the files that a command is to write can be written, asked before the work: each with its
// flag, "" for none.
// ERRORS kInvalidArgument names the flag, the path and the reason
absl::Status CheckOutputs(const std::vector<std::pair<const char*, std::string>>& path_of_flag);

// The type that --dtype names: bf16, fp32, or auto: bf16 where the processor multiplies it.
DType DTypeOfFlag(const std::string& name);

// Columns under their headings, the first left-aligned, numbers right-aligned, as plain text.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);
// `value` with `digits` behind the point.
std::string Fixed(double value, int digits);

// Nearest rank; `share` of the values do not exceed it. 0 without values.
double PercentileOf(std::vector<double> values, double share);

// Cores that this process may use, and what their processor calls itself.
int CoresHere();
std::string CpuModel();

// A bar on stderr while something takes long; nothing unless stderr is a terminal.
class ProgressBar {
 public:
  explicit ProgressBar(const char* what);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Show(int64_t done, int64_t all);

 private:
  const char* what_;
  bool on_terminal_;
  int64_t shown_percent_ = -1;
};

}  // namespace ballast

#endif  // BALLAST_DEPLOY_LAB_H_
