#include "deploy/server.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <future>

#include "base/log.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/idle_flags.h"
#include "deploy/lab.h"
#include "placement/policy.h"

namespace ballast {
namespace {

// The cores that this process may run on, and where.
struct CoreSet {
  int32_t node = 0;
  cpu_set_t cores = {};
};

}  // namespace

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

absl::Status Server::Prepare() {
  BALLAST_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(flags_.model));
  BALLAST_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(flags_.model));
  tokenizer_ = std::move(tokenizer);
  BALLAST_RETURN_IF_ERROR(ChooseTypes());
  if (is_leader() && !flags_.ready_file.empty() && !std::ofstream(flags_.ready_file + ".new")) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ready-file: cannot write ", flags_.ready_file));
  }
  if (is_leader() && !flags_.state_file.empty()) {
    const std::string beside = flags_.state_file + ".new";
    if (!std::ofstream(beside)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--state-file: cannot write ", flags_.state_file));
    }
    std::remove(beside.c_str());
  }
  BALLAST_RETURN_IF_ERROR(MakePlacement());
  BALLAST_RETURN_IF_ERROR(CheckMemory());
  return flags_.dry_run ? absl::OkStatus() : StartMetrics();
}

// The ranks of this machine together must find room in it.
absl::Status Server::CheckMemory() const {
  const Topology& topology = placement_->topology();
  int64_t needed = 0;
  int32_t ranks = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    if (topology.node_of_rank[r] != mpi_->node()) continue;
    BALLAST_ASSIGN_OR_RETURN(
        const MemoryPlan plan,
        PlanMemory(MakeEngineOptions(), checkpoint_->config(), *kernels_, topology, r));
    needed += plan.total();
    ++ranks;
  }
  if (needed <= MachineMemory()) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const std::string each, DescribeMemory());
  return absl::InvalidArgumentError(
      absl::StrCat("the ", ranks, " ranks of the machine of rank ", mpi_->rank(), " need ", needed,
                   " bytes of memory, allowed: up to ", MachineMemory(), ", which it has\n", each));
}

absl::StatusOr<std::string> Server::DescribeMemory() const {
  BALLAST_ASSIGN_OR_RETURN(const MemoryPlan plan,
                           PlanMemory(MakeEngineOptions(), checkpoint_->config(), *kernels_,
                                      placement_->topology(), mpi_->rank()));
  std::vector<std::vector<std::string>> rows = {{"a rank, before the buffers of steps", "bytes"}};
  const auto add = [&](const char* what, int64_t bytes) {
    rows.push_back({what, absl::StrCat(bytes)});
  };
  add("parameters that every rank holds", plan.parameters);
  add("experts in its slots (--slots-per-rank)", plan.experts);
  add("copies on their way (--staging-experts)", plan.transfers);
  add("key-value cache (--kv-bytes)", plan.kv_cache);
  add("in all", plan.total());
  return FormatTable(rows);
}

absl::Status Server::ChooseTypes() {
  BALLAST_ASSIGN_OR_RETURN(split_, ParseSplitMode(flags_.split));
  if (split_ == SplitMode::kCost) {
    return absl::InvalidArgumentError(
        "--split is cost, allowed in serve: exact, price, even, roundrobin, hash; all ranks would "
        "need the same constants, so cost is for replay and bench");
  }
  kernels_ = &DefaultCpuKernels();
  if (flags_.dtype == "auto") {
    dtype_ = cpu::OneDnnHasBFloat16() ? DType::kBF16 : DType::kF32;
  } else {
    dtype_ = flags_.dtype == "bf16" ? DType::kBF16 : DType::kF32;
  }
  if (dtype_ == DType::kBF16 && !cpu::OneDnnHasBFloat16()) kernels_ = &PlainKernels();
  return absl::OkStatus();
}

// The cores that this rank may use, divided by the ranks that may use them too.
absl::Status Server::ChooseThreads() {
  CoreSet mine{.node = mpi_->node()};
  sched_getaffinity(0, sizeof mine.cores, &mine.cores);
  std::vector<CoreSet> all(static_cast<size_t>(mpi_->size()));
  BALLAST_RETURN_IF_ERROR(communicator_->AllGather(placement_->epoch(),
                                                   std::as_bytes(std::span(&mine, 1)),
                                                   std::as_writable_bytes(std::span(all))));
  int sharing = 0;
  for (CoreSet& other : all) {
    cpu_set_t common;
    CPU_AND(&common, &mine.cores, &other.cores);
    sharing += other.node == mine.node && CPU_COUNT(&common) > 0;
  }
  const int fair = CPU_COUNT(&mine.cores) / std::max(1, sharing);
  cpu::SetMatmulThreads(flags_.threads > 0 ? flags_.threads : std::max(1, fair));
  return absl::OkStatus();
}

