#include "deploy/serve.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "comm/communicator.h"
#include "comm/control_channel.h"
#include "comm/mpi_transport.h"
#include "deploy/commands.h"
#include "kernels/gated_mlp.h"
#include "monitor/exporter.h"
#include "monitor/metrics.h"
#include "monitor/trace_recorder.h"
#include "runtime/engine.h"
#include "runtime/frontend.h"
#include "runtime/http_server.h"
#include "runtime/leader.h"
#include "runtime/rank_observer.h"
#include "runtime/record_api.h"
#include "runtime/tokenizer.h"

namespace ballast {
namespace {

constexpr int kStartTimeoutMs = 60'000;

// The cores that this process may run on, and where.
struct CoreSet {
  int32_t node = 0;
  cpu_set_t cores = {};
};

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// A request past its deadline counts as failed.
RequestResult ResultOf(RequestEnd end) {
  switch (end) {
    case RequestEnd::kFinished:
      return RequestResult::kOk;
    case RequestEnd::kCancelled:
      return RequestResult::kCancelled;
    case RequestEnd::kRejected:
      return RequestResult::kRejected;
    default:
      return RequestResult::kFailed;
  }
}

// A rank is lost: the others cannot go on. The requests have been told; their answers get a moment.
void EndJob(int rank, const absl::Status& status) {
  LogError("frontend", absl::StrCat("lost rank ", rank, ": ", std::string(status.message()),
                                    "; ending the job"));
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  std::fflush(nullptr);
  _exit(kExitRetry);
}

// One rank of the server, from start to stop. Members are destroyed in reverse order: HTTP first,
// then what it calls.
class Server {
 public:
  Server(const ServeFlags& flags, MpiRuntime* mpi) : flags_(flags), mpi_(mpi) {}

  // Everything that can fail on this rank alone: flags, checkpoint, metrics.
  absl::Status Prepare();
  // COLLECTIVE: control channels, parameters, HTTP. Announces that the server is ready.
  absl::Status Start();
  // COLLECTIVE: serves until told to stop.
  absl::Status Run() { return engine_->Run(); }
  void Stop();
  // Whether this rank is the one to say why Start failed.
  bool speaks() const { return speaks_; }

 private:
  bool is_leader() const { return mpi_->rank() == 0; }
  absl::Status ChooseTypes();
  absl::Status ChooseThreads();
  absl::Status MakePlacement();
  absl::Status StartMetrics();
  absl::Status ConnectControl();
  absl::Status StartLeader();
  absl::Status StartEngine();
  absl::Status StartHttp();
  absl::Status Announce();
  absl::Status Agree(absl::Status mine, const char* what);
  void AwaitSignal();

  const ServeFlags flags_;
  MpiRuntime* mpi_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::optional<Tokenizer> tokenizer_;
  const KernelSet* kernels_ = nullptr;
  DType dtype_ = DType::kF32;
  SplitMode split_ = SplitMode::kExact;
  std::optional<Placement> placement_;
  std::unique_ptr<RankMetrics> metrics_;
  std::unique_ptr<MetricsExporter> exporter_;
  std::unique_ptr<TraceRecorder> recorder_;  // of the leader
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Communicator> communicator_;
  std::unique_ptr<ControlChannel> channel_;
  std::unique_ptr<Frontend> frontend_;
  std::unique_ptr<Leader> leader_;
  std::unique_ptr<RankObserver> observer_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<HttpServer> http_;
  std::thread signal_thread_;
  std::atomic<bool> ready_{false};
  bool speaks_ = true;
};

absl::Status Server::Prepare() {
  BALLAST_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(flags_.model));
  BALLAST_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(flags_.model));
  tokenizer_ = std::move(tokenizer);
  BALLAST_RETURN_IF_ERROR(ChooseTypes());
  if (is_leader() && !flags_.ready_file.empty() && !std::ofstream(flags_.ready_file + ".new")) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ready-file: cannot write ", flags_.ready_file));
  }
  BALLAST_RETURN_IF_ERROR(MakePlacement());
  return StartMetrics();
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
  Topology topology = Topology::Uniform(ranks, slots);
  topology.node_of_rank = mpi_->node_of_rank();
  BALLAST_ASSIGN_OR_RETURN(const auto policy, MakePolicy(flags_.policy));
  BALLAST_RETURN_IF_ERROR(CheckRules(flags_.policy, policy->rules_kept(), flags_.rules, topology,
                                     gate.num_experts));
  BALLAST_ASSIGN_OR_RETURN(
      placement_, Placement::Contiguous(checkpoint_->config().num_moe_layers(), gate.num_experts,
                                        topology, policy->fills_spare_slots_at_start(),
                                        flags_.rules.node_local));
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
                                                          .top_k = config.gate.top_k}));
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

