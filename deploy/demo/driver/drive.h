#ifndef BALLAST_DEPLOY_DEMO_DRIVER_DRIVE_H_
#define BALLAST_DEPLOY_DEMO_DRIVER_DRIVE_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "deploy/demo/driver/run_record.h"

namespace ballast {

struct DriveOptions {
  int port = 8080;
  std::string prompts_dir;    // holds english.txt, code.txt, japanese.txt, structured.txt
  std::string step_log_path;  // the server's --step-log
  std::vector<std::string> phases = {"mix", "code", "japanese", "structured"};
  int requests_per_phase = 64;
  int concurrency = 16;
  int max_tokens = 64;
  uint64_t seed = 1;
};

// The text of each domain.
using Domains = std::map<std::string, std::string>;
absl::StatusOr<Domains> ReadDomains(const std::string& dir);

// A window of 200 to 400 bytes of `text`, cut between characters; a function of (seed, counter).
std::string CutPrompt(std::string_view text, uint64_t seed, uint64_t counter);

// The prompt of one request: phase `mix` takes all domains in turn. The phase's name and the
// request's index decide, so that two runs ask the same.
std::string PromptOf(const Domains& domains, const std::string& phase, int64_t index,
                     uint64_t seed);

// Sends every phase's requests to the server on this machine, shows progress on stderr, and returns
// what was measured.
// ERRORS kInvalidArgument: an unknown phase, an empty file; whatever the server answers but 200
absl::StatusOr<RunRecord> Drive(const DriveOptions& options);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_DEMO_DRIVER_DRIVE_H_
