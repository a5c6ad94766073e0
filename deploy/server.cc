#include "deploy/server.h"

#include <netdb.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <future>
#include <utility>

#include "base/log.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/device.h"
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

// Whether something can listen on the address at all: a port in use is another matter.
absl::Status CheckHost(const std::string& host) {
  const auto refused = [&](const char* why) {
    return absl::InvalidArgumentError(
        absl::StrCat("--host is ", host, ": ", why,
                     "; allowed: an address of this machine, as 127.0.0.1, or 0.0.0.0 for all"));
  };
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), nullptr, &wanted, &found);
  if (error != 0) return refused(gai_strerror(error));
  int why = 0;
  bool bound = false;
  for (const addrinfo* at = found; at != nullptr && !bound; at = at->ai_next) {
    const int fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, 0);
    bound = fd >= 0 && bind(fd, at->ai_addr, at->ai_addrlen) == 0;  // to any free port
    why = errno;
    if (fd >= 0) close(fd);
  }
  freeaddrinfo(found);
  return bound ? absl::OkStatus() : refused(std::strerror(why));
}

}  // namespace

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

absl::Status Server::Prepare() {
  transport_ = mpi_->MakeTransport();
  communicator_ = std::make_unique<Communicator>(
      transport_.get(), Communicator::Options{.deadline_ms = flags_.step_timeout_ms});
  BALLAST_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(flags_.model));
  BALLAST_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(flags_.model));
  tokenizer_ = std::move(tokenizer);
  BALLAST_RETURN_IF_ERROR(ChooseTypes());
  BALLAST_RETURN_IF_ERROR(CheckHost(flags_.host));
  if (is_leader()) {
    BALLAST_RETURN_IF_ERROR(
        CheckOutputs({{"--ready-file", flags_.ready_file}, {"--state-file", flags_.state_file}}));
  }
  BALLAST_RETURN_IF_ERROR(MakePlacement());
  BALLAST_RETURN_IF_ERROR(CheckMemory());
  if (flags_.dry_run) return absl::OkStatus();
  BALLAST_RETURN_IF_ERROR(StartMetrics());
  // Last, so that a start that is refused, say because a server has the ports, takes nothing away
  // from that server.
  return RemoveReadyFile();
}

// The file is there while the server is ready, and after it only if that did not end in an orderly
// way.
absl::Status Server::RemoveReadyFile() const {
  if (!is_leader() || flags_.ready_file.empty()) return absl::OkStatus();
  if (std::remove(flags_.ready_file.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--ready-file: ", flags_.ready_file,
                                                 ": cannot be removed: ", std::strerror(errno)));
}

// The ranks of this machine together must find room in it, or this rank on its device.
absl::Status Server::CheckMemory() const {
  const Topology& topology = placement_->topology();
  if (backend_->has_own_memory()) return CheckDeviceMemory();
  int64_t needed = 0;
  int32_t ranks = 0;
  for (int32_t r = 0; r < topology.num_ranks(); ++r) {
    if (topology.node_of_rank[r] != mpi_->node()) continue;
    BALLAST_ASSIGN_OR_RETURN(
        const MemoryPlan plan,
        PlanMemory(MakeEngineOptions(), checkpoint_->config(), *backend_, topology, r));
    needed += plan.total();
    ++ranks;
  }
  if (needed <= MachineMemory()) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const std::string each, DescribeMemory());
  return absl::InvalidArgumentError(
      absl::StrCat("the ", ranks, " ranks of the machine of rank ", mpi_->rank(), " need ", needed,
                   " bytes of memory, allowed: up to ", MachineMemory(), ", which it has\n", each));
}

absl::Status Server::CheckDeviceMemory() const {
  BALLAST_ASSIGN_OR_RETURN(const MemoryPlan plan,
                           PlanMemory(MakeEngineOptions(), checkpoint_->config(), *backend_,
                                      placement_->topology(), mpi_->rank()));
  if (plan.total() <= backend_->all_memory()) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(const std::string each, DescribeMemory());
  return absl::InvalidArgumentError(absl::StrCat("rank ", mpi_->rank(), " needs ", plan.total(),
                                                 " bytes of its device's memory, allowed: up to ",
                                                 backend_->all_memory(), ", which it has\n", each));
}