absl::Status Server::Start() {
  transport_ = mpi_->MakeTransport();
  communicator_ = std::make_unique<Communicator>(
      transport_.get(), Communicator::Options{.deadline_ms = flags_.step_timeout_ms});
  BALLAST_RETURN_IF_ERROR(ChooseThreads());
  BALLAST_RETURN_IF_ERROR(Agree(ConnectControl(), "connecting the ranks"));
  BALLAST_RETURN_IF_ERROR(Agree(is_leader() ? StartLeader() : absl::OkStatus(), "the controller"));
  BALLAST_RETURN_IF_ERROR(Agree(StartEngine(), "loading the model"));
  BALLAST_RETURN_IF_ERROR(Agree(is_leader() ? StartHttp() : absl::OkStatus(), "the HTTP server"));
  return Announce();
}

absl::Status Server::ConnectControl() {
  const bool one_node = std::ranges::all_of(mpi_->node_of_rank(), [](int32_t n) { return n == 0; });
  std::unique_ptr<ControlListener> listener;
  nlohmann::json address;
  if (is_leader()) {
    auto created = ControlListener::Create(one_node ? "127.0.0.1" : "0.0.0.0");
    if (created.ok()) {
      listener = *std::move(created);
      char host[256] = "127.0.0.1";
      if (!one_node) gethostname(host, sizeof host - 1);
      std::random_device entropy;
      const uint64_t token = (uint64_t{entropy()} << 32) | entropy();
      address = {{"host", flags_.control_host.empty() ? host : flags_.control_host},
                 {"port", listener->port()},
                 {"token", token}};
    } else {
      address = {{"error", std::string(created.status().message())}};
    }
  }
  std::string text = address.dump();
  BALLAST_RETURN_IF_ERROR(mpi_->Broadcast(&text));
  address = nlohmann::json::parse(text);
  if (address.contains("error")) {
    return absl::UnavailableError(address["error"].get<std::string>());
  }
  // The leader's own rank connects like every other one.
  auto connected = std::async(std::launch::async, [&] {
    return ConnectToLeader(address["host"].get<std::string>(), address["port"].get<int>(),
                           address["token"].get<uint64_t>(), mpi_->rank(), kStartTimeoutMs);
  });
  if (is_leader()) {
    auto channels =
        listener->AcceptRanks(mpi_->size(), address["token"].get<uint64_t>(), kStartTimeoutMs);
    BALLAST_RETURN_IF_ERROR(channels.status());
    const ModelConfig& config = checkpoint_->config();
    recorder_ = std::make_unique<TraceRecorder>(
        TraceRecorder::Shape{.num_ranks = mpi_->size(),
                             .num_layers = config.num_moe_layers(),
                             .num_experts = config.gate.num_experts,
                             .top_k = config.gate.top_k});
    BALLAST_ASSIGN_OR_RETURN(
        frontend_,
        Frontend::Create({.max_pending = flags_.max_queue,
                          .request_timeout_ms = flags_.request_timeout_ms,
                          .context_tokens = config.context_tokens,
                          .vocab_size = config.vocab_size,
                          .on_end = [this](RequestEnd end) { metrics_->OnRequest(ResultOf(end)); },
                          .on_routing = [this](int rank, const RoutingFrame& f) {
                            recorder_->AddIds(
                                rank, {f.recording, f.step_begin, f.step_end, f.first, f.ids});
                          }},
                         *std::move(channels), EndJob));
  }
  BALLAST_ASSIGN_OR_RETURN(channel_, connected.get());
  return absl::OkStatus();
}