absl::Status Server::MakePlacement() {
  const GateRule& gate = checkpoint_->config().gate;
  const int32_t ranks = mpi_->size();
  const int32_t share = (gate.num_experts + ranks - 1) / ranks;
  const int32_t slots =
      flags_.slots_per_rank > 0 ? flags_.slots_per_rank : std::min(share + 2, gate.num_experts);
  if (int64_t{slots} * ranks < gate.num_experts) {
    return absl::InvalidArgumentError(
        absl::StrCat("--slots-per-rank is ", slots, ": ", ranks, " ranks then hold ", slots * ranks,
                     " experts, the model has ", gate.num_experts, "; allowed: at least ", share));
  }
  if (flags_.staging_experts > 0 && flags_.staging_experts < slots) {
    return absl::InvalidArgumentError(absl::StrCat("--staging-experts is ", flags_.staging_experts,
                                                   "; allowed: 0, or at least ", slots,
                                                   ", the slots of a rank in a layer"));
  }
  Topology topology = Topology::Uniform(ranks, slots);
  topology.node_of_rank = mpi_->node_of_rank();
  BALLAST_ASSIGN_OR_RETURN(const auto policy, MakePolicy(flags_.policy));
  if (is_leader()) {
    for (const std::string& idle : IdleFlags(flags_, *policy)) LogWarning("serve", idle);
  }
  const PlacementRules& rules = flags_.controller.rules;
  BALLAST_RETURN_IF_ERROR(
      CheckRules(flags_.policy, policy->rules_kept(), rules, topology, gate.num_experts));
  BALLAST_ASSIGN_OR_RETURN(
      placement_,
      Placement::Contiguous(checkpoint_->config().num_moe_layers(), gate.num_experts, topology,
                            policy->fills_spare_slots_at_start(), rules.node_local));
  return absl::OkStatus();
}

absl::Status Server::StartMetrics() {
  const ModelConfig& config = checkpoint_->config();
  char host[256] = "unknown";
  gethostname(host, sizeof host - 1);
  BALLAST_ASSIGN_OR_RETURN(metrics_, RankMetrics::Create({.rank = mpi_->rank(),
                                                          .node = host,
                                                          .backend = kernels_->name,
                                                          .version = BALLAST_VERSION,
                                                          .commit = BALLAST_COMMIT,
                                                          .model = config.name,
                                                          .num_layers = config.num_moe_layers(),
                                                          .num_experts = config.gate.num_experts,
                                                          .top_k = config.gate.top_k,
                                                          .num_ranks = mpi_->size()}));
  if (flags_.no_metrics) return absl::OkStatus();
  const int port = flags_.metrics_port == 0 ? 0 : flags_.metrics_port + mpi_->local_rank();
  auto exporter = MetricsExporter::Start({.host = flags_.host, .port = port},
                                         [this] { return metrics_->Render(); });
  if (!exporter.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--metrics-port: ", std::string(exporter.status().message())));
  }
  exporter_ = *std::move(exporter);
  return absl::OkStatus();
}

// All ranks go on, or all return the failure of one of them.
absl::Status Server::Agree(absl::Status mine, const char* what) {
  const int failed = mpi_->Highest(mine.ok() ? -1 : mpi_->size() - mpi_->rank());
  if (failed < 0) return absl::OkStatus();
  // The lowest rank that failed speaks, and all end with its code.
  speaks_ = mpi_->size() - failed == mpi_->rank();
  const int code = mpi_->Highest(speaks_ ? static_cast<int>(mine.code()) : 0);
  if (speaks_) return mine;
  return absl::Status(static_cast<absl::StatusCode>(code),
                      absl::StrCat(what, " failed on another rank"));
}

// The leader alone heeds the signals, which are blocked everywhere: the others stop when it says
// so.
void Server::AwaitSignal() {
  const sigset_t signals = StopSignals();
  int signal = 0;
  sigwait(&signals, &signal);
  LogInfo("serve", "told to stop: finishing what was admitted");
  auto drained =
      std::async(std::launch::async, [this] { frontend_->DrainAndStop(flags_.drain_timeout_ms); });
  const timespec poll{0, 100'000'000};
  while (drained.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    if (sigtimedwait(&signals, nullptr, &poll) < 0) continue;
    LogWarning("serve", "told twice: leaving at once");
    _exit(kExitRetry);
  }
}

void Server::Stop() {
  if (verification_ != nullptr) verification_->Cancel();
  if (signal_thread_.joinable()) signal_thread_.join();
  http_.reset();
  if (is_leader()) LogInfo("serve", "stopped");
}

}  // namespace ballast