absl::StatusOr<std::string> Server::DescribeMemory() const {
  BALLAST_ASSIGN_OR_RETURN(const MemoryPlan plan,
                           PlanMemory(MakeEngineOptions(), checkpoint_->config(), *backend_,
                                      placement_->topology(), mpi_->rank()));
  std::vector<std::vector<std::string>> rows = {{"a rank, before the buffers of steps", "bytes"}};
  const auto add = [&](const char* what, int64_t bytes) {
    rows.push_back({what, absl::StrCat(bytes)});
  };
  add("parameters that every rank holds", plan.parameters);
  add("experts in its slots (--slots-per-rank)", plan.experts);
  add("copies on their way (--staging-experts)", plan.transfers);
  add("key-value cache (--kv-bytes)", plan.kv_cache);
  if (plan.moe_layers > 0) add("rows of a step (--max-batch-tokens)", plan.moe_layers);
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
  if (flags_.device == "cuda") {
    if (split_ != SplitMode::kExact) {
      return absl::InvalidArgumentError(
          absl::StrCat("--split is ", flags_.split, ", allowed with --device cuda: exact"));
    }
    dtype_ = flags_.dtype == "fp32" ? DType::kF32 : DType::kBF16;
    const std::vector<int32_t> nodes = mpi_->node_of_rank();
    const auto node_rank = std::count(nodes.begin(), nodes.begin() + mpi_->rank(), mpi_->node());
    BALLAST_ASSIGN_OR_RETURN(
        backend_, MakeDeviceBackend(static_cast<int32_t>(node_rank), nodes, communicator_.get()));
    return absl::OkStatus();
  }
  dtype_ = DTypeOfFlag(flags_.dtype);
  backend_ = std::make_unique<HostBackend>(
      dtype_ == DType::kBF16 && !cpu::OneDnnHasBFloat16() ? PlainKernels() : DefaultCpuKernels());
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
  if (slots > gate.num_experts) {
    return absl::InvalidArgumentError(
        absl::StrCat("--slots-per-rank is ", slots, ", allowed: at most ", gate.num_experts,
                     ", the experts of a layer: a rank needs none twice"));
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
                                                          .backend = backend_->kernels().name,
                                                          .version = BALLAST_VERSION,
                                                          .commit = BALLAST_COMMIT,
                                                          .model = config.name,
                                                          .num_layers = config.num_moe_layers(),
                                                          .num_experts = config.gate.num_experts,
                                                          .top_k = config.gate.top_k,
                                                          .num_ranks = mpi_->size()}));
  if (flags_.no_metrics) return absl::OkStatus();
  const int port = flags_.metrics_port == 0 ? 0 : flags_.metrics_port + mpi_->local_rank();
  const bool is_ipv6 = flags_.host.find(':') != std::string::npos;
  auto exporter = MetricsExporter::Start(
      {.host = is_ipv6 ? absl::StrCat("[", flags_.host, "]") : flags_.host, .port = port},
      [this] { return metrics_->Render(); });
  if (!exporter.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--metrics-port: ", std::string(exporter.status().message()),
                     "; allowed: one from which on there is a free port for each rank, 0 for any, "
                     "or --no-metrics"));
  }
  exporter_ = *std::move(exporter);
  return absl::OkStatus();
}

// All ranks go on, or all return the failure of one of them.
absl::Status Server::Agree(absl::Status mine, const char* what) {
  // Who only waited in vain for one that failed knows less.
  const int weight = absl::IsDeadlineExceeded(mine) ? 1 : mpi_->size() + 1;
  const int own = mine.ok() ? -1 : weight + mpi_->size() - 1 - mpi_->rank();
  const int failed = mpi_->Highest(own);
  if (failed < 0) return absl::OkStatus();
  // The lowest of the ranks that failed speaks, and all end with its code. They learn it only after
  // it has spoken: mpirun kills all ranks when the first one leaves.
  const bool speaks = failed == own;
  if (speaks) {
    std::fprintf(stderr, "ballast: rank %d: %s\n", mpi_->rank(),
                 std::string(mine.message()).c_str());
  }
  said_why_ = true;
  const int code = mpi_->Highest(speaks ? static_cast<int>(mine.code()) : 0);
  if (speaks) return mine;
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
  const absl::Status removed = RemoveReadyFile();
  if (!removed.ok()) LogWarning("serve", std::string(removed.message()));
  if (is_leader()) LogInfo("serve", "stopped");
}

}  // namespace ballast