absl::Status Server::StartLeader() {
  const ModelConfig& config = checkpoint_->config();
  Leader::Options options;
  options.controller.policy = flags_.policy;
  options.controller.num_groups = config.gate.num_groups;
  options.controller.separate_kinds = flags_.windows == "separate";
  options.controller.window_tokens = flags_.window_tokens;
  options.controller.batch_tokens = flags_.batch_tokens;
  options.controller.rho = flags_.rho;
  options.controller.min_gain = flags_.min_gain;
  options.controller.rules = flags_.rules;
  options.controller.min_steps_between = flags_.min_steps_between;
  options.controller.force_every_steps = flags_.rebalance_every;
  int32_t most_slots = 0;
  for (int32_t r = 0; r < mpi_->size(); ++r) {
    most_slots = std::max(most_slots, placement_->topology().slots_on(r));
  }
  options.controller.max_incoming_per_rank = most_slots;
  BALLAST_ASSIGN_OR_RETURN(
      const auto expert, GatedMlp::Create(*kernels_, config.hidden, config.expert_inter, dtype_));
  options.copy_bytes = static_cast<int64_t>(expert->packed_bytes());
  options.copy_bytes_per_second = flags_.copy_budget_mb * 1e6;
  options.step_log = flags_.step_log;
  options.recorder = recorder_.get();
  RankObserver observer(0, mpi_->size(), config.num_moe_layers(), metrics_.get());
  BALLAST_ASSIGN_OR_RETURN(leader_,
                           Leader::Create(options, *placement_, std::move(observer), metrics_.get(),
                                          [this](std::vector<std::byte> plan) {
                                            return frontend_->BroadcastPlan(std::move(plan));
                                          }));
  return absl::OkStatus();
}

absl::Status Server::StartEngine() {
  const ModelConfig& config = checkpoint_->config();
  EngineOptions options;
  options.dtype = dtype_;
  options.split = split_;
  options.kv_bytes = static_cast<int64_t>(flags_.kv_bytes);
  options.scheduler.max_seqs = flags_.max_seqs;
  options.scheduler.max_batch_tokens = flags_.max_batch_tokens;
  options.scheduler.prefill_chunk = flags_.prefill_chunk;
  options.rebalancer.slice_bytes = flags_.migration_slice_bytes;
  options.rebalancer.plan_deadline_ms = flags_.plan_timeout_ms;
  options.chunk_bytes = flags_.migration_chunk_bytes;
  options.recorder = recorder_.get();
  EngineObserver* observer = leader_.get();
  if (!is_leader()) {
    observer_ = std::make_unique<RankObserver>(mpi_->rank(), mpi_->size(), config.num_moe_layers(),
                                               metrics_.get());
    observer = observer_.get();
  }
  BALLAST_ASSIGN_OR_RETURN(
      engine_, Engine::Create(options, *checkpoint_, *kernels_, *placement_, transport_.get(),
                              communicator_.get(), channel_.get(), observer));
  return absl::OkStatus();
}

absl::Status Server::StartHttp() {
  auto http = HttpServer::Start(
      // A thread per admitted request, and some for the endpoints that answer at once.
      {.host = flags_.host, .port = flags_.port, .threads = flags_.max_queue + 8},
      {.frontend = frontend_.get(),
       .tokenizer = *tokenizer_,
       .model_name = checkpoint_->config().name,
       .is_ready = [this] { return ready_.load() && frontend_->accepting(); },
       .placement =
           [this] {
             return HttpReply{200, leader_->PlacementJson()};
           },
       .rebalance =
           [this](const std::string&) {
             return HttpReply{200, leader_->Rebalance()};
           },
       .record =
           [this](const std::string& action, const std::string& body) {
             return AnswerRecord(recorder_.get(), action, body);
           }});
  if (!http.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--port: ", std::string(http.status().message())));
  }
  http_ = *std::move(http);
  signal_thread_ = std::thread(&Server::AwaitSignal, this);
  return absl::OkStatus();
}

