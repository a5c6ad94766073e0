// How the ranks of a server find each other and what each of them starts.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <nlohmann/json.hpp>
#include <random>

#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/status.h"
#include "deploy/commands.h"
#include "deploy/server.h"
#include "placement/placement_check.h"
#include "placement/policy.h"
#include "runtime/ranks_api.h"
#include "runtime/record_api.h"

namespace ballast {
namespace {

constexpr int64_t kNsPerMs = 1'000'000;
constexpr int kStartTimeoutMs = 60'000;
// Those that wait because others wait begin a part of a step after each other, and look at the time
// when they get a processor.
constexpr int64_t kMostGraceMs = 500;
// Under load a rank reads some megabytes per step.
constexpr int64_t kVerifyTimeoutMs = 600'000;

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

// A rank is lost, and the others cannot go on. The requests have been told; their answers get a
// moment.
void EndJob(int rank, const absl::Status& status) {
  LogError("frontend", absl::StrCat("lost rank ", rank, ": ", std::string(status.message()),
                                    "; ending the job"));
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  std::fflush(nullptr);
  _exit(kExitRetry);
}

}  // namespace

absl::Status Server::Start() {
  BALLAST_RETURN_IF_ERROR(ResumeState());
  BALLAST_RETURN_IF_ERROR(ChooseThreads());
  BALLAST_RETURN_IF_ERROR(Agree(ConnectControl(), "connecting the ranks"));
  BALLAST_RETURN_IF_ERROR(Agree(is_leader() ? StartLeader() : absl::OkStatus(), "the controller"));
  BALLAST_RETURN_IF_ERROR(Agree(StartEngine(), "loading the model"));
  BALLAST_RETURN_IF_ERROR(Agree(CompareParameters(), "comparing the parameters"));
  BALLAST_RETURN_IF_ERROR(Agree(is_leader() ? StartHttp() : absl::OkStatus(), "the HTTP server"));
  return Announce();
}

// The state of the server before, if it fits.
absl::StatusOr<ServerState> Server::ReadState() const {
  BALLAST_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags_.state_file));
  BALLAST_ASSIGN_OR_RETURN(ServerState state, ParseServerState(text));
  ServerState fresh{.model = checkpoint_->config().name,
                    .rules = flags_.controller.rules,
                    .placement = *placement_,
                    .window_load = {}};
  BALLAST_RETURN_IF_ERROR(CheckFits(state, fresh));
  BALLAST_RETURN_IF_ERROR(CheckPlacement(state.placement));
  BALLAST_ASSIGN_OR_RETURN(const auto policy, MakePolicy(flags_.policy));
  BALLAST_RETURN_IF_ERROR(policy->CheckSupport(state.placement));
  if (flags_.policy == "static" || flags_.policy == "never") {
    return absl::FailedPreconditionError(
        absl::StrCat("policy ", flags_.policy, " has a placement of its own"));
  }
  return state;
}

// The placement of the state file as JSON, or "" for a fresh one. A file that cannot be gone on
// from is put aside: somebody may have started the server with the wrong number of ranks, and its
// own state will take that place. On the leader.
absl::StatusOr<std::string> Server::TakeUpState() {
  const std::string& file = flags_.state_file;
  std::error_code unknown;
  if (!std::filesystem::exists(file, unknown)) {
    LogInfo("serve", absl::StrCat("there is no --state-file ", file, " yet: starts afresh"));
    return "";
  }
  absl::StatusOr<ServerState> state = ReadState();
  if (state.ok()) {
    window_ = {.num_tokens = state->window_tokens, .load = std::move(state->window_load)};
    LogInfo("serve", absl::StrCat("goes on from ", file, ": epoch ", state->placement.epoch(), ", ",
                                  window_.num_tokens, " tokens in the window"));
    return state->placement.ToJson();
  }
  const std::string why(state.status().message());
  const std::string aside = file + ".rejected";
  if (std::rename(file.c_str(), aside.c_str()) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--state-file: ", file, " cannot be gone on from: ", why,
                     "; and it cannot be renamed to ", aside, ": ", std::strerror(errno)));
  }
  LogWarning("serve", absl::StrCat("starts afresh, not from --state-file ", file, ", which is now ",
                                   aside, ": ", why));
  return "";
}

// Goes on from the state file where that can be done. COLLECTIVE
absl::Status Server::ResumeState() {
  absl::StatusOr<std::string> placement("");
  if (is_leader() && !flags_.state_file.empty()) placement = TakeUpState();
  BALLAST_RETURN_IF_ERROR(Agree(placement.status(), "the state file"));
  BALLAST_RETURN_IF_ERROR(mpi_->Broadcast(&*placement));
  if (placement->empty()) return absl::OkStatus();
  BALLAST_ASSIGN_OR_RETURN(placement_, Placement::FromJson(*placement));
  return absl::OkStatus();
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
    BALLAST_RETURN_IF_ERROR(MakeFrontend(*std::move(channels)));
  }
  BALLAST_ASSIGN_OR_RETURN(channel_, connected.get());
  return absl::OkStatus();
}

