#include "deploy/demo/driver/drive.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "base/clock.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "deploy/http_client.h"

namespace ballast {
namespace {

using nlohmann::json;

constexpr const char* kDomainNames[] = {"english", "code", "japanese", "structured"};
constexpr char kMixPhase[] = "mix";
constexpr size_t kMinPromptBytes = 200;
constexpr size_t kMaxPromptBytes = 400;
constexpr double kTemperature = 0.8;
constexpr int kTimeoutMs = 300'000;
// Between phases, so that the log of a phase's last step is written before the next one begins.
constexpr std::chrono::milliseconds kPause(200);

int64_t UnixUs() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

bool IsBoundary(std::string_view text, size_t at) {
  return at >= text.size() || (static_cast<uint8_t>(text[at]) & 0xc0) != 0x80;
}

// A number that differs between phases and requests, whatever the order of the phases.
uint64_t RequestSeed(const std::string& phase, int64_t index, uint64_t seed) {
  for (const char c : phase) seed = RandomBits(seed, static_cast<uint8_t>(c));
  return RandomBits(seed, static_cast<uint64_t>(index));
}

// One line on a terminal, rewritten as the phase goes on; one line per phase elsewhere.
class Progress {
 public:
  Progress(std::string name, int total)
      : name_(std::move(name)), total_(total), is_terminal_(isatty(STDERR_FILENO) == 1) {}
  void Show(int done, int64_t tokens, double seconds) {
    if (!is_terminal_ && done < total_) return;
    std::fprintf(stderr, "%s%-12s %d/%d requests, %.0f tokens/s%s", is_terminal_ ? "\r" : "",
                 name_.c_str(), done, total_, static_cast<double>(tokens) / std::max(seconds, 1e-9),
                 done == total_ ? "\n" : "   ");
  }

 private:
  const std::string name_;
  const int total_;
  const bool is_terminal_;
};

absl::StatusOr<RequestRecord> Ask(HttpClient& client, const std::string& prompt, int64_t index,
                                  uint64_t seed, int max_tokens) {
  const json body = {{"prompt", prompt},
                     {"max_tokens", max_tokens},
                     {"temperature", kTemperature},
                     {"seed", seed},
                     {"return_token_ids", true}};
  const int64_t begin = NowNs();
  BALLAST_ASSIGN_OR_RETURN(const HttpResponse response,
                           client.Request("POST", "/v1/completions", body.dump()));
  RequestRecord record;
  record.index = index;
  record.latency_ms = static_cast<double>(NowNs() - begin) * 1e-6;
  if (response.status != 200) {
    return absl::UnavailableError(absl::StrCat("request ", index, ": the server answers ",
                                               response.status, ": ", response.body));
  }
  try {
    json::parse(response.body).at("choices").at(0).at("token_ids").get_to(record.token_ids);
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("request ", index, ": ", error.what()));
  }
  return record;
}

// The requests of one phase over `concurrency` connections; each takes the next request.
class PhaseRun {
 public:
  PhaseRun(const DriveOptions& options, const Domains& domains, const std::string& name)
      : options_(options), domains_(domains), progress_(name, options.requests_per_phase) {
    phase_.name = name;
    phase_.requests.resize(static_cast<size_t>(options.requests_per_phase));
  }

  absl::StatusOr<PhaseRecord> Run() {
    phase_.begin_us = UnixUs();
    std::vector<std::thread> threads;
    for (int i = 0; i < options_.concurrency; ++i) threads.emplace_back([this] { Work(); });
    for (std::thread& thread : threads) thread.join();
    phase_.end_us = UnixUs();
    BALLAST_RETURN_IF_ERROR(status_);
    phase_.tokens_per_s = static_cast<double>(tokens_) / Seconds(phase_.end_us);
    return std::move(phase_);
  }

 private:
  double Seconds(int64_t now_us) const {
    return static_cast<double>(std::max<int64_t>(now_us - phase_.begin_us, 1)) * 1e-6;
  }