absl::Status Server::Announce() {
  const int32_t mine = exporter_ != nullptr ? exporter_->port() : 0;
  std::vector<int32_t> metrics_ports(static_cast<size_t>(mpi_->size()));
  BALLAST_RETURN_IF_ERROR(
      communicator_->AllGather(placement_->epoch(), std::as_bytes(std::span(&mine, 1)),
                               std::as_writable_bytes(std::span(metrics_ports))));
  if (!is_leader()) return absl::OkStatus();
  LogInfo("serve",
          absl::StrCat("model ", checkpoint_->config().name, " in ", NameOf(dtype_), " on ",
                       mpi_->size(), " ranks (", kernels_->name, ", ", mpi_->library_version(),
                       "), ", placement_->topology().slots_on(0), " slots per rank, policy ",
                       flags_.policy, ", split ", flags_.split));
  LogInfo("serve", absl::StrCat("ready: http://", flags_.host, ":", http_->port()));
  ready_ = true;
  if (flags_.ready_file.empty()) return absl::OkStatus();
  const nlohmann::json ready = {{"pid", getpid()},
                                {"host", flags_.host},
                                {"port", http_->port()},
                                {"metrics_ports", metrics_ports}};
  const std::string unfinished = flags_.ready_file + ".new";
  std::ofstream(unfinished) << ready.dump() << "\n";
  if (std::rename(unfinished.c_str(), flags_.ready_file.c_str()) != 0) {
    LogWarning("serve", absl::StrCat("--ready-file: cannot write ", flags_.ready_file));
  }
  return absl::OkStatus();
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
  if (signal_thread_.joinable()) signal_thread_.join();
  http_.reset();
  if (is_leader()) LogInfo("serve", "stopped");
}

}  // namespace

int Serve(const ServeFlags& flags, int* argc, char*** argv) {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  SetLogLevel(flags.log_level == "debug"     ? LogLevel::kDebug
              : flags.log_level == "warning" ? LogLevel::kWarning
              : flags.log_level == "error"   ? LogLevel::kError
                                             : LogLevel::kInfo);
  auto mpi = MpiRuntime::Start(argc, argv);
  if (!mpi.ok()) {
    std::fprintf(stderr, "ballast: %s\n", std::string(mpi.status().message()).c_str());
    return kExitUsage;
  }
  SetLogRank((*mpi)->rank());

  Server server(flags, mpi->get());
  absl::Status status = server.Prepare();
  // The lowest rank that failed speaks; all leave together.
  const int failed_rank = status.ok() ? -1 : (*mpi)->size() - (*mpi)->rank();
  const int speaker = (*mpi)->size() - (*mpi)->Highest(failed_rank);
  if (speaker <= (*mpi)->size() - 1) {
    if (speaker == (*mpi)->rank()) {
      std::fprintf(stderr, "ballast: %s\n", std::string(status.message()).c_str());
    }
    (*mpi)->Finish();
    return kExitUsage;
  }
  status = server.Start();
  if (status.ok()) status = server.Run();
  if (!status.ok()) {
    if (server.speaks()) {
      std::fprintf(stderr, "ballast: rank %d: %s\n", (*mpi)->rank(),
                   std::string(status.message()).c_str());
    }
    // An orderly end needs all ranks, and one of them may be gone.
    std::fflush(nullptr);
    _exit(ExitCodeOf(status));
  }
  server.Stop();
  (*mpi)->Finish();
  return kExitOk;
}

}  // namespace ballast