// What speaks to the ranks over the control channels, and what it feeds.
absl::Status Server::MakeFrontend(std::vector<std::unique_ptr<ControlChannel>> channels) {
  const ModelConfig& config = checkpoint_->config();
  recorder_ =
      std::make_unique<TraceRecorder>(TraceRecorder::Shape{.num_ranks = mpi_->size(),
                                                           .num_layers = config.num_moe_layers(),
                                                           .num_experts = config.gate.num_experts,
                                                           .top_k = config.gate.top_k});
  verification_ = std::make_unique<Verification>(
      Verification::Options{.timeout_ms = kVerifyTimeoutMs,
                            .ask = [this](uint64_t id) { return frontend_->AskToVerify(id); },
                            .serving = [this] { return frontend_->serving(); }});
  BALLAST_ASSIGN_OR_RETURN(
      frontend_,
      Frontend::Create(
          {.max_pending = flags_.max_queue,
           .request_timeout_ms = flags_.request_timeout_ms,
           .context_tokens = config.context_tokens,
           .vocab_size = config.vocab_size,
           .on_end = [this](RequestEnd end) { metrics_->OnRequest(ResultOf(end)); },
           .on_routing =
               [this](int rank, const RoutingFrame& f) {
                 recorder_->AddIds(rank, {f.recording, f.step_begin, f.step_end, f.first, f.ids});
               },
           .on_verified =
               [this](int rank, VerifiedFrame frame) {
                 verification_->OnVerified(rank, std::move(frame));
               },
           .survive_losses = flags_.on_loss == "continue",
           .silence_ms = flags_.rank_timeout_ms,
           .group = {.report_deadline_ns = flags_.step_timeout_ms * kNsPerMs,
                     .trouble_grace_ns =
                         std::min(flags_.step_timeout_ms / 5, kMostGraceMs) * kNsPerMs},
           .slots = SlotsOfRanks(),
           .node = mpi_->node_of_rank(),
           .on_lost = [this](int rank, const absl::Status& why) { OnLost(rank, why); },
           .on_moved = [this](int64_t n) { metrics_->OnRequestsMoved(n); }},
          std::move(channels), EndJob));
  return absl::OkStatus();
}

// Under the front end's lock: nothing that takes long.
void Server::OnLost(int rank, const absl::Status& why) {
  LogWarning("frontend", absl::StrCat("lost rank ", rank, ": ", std::string(why.message()),
                                      "; the others go on without it"));
}

std::vector<int32_t> Server::SlotsOfRanks() const {
  std::vector<int32_t> slots;
  for (int32_t r = 0; r < mpi_->size(); ++r) slots.push_back(placement_->topology().slots_on(r));
  return slots;
}

absl::Status Server::StartLeader() {
  const ModelConfig& config = checkpoint_->config();
  Leader::Options options;
  ControllerOptions& controller = options.loop.controller;
  controller = flags_.controller.Options();
  controller.policy = flags_.policy;
  controller.num_groups = config.gate.num_groups;
  controller.rho = flags_.rho;
  controller.force_every_steps = flags_.rebalance_every;
  controller.layers_per_plan = flags_.layers_per_plan;
  controller.max_incoming_per_rank =
      flags_.staging_experts > 0 ? flags_.staging_experts : std::ranges::max(SlotsOfRanks());
  controller.retry_from_file = true;
  BALLAST_ASSIGN_OR_RETURN(const ExpertForm expert,
                           backend_->MakeExpertForm(config.hidden, config.expert_inter, dtype_));
  options.loop.copy_bytes = static_cast<int64_t>(expert.packed_bytes);
  options.loop.copy_bytes_per_second = flags_.copy_budget_mb * 1e6;
  const double most_ms = static_cast<double>(controller.max_incoming_per_rank) *
                         static_cast<double>(options.loop.copy_bytes) /
                         (flags_.migration_bandwidth_mb * 1e3);
  if (flags_.migration_bandwidth_mb > 0.0 &&
      most_ms > static_cast<double>(flags_.plan_timeout_ms)) {
    LogWarning("serve", absl::StrCat("at --migration-bandwidth ", flags_.migration_bandwidth_mb,
                                     " the largest plan takes ", static_cast<int64_t>(most_ms),
                                     " ms, and --plan-timeout-ms is ", flags_.plan_timeout_ms));
  }
  options.window = window_;
  options.step_log = flags_.step_log;
  options.stall_deadline_ms = flags_.controller_timeout_ms;
  options.model = config.name;
  options.state_file = flags_.state_file;
  options.state_period_ms = flags_.state_every_s * 1000;
  options.recorder = recorder_.get();
  options.leave = [this](int32_t rank) {
    const absl::Status left = frontend_->Leave(rank);
    if (!left.ok()) LogWarning("serve", std::string(left.message()));
  };
  options.stay = [this](int32_t rank) {
    const absl::Status stays = frontend_->Return(rank);
    if (!stays.ok()) LogWarning("serve", std::string(stays.message()));
  };
  RankObserver observer(0, mpi_->size(), config.num_moe_layers(), metrics_.get());
  BALLAST_ASSIGN_OR_RETURN(leader_,
                           Leader::Create(options, *placement_, std::move(observer), metrics_.get(),
                                          [this](std::vector<std::byte> plan) {
                                            return frontend_->BroadcastPlan(std::move(plan));
                                          }));
  return absl::OkStatus();
}