  void Work() {
    std::optional<HttpClient> client;
    while (true) {
      const int index = next_++;
      if (index >= options_.requests_per_phase || failed_) return;
      const absl::Status status = Serve(index, client);
      if (status.ok()) continue;
      const std::lock_guard lock(mutex_);
      status_.Update(status);
      failed_ = true;
    }
  }

  absl::Status Serve(int index, std::optional<HttpClient>& client) {
    if (!client.has_value()) {
      BALLAST_ASSIGN_OR_RETURN(client, HttpClient::Connect("127.0.0.1", options_.port, kTimeoutMs));
    }
    BALLAST_ASSIGN_OR_RETURN(
        RequestRecord record,
        Ask(*client, PromptOf(domains_, phase_.name, index, options_.seed), index,
            RequestSeed(phase_.name, index, options_.seed + 1), options_.max_tokens));
    const std::lock_guard lock(mutex_);
    tokens_ += static_cast<int64_t>(record.token_ids.size());
    phase_.requests[static_cast<size_t>(index)] = std::move(record);
    progress_.Show(++done_, tokens_, Seconds(UnixUs()));
    return absl::OkStatus();
  }

  const DriveOptions& options_;
  const Domains& domains_;
  std::atomic<int> next_ = 0;
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;
  // State below is protected by mutex_ while the threads run.
  Progress progress_;
  PhaseRecord phase_;
  absl::Status status_;
  int done_ = 0;
  int64_t tokens_ = 0;
};

absl::Status CheckPhases(const DriveOptions& options) {
  for (const std::string& phase : options.phases) {
    if (phase != kMixPhase &&
        std::count(std::begin(kDomainNames), std::end(kDomainNames), phase) == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--phases: '", phase,
                       "'; allowed are mix, english, code, japanese and "
                       "structured"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Domains> ReadDomains(const std::string& dir) {
  Domains domains;
  for (const char* name : kDomainNames) {
    const std::string path = dir + "/" + name + ".txt";
    BALLAST_ASSIGN_OR_RETURN(domains[name], ReadFile(path));
    if (domains[name].size() < kMaxPromptBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", domains[name].size(), " bytes; at least ", kMaxPromptBytes));
    }
  }
  return domains;
}

std::string CutPrompt(std::string_view text, uint64_t seed, uint64_t counter) {
  Random random(RandomBits(seed, counter));
  const size_t length =
      kMinPromptBytes + random.Below(static_cast<uint32_t>(kMaxPromptBytes - kMinPromptBytes));
  size_t begin = random.Below(static_cast<uint32_t>(text.size() - length + 1));
  size_t end = begin + length;
  while (!IsBoundary(text, begin)) ++begin;
  while (!IsBoundary(text, end)) --end;
  return std::string(text.substr(begin, end - begin));
}

std::string PromptOf(const Domains& domains, const std::string& phase, int64_t index,
                     uint64_t seed) {
  const std::string domain =
      phase == kMixPhase ? kDomainNames[static_cast<size_t>(index) % std::size(kDomainNames)]
                         : phase;
  return CutPrompt(domains.at(domain), RequestSeed(phase, index, seed), 0);
}

absl::StatusOr<RunRecord> Drive(const DriveOptions& options) {
  BALLAST_RETURN_IF_ERROR(CheckPhases(options));
  BALLAST_ASSIGN_OR_RETURN(const Domains domains, ReadDomains(options.prompts_dir));
  RunRecord run;
  run.cores = static_cast<int64_t>(std::thread::hardware_concurrency());
  run.seed = static_cast<int64_t>(options.seed);
  run.concurrency = options.concurrency;
  run.max_tokens = options.max_tokens;
  for (const std::string& name : options.phases) {
    BALLAST_ASSIGN_OR_RETURN(PhaseRecord phase, PhaseRun(options, domains, name).Run());
    run.phases.push_back(std::move(phase));
    std::this_thread::sleep_for(kPause);
  }
  BALLAST_ASSIGN_OR_RETURN(const std::string log, ReadFile(options.step_log_path));
  BALLAST_ASSIGN_OR_RETURN(const std::vector<StepRecord> steps, ParseStepLog(log));
  AssignSteps(steps, &run.phases);
  return run;
}

}  // namespace ballast