EngineOptions Server::MakeEngineOptions() const {
  EngineOptions options;
  options.dtype = dtype_;
  options.split = split_;
  options.kv_bytes = static_cast<int64_t>(flags_.kv_bytes);
  options.scheduler.max_seqs = flags_.max_seqs;
  options.scheduler.max_batch_tokens = flags_.max_batch_tokens;
  options.scheduler.prefill_chunk = flags_.prefill_chunk;
  options.rebalancer.slice = {.slice_bytes = static_cast<int64_t>(flags_.migration_slice_bytes),
                              .bytes_per_second = flags_.migration_bandwidth_mb * 1e6,
                              .step_share = flags_.migration_share};
  options.rebalancer.plan_deadline_ms = flags_.plan_timeout_ms;
  options.chunk_bytes = flags_.migration_chunk_bytes;
  options.staging_experts = flags_.staging_experts;
  options.step_timeout_ms = flags_.step_timeout_ms;
  options.halt_timeout_ms = 2 * flags_.step_timeout_ms;
  options.verify_period_ms = flags_.verify_every_s * 1000;
  options.alive_period_ms = kAlivePeriodMs;
  options.recorder = recorder_.get();
  return options;
}

absl::Status Server::StartEngine() {
  const ModelConfig& config = checkpoint_->config();
  const EngineOptions options = MakeEngineOptions();
  EngineObserver* observer = leader_.get();
  if (!is_leader()) {
    observer_ = std::make_unique<RankObserver>(mpi_->rank(), mpi_->size(), config.num_moe_layers(),
                                               metrics_.get());
    observer = observer_.get();
  }
  BALLAST_ASSIGN_OR_RETURN(
      engine_, Engine::Create(options, *checkpoint_, backend_.get(), *placement_, transport_.get(),
                              channel_.get(), observer));
  return absl::OkStatus();
}

// To start such a job again would not help.
absl::Status Server::CompareParameters() {
  const absl::Status same = engine_->ShareChecksums();
  if (!absl::IsDataLoss(same)) return same;
  return absl::InvalidArgumentError(absl::StrCat("--model: ", std::string(same.message())));
}

std::map<std::string, std::function<HttpReply(const std::string&)>> Server::OperatorEndpoints() {
  std::map<std::string, std::function<HttpReply(const std::string&)>> endpoints = {
      {"/v1/rebalance",
       [this](const std::string&) {
         return HttpReply{200, leader_->Rebalance()};
       }},
      {"/v1/drain",
       [this](const std::string& body) {
         return AnswerDrain(
             frontend_.get(), [this](int rank) { leader_->Vacate(rank); }, body);
       }},
      {"/v1/undrain",
       [this](const std::string& body) { return AnswerUndrain(frontend_.get(), body); }}};
  for (const char* action : {"start", "stop", "status", "dump"}) {
    endpoints[absl::StrCat("/v1/record/", action)] = [this, action](const std::string& body) {
      return AnswerRecord(recorder_.get(), action, body);
    };
  }
  return endpoints;
}

absl::Status Server::StartHttp() {
  auto http = HttpServer::Start(
      // A thread per admitted request, and some for the endpoints that answer at once.
      {.host = flags_.host, .port = flags_.port, .threads = flags_.max_queue + 8},
      {.frontend = frontend_.get(),
       .tokenizer = *tokenizer_,
       .model_name = checkpoint_->config().name,
       .is_ready = [this] { return ready_.load() && frontend_->accepting(); },
       .note = [this] { return leader_->ControllerNote(); },
       .get = {{"/v1/placement",
                [this] {
                  return HttpReply{200, leader_->PlacementJson()};
                }},
               {"/v1/ranks", [this] { return AnswerRanks(*frontend_); }},
               {"/v1/verify", [this] { return AnswerVerify(verification_.get()); }}},
       .post = OperatorEndpoints()});
  if (!http.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--port: ", std::string(http.status().message()),
                                                   "; allowed: a free port, or 0 for any"));
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
                       mpi_->size(), " ranks (", backend_->kernels().name, ", ",
                       mpi_->library_version(), "), ", placement_->topology().slots_on(0),
                       " slots per rank, policy ", flags_.policy, ", split ", flags_.split));
  LogInfo("serve", absl::StrCat("ready: http://", flags_.host, ":", http_->port()));
  ready_ = true;
  if (flags_.ready_file.empty()) return absl::OkStatus();
  const nlohmann::json ready = {{"pid", getpid()},
                                {"host", flags_.host},
                                {"port", http_->port()},
                                {"metrics_ports", metrics_ports}};
  const absl::Status written = WriteFile(flags_.ready_file, ready.dump() + "\n");
  if (!written.ok()) {
    LogWarning("serve", absl::StrCat("--ready-file: ", std::string(written.message())));
  }
  return absl::OkStatus();
}

}  // namespace ballast
