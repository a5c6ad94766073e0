#include "runtime/engine.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <utility>
#include <variant>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "runtime/control_frames.h"

namespace ballast {
namespace {

constexpr int kLeader = 0;
// Pause between slices when transfers are all there is to do.
constexpr long kTransferPauseNs = 200'000;
// What may wait to be sent when recorded ids are added to it.
constexpr size_t kMostUnsentIds = 32u << 20;

int64_t UnixUs() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Refuses sizes that could not be served. Whether they can be had, PlanMemory knows.
absl::Status CheckSizes(const EngineOptions& options, const ModelConfig& config) {
  const int64_t blocks = (config.context_tokens + kKvBlockTokens - 1) / kKvBlockTokens;
  const int64_t least = blocks * KvCache::BlockBytes(config, options.dtype);
  if (options.kv_bytes < least) {
    return absl::InvalidArgumentError(
        absl::StrCat("--kv-bytes is ", options.kv_bytes, ", allowed: ", least,
                     " (one sequence of the model's whole context) and more"));
  }
  // The most that a rank may have to receive in one message: all copies of a batch, and their rows.
  const int64_t row_bytes = config.hidden * static_cast<int64_t>(SizeOf(options.dtype)) + 16;
  const int64_t most_tokens = (INT32_MAX - 4096) / (config.gate.top_k * row_bytes);
  if (options.scheduler.max_batch_tokens > most_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max-batch-tokens is ", options.scheduler.max_batch_tokens,
                     ", allowed for this model: up to ", most_tokens));
  }
  return absl::OkStatus();
}

}  // namespace

MoeLayers::Options MoeOptionsOf(const EngineOptions& options, const ModelConfig& config) {
  return {.gate = config.gate,
          .num_layers = config.num_moe_layers(),
          .hidden = config.hidden,
          .expert_inter = config.expert_inter,
          .max_tokens = options.scheduler.max_batch_tokens,
          .dtype = options.dtype,
          .split = options.split,
          .timeout_ms = options.step_timeout_ms};
}

Engine::Engine(const EngineOptions& options, const Checkpoint& checkpoint, Backend* backend,
               Transport* transport, ControlChannel* channel, EngineObserver* observer)
    : options_(options),
      checkpoint_(checkpoint),
      backend_(backend),
      base_transport_(transport),
      channel_(channel),
      observer_(observer) {}

Engine::~Engine() = default;

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options,
                                                       const Checkpoint& checkpoint,
                                                       Backend* backend, const Placement& initial,
                                                       Transport* transport,
                                                       ControlChannel* channel,
                                                       EngineObserver* observer) {
  const ModelConfig& config = checkpoint.config();
  std::unique_ptr<Engine> engine(
      new Engine(options, checkpoint, backend, transport, channel, observer));
  BALLAST_RETURN_IF_ERROR(CheckSizes(options, config));
  // Before anything is loaded: all ranks of a job on devices do it together.
  BALLAST_RETURN_IF_ERROR(engine->MakeStore(initial));
  BALLAST_ASSIGN_OR_RETURN(engine->decoder_,
                           Decoder::Create(checkpoint,
                                           {.moe = MoeOptionsOf(options, config),
                                            .max_logits = options.scheduler.max_seqs},
                                           backend));
  engine->cache_ = std::make_unique<KvCache>(config, options.dtype, options.kv_bytes);
  BALLAST_RETURN_IF_ERROR(engine->cache_->Allocate(backend->kernels().memory));
  Scheduler::Options scheduler = options.scheduler;
  scheduler.context_tokens = config.context_tokens;
  scheduler.eos_tokens = config.eos_tokens;
  scheduler.vocab_size = config.vocab_size;
  engine->scheduler_ = std::make_unique<Scheduler>(scheduler, engine->cache_.get());
  Group group;
  group.member = transport->rank();
  for (int32_t r = 0; r < transport->size(); ++r) group.ranks.push_back(r);
  BALLAST_RETURN_IF_ERROR(engine->JoinGroup(std::move(group), /*last_step=*/0));
  return engine;
}

MemoryPlan Engine::memory() const {
  const Placement& placement = rebalancer_->placement();
  const int32_t blocks = placement.topology().slots_on(group_.member) * placement.num_layers();
  const size_t experts =
      static_cast<size_t>(blocks) * RoundUp(decoder_->expert_bytes(), kCacheLineBytes);
  return {.parameters = static_cast<int64_t>(decoder_->parameter_bytes()),
          .experts = static_cast<int64_t>(experts),
          .transfers = static_cast<int64_t>(store_->memory_bytes() - experts),
          .kv_cache = static_cast<int64_t>(cache_->memory_bytes()),
          .moe_layers = backend_->MoeLayersBytes(MoeOptionsOf(options_, checkpoint_.config()),
                                                 placement.topology())};
}

absl::Status Engine::MakeStore(const Placement& initial) {
  const ModelConfig& config = checkpoint_.config();
  const int32_t rank = base_transport_->rank();
  int32_t most_slots = 0;
  for (int32_t r = 0; r < base_transport_->size(); ++r) {
    most_slots = std::max(most_slots, initial.topology().slots_on(r));
  }
  const int32_t resident = initial.topology().slots_on(rank) * config.num_moe_layers();
  const int32_t staging = options_.staging_experts > 0 ? options_.staging_experts : most_slots;
  BALLAST_ASSIGN_OR_RETURN(
      const ExpertForm form,
      backend_->MakeExpertForm(config.hidden, config.expert_inter, options_.dtype));
  BALLAST_ASSIGN_OR_RETURN(auto blocks,
                           backend_->MakeBlocks(form.packed_bytes, resident + staging));
  store_ = std::make_unique<ExpertStore>(
      ExpertStore::Options{.rank = rank,
                           .num_layers = config.num_moe_layers(),
                           .num_experts = config.gate.num_experts,
                           .block_bytes = form.packed_bytes,
                           .resident_blocks = resident,
                           .staging_blocks = staging,
                           .chunk_bytes = options_.chunk_bytes,
                           .read = ReaderOf(checkpoint_, *backend_, options_.dtype)},
      base_transport_, std::move(blocks));
  verifier_ = std::make_unique<Verifier>(
      Verifier::Options{.num_layers = config.num_moe_layers(),
                        .num_experts = config.gate.num_experts,
                        .period_ns = options_.verify_period_ms * 1'000'000},
      store_.get());
  Rebalancer::Options rebalancer = options_.rebalancer;
  rebalancer.rank = rank;
  rebalancer_ = std::make_unique<Rebalancer>(
      rebalancer, store_.get(), initial,
      [this](const Placement& placement) { used_ = decoder_->moe().Use(placement, *store_); });
  return absl::OkStatus();
}

// Reads the experts that `placement` gives to this rank and that it has not got, or not whole.
// ERRORS kAborted: told to halt again; what has been read is kept
absl::Status Engine::LoadMissing(const Placement& placement) {
  BALLAST_RETURN_IF_ERROR(MendUnfit());
  for (int32_t layer = 0; layer < placement.num_layers(); ++layer) {
    for (int32_t e = 0; e < placement.num_experts(); ++e) {
      if (!placement.Hosts(layer, e, store_->rank()) || store_->Parameters(layer, e) != nullptr) {
        continue;
      }
      BALLAST_RETURN_IF_ERROR(TakeFrames());
      if (!group_inbox_.empty()) return absl::AbortedError("told to halt");
      store_->Allocate(layer, e);
      const absl::Status read = ReadExpertPatiently(layer, e);
      if (!read.ok()) {
        store_->Drop(layer, e);
        return read;
      }
    }
  }
  return absl::OkStatus();
}

// Fills the expert's block from the checkpoint. ERRORS kDataLoss: it is not what it was before
absl::Status Engine::ReadExpert(int32_t layer, int32_t expert) {
  std::byte* const block = store_->Allocate(layer, expert).data();
  BALLAST_RETURN_IF_ERROR(decoder_->LoadExpert(checkpoint_, layer, expert, block));
  return store_->Seal(layer, expert);
}

// The same; once this rank serves, what cannot be read is tried again for a while.
// ERRORS kAborted: told to halt meanwhile
absl::Status Engine::ReadExpertPatiently(int32_t layer, int32_t expert) {
  constexpr int64_t kPauseMs = 100;
  absl::Status read = ReadExpert(layer, expert);
  int64_t patience_ms = protocol_->step() == 0 ? 0 : options_.read_patience_ms;
  for (; !read.ok() && patience_ms > 0; patience_ms -= kPauseMs) {
    LogWarning("engine", absl::StrCat(std::string(read.message()), "; it is tried again"));
    observer_->OnVerified({.unreadable = 1});
    BALLAST_RETURN_IF_ERROR(TakeFrames());
    if (!group_inbox_.empty()) return absl::AbortedError("told to halt");
    std::this_thread::sleep_for(std::chrono::milliseconds(kPauseMs));
    read = ReadExpert(layer, expert);
  }
  return read;
}

// Makes everything that belongs to one generation, under the placement in force, and that this rank
// can make by itself.
absl::Status Engine::JoinGroup(Group group, int64_t last_step) {
  const Placement& placement = rebalancer_->placement();
  auto transport =
      std::make_unique<MemberTransport>(base_transport_, group.ranks, group.generation);
  auto comm = std::make_unique<Communicator>(
      transport.get(), Communicator::Options{.deadline_ms = options_.step_timeout_ms,
                                             .interrupted = [this]() -> absl::Status {
                                               BALLAST_RETURN_IF_ERROR(TakeFrames());
                                               if (group_inbox_.empty()) return absl::OkStatus();
                                               return absl::AbortedError("told to halt");
                                             }});
  BALLAST_RETURN_IF_ERROR(decoder_->moe().Halt());
  BALLAST_RETURN_IF_ERROR(store_->Regroup(group.member, transport.get(), placement));
  verifier_->Forget();
  connected_ = false;
  comm_ = std::move(comm);
  CountSent();
  transport_ = std::move(transport);
  const std::vector<int32_t>& nodes = placement.topology().node_of_rank;
  on_this_node_.clear();
  for (const int32_t node : nodes) on_this_node_.push_back(node == nodes[group.member]);
  group_ = std::move(group);
  protocol_ = std::make_unique<StepProtocol>(group_.member, last_step, rebalancer_.get(),
                                             options_.step_timeout_ms * 1'000'000);
  headers_.assign(group_.ranks.size(), {});
  rank_tokens_.assign(group_.ranks.size(), 0);
  const ModelConfig& config = checkpoint_.config();
  capture_ = std::make_unique<IdsCapture>(group_.member, config.num_moe_layers(), config.gate.top_k,
                                          TraceRecorder::IdBytes(config.gate.num_experts));
  record_open_ = false;
  decoder_->moe().TakeChoiceHash();  // of a step that not all have finished
  return LoadMissing(placement);
}

// What only all members can do together, once in a generation.
absl::Status Engine::Connect() {
  if (connected_) return absl::OkStatus();
  const Placement& placement = rebalancer_->placement();
  MoeLayers& moe = decoder_->moe();
  BALLAST_RETURN_IF_ERROR(moe.Connect(comm_.get(), group_.ranks, placement.topology()));
  BALLAST_RETURN_IF_ERROR(backend_->ConnectBlocks(comm_.get(), group_.ranks));
  BALLAST_RETURN_IF_ERROR(moe.Use(placement, *store_));
  connected_ = true;
  return absl::OkStatus();
}

absl::Status Engine::Run() {
  std::thread alive;
  if (options_.alive_period_ms > 0) alive = std::thread(&Engine::TellAlive, this);
  absl::Status status = RunSteps();
  while (stopping_ == StopKind::kNone) {
    // Only the want of others is a reason to regroup; after anything else this rank must not go on.
    if (!absl::IsAborted(status) && !absl::IsDeadlineExceeded(status) &&
        !absl::IsUnavailable(status)) {
      break;
    }
    if (group_inbox_.empty()) status = TellTrouble(status);
    if (status.ok() || !group_inbox_.empty()) status = Regroup();
    if (!status.ok()) break;
    if (stopping_ == StopKind::kNone) status = RunSteps();
  }
  ended_ = true;
  if (alive.joinable()) alive.join();
  return status;
}

absl::Status Engine::ShareChecksums() {
  BALLAST_RETURN_IF_ERROR(Connect());
  const std::span<const uint64_t> mine = store_->checksums();
  std::vector<uint64_t> all(mine.size() * group_.ranks.size());
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(rebalancer_->placement().epoch(), std::as_bytes(mine),
                                           std::as_writable_bytes(std::span(all))));
  for (size_t member = 0; member < group_.ranks.size(); ++member) {
    BALLAST_RETURN_IF_ERROR(
        store_->Learn(std::span(all).subspan(member * mine.size(), mine.size())));
  }
  return absl::OkStatus();
}

absl::Status Engine::RunSteps() {
  BALLAST_RETURN_IF_ERROR(ShareChecksums());
  while (true) {
    BALLAST_RETURN_IF_ERROR(ReadFrames());
    const Batch& batch = scheduler_->BuildBatch();
    BALLAST_RETURN_IF_ERROR(Open(batch));
    if (stopping_ != StopKind::kNone) return SendEvents();
    BALLAST_RETURN_IF_ERROR(opening_.run ? RunStep(batch) : Rest());
    BALLAST_RETURN_IF_ERROR(SendEvents());
    if (opening_.run && capture_->active()) BALLAST_RETURN_IF_ERROR(SendIds());
  }
}

absl::Status Engine::TakeFrames() {
  while (true) {
    BALLAST_ASSIGN_OR_RETURN(auto bytes, channel_->TryReceive());
    if (!bytes.has_value()) return absl::OkStatus();
    BALLAST_ASSIGN_OR_RETURN(LeaderFrame frame, ParseLeaderFrame(*bytes));
    const bool of_group = std::holds_alternative<HaltFrame>(frame.body) ||
                          std::holds_alternative<ResumeFrame>(frame.body);
    (of_group ? group_inbox_ : inbox_).push_back(std::move(frame));
  }
}

absl::Status Engine::ReadFrames() {
  BALLAST_RETURN_IF_ERROR(TakeFrames());
  if (!group_inbox_.empty()) return absl::AbortedError("told to halt");
  while (!inbox_.empty()) {
    LeaderFrame frame = std::move(inbox_.front());
    inbox_.pop_front();
    wake_seq_ = frame.wake_seq;
    if (auto* submit = std::get_if<SubmitFrame>(&frame.body)) {
      scheduler_->Add(std::move(submit->request), &events_);
    } else if (auto* cancel = std::get_if<CancelFrame>(&frame.body)) {
      scheduler_->Cancel(cancel->request_id, &events_);
    } else if (auto* plan_frame = std::get_if<PlanFrame>(&frame.body)) {
      BALLAST_ASSIGN_OR_RETURN(MigrationPlan plan, MigrationPlan::Deserialize(plan_frame->plan));
      const int64_t began = NowNs();
      rebalancer_->OnPlan(std::move(plan));
      stall_ns_ += NowNs() - began;
    } else if (const auto* verify = std::get_if<VerifyFrame>(&frame.body)) {
      verify_id_ = verify->id;
      verifier_->Ask();
    } else if (const auto* stop = std::get_if<StopFrame>(&frame.body)) {
      stop_ = stop->complete ? StopKind::kComplete : StopKind::kIncomplete;
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::Open(const Batch& batch) {
  StepProtocol::Wish wish{.num_tokens = batch.num_tokens(),
                          .num_prefill = batch.num_prefill,
                          .wake_seq = wake_seq_,
                          .last_cpu_us = last_cpu_us_,
                          .choice_hash = decoder_->moe().TakeChoiceHash(),
                          .stop = stop_};
  if (options_.recorder != nullptr) wish.record_ids = options_.recorder->ids_recording();
  const StepHeader mine = protocol_->Begin(wish);
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(rebalancer_->placement().epoch(),
                                           std::as_bytes(std::span(&mine, 1)),
                                           std::as_writable_bytes(std::span(headers_))));
  Report();
  BALLAST_ASSIGN_OR_RETURN(opening_, protocol_->Open(headers_, NowNs()));
  stopping_ = opening_.stop;
  BALLAST_RETURN_IF_ERROR(used_);
  if (opening_.num_dissenters > 0) {
    LogError("engine", absl::StrCat(opening_.num_dissenters, " ranks chose other replicas in step ",
                                    protocol_->step() - 1, " than the others: they have to go"));
    observer_->OnVerified({.dissenters = opening_.num_dissenters});
  }
  if (opening_.ended.has_value()) {
    if (opening_.ended->done == Command::kFlip) {
      copies_committed_ += opening_.ended->copies;
      stall_ns_ += opening_.ended->stall_ns;
    }
    // It may have failed because of what is in this rank's memory.
    if (opening_.ended->done == Command::kAbort) verifier_->Hurry();
    observer_->OnPlanEnded(*opening_.ended, rebalancer_->placement());
  }
  return absl::OkStatus();
}

absl::Status Engine::RunStep(const Batch& batch) {
  const int64_t began = NowNs(), cpu_began = ThreadCpuNs(), waited = comm_->wait_cpu_ns();
  const size_t events_before = events_.size();
  for (size_t r = 0; r < headers_.size(); ++r) rank_tokens_[r] = headers_[r].num_tokens;
  capture_->Begin(headers_[kLeader].record_ids, rank_tokens_);
  // What a device is to do with the layers is on its way then: it is looked at after the step.
  const bool on_device = backend_->stream() != nullptr;
  const auto between_layers = [&]() -> absl::Status {
    if (rebalancer_->busy()) {
      const int64_t slice_began = NowNs();
      rebalancer_->Slice(SliceOf::kStep);
      stall_ns_ += NowNs() - slice_began;
    }
    return on_device ? absl::OkStatus() : Verify();
  };
  BALLAST_RETURN_IF_ERROR(decoder_->Begin(batch, *cache_, between_layers));
  BALLAST_ASSIGN_OR_RETURN(const BatchOutput output, decoder_->Finish(&record_.layers));
  if (on_device) BALLAST_RETURN_IF_ERROR(Verify());
  if (capture_->active()) BALLAST_RETURN_IF_ERROR(CaptureIds(batch.num_tokens()));
  scheduler_->Finish(output, &events_);

  last_cpu_us_ = (ThreadCpuNs() - cpu_began - (comm_->wait_cpu_ns() - waited)) / 1000;
  record_.step = protocol_->step();
  record_.end_unix_us = UnixUs();
  record_.wall_us = (NowNs() - began) / 1000;
  record_.epoch = rebalancer_->placement().epoch();
  record_.num_tokens = {};
  for (const StepHeader& h : headers_) {
    record_.num_tokens[TokenKind::kPrefill] += h.num_prefill;
    record_.num_tokens[TokenKind::kDecode] += h.num_tokens - h.num_prefill;
  }
  record_.copies_committed = copies_committed_;
  record_.stall_us = stall_ns_ / 1000;
  record_.own_prefill_tokens = batch.num_prefill;
  record_.own_decode_tokens = batch.num_tokens() - batch.num_prefill;
  record_.running = scheduler_->num_running();
  record_.waiting = scheduler_->num_waiting();
  record_.kv_bytes_used = cache_->bytes_used();
  ShowLoad();
  record_.tokens_generated =
      std::count_if(events_.begin() + static_cast<std::ptrdiff_t>(events_before), events_.end(),
                    [](const TokenEvent& e) { return e.token >= 0; });
  record_open_ = true;
  copies_committed_ = 0;
  stall_ns_ = 0;
  return absl::OkStatus();
}

absl::Status Engine::CaptureIds(int32_t num_tokens) {
  for (int32_t layer = 0; layer < checkpoint_.config().num_moe_layers(); ++layer) {
    BALLAST_ASSIGN_OR_RETURN(const auto ids, decoder_->moe().Ids(layer, num_tokens));
    capture_->TakeLayer(ids);
  }
  return absl::OkStatus();
}

// For the thread that tells the leader.
void Engine::ShowLoad() {
  running_ = scheduler_->num_running();
  waiting_ = scheduler_->num_waiting();
  kv_bytes_used_ = cache_->bytes_used();
}

void Engine::TellAlive() {
  constexpr int64_t kGlanceMs = 10;
  for (int64_t passed = 0; !ended_; passed += kGlanceMs) {
    if (passed >= options_.alive_period_ms) {
      // If the leader is gone the step thread will notice.
      channel_->Send(Serialize(RankFrame{RankStatusFrame{running_, waiting_, kv_bytes_used_}}))
          .IgnoreError();
      passed = 0;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(kGlanceMs));
  }
}

void Engine::Report() {
  if (!record_open_) return;
  record_.cpu_us.clear();
  for (const StepHeader& h : headers_) record_.cpu_us.push_back(h.last_cpu_us);
  CountSent();
  record_open_ = false;
  observer_->OnStep(record_);
  record_.to_node = record_.to_network = {};
}

void Engine::CountSent() {
  for (size_t peer = 0; peer < on_this_node_.size(); ++peer) {
    SentBytes& sent = on_this_node_[peer] ? record_.to_node : record_.to_network;
    sent.steps += transport_->TakeBytesSent(static_cast<int>(peer), kTagCollective);
    sent.experts += transport_->TakeBytesSent(static_cast<int>(peer), kTagMigration);
  }
}

absl::Status Engine::Rest() {
  last_cpu_us_ = 0;
  ShowLoad();
  observer_->OnRest(scheduler_->num_running(), scheduler_->num_waiting(), cache_->bytes_used());
  if (rebalancer_->busy()) rebalancer_->Slice(SliceOf::kRest);
  if (opening_.busy || rebalancer_->busy()) {
    const timespec pause{0, kTransferPauseNs};
    nanosleep(&pause, nullptr);
    return absl::OkStatus();
  }
  // Somebody has read a frame that others have not: they have work to do in a moment.
  if (!opening_.same_wake) return absl::OkStatus();
  BALLAST_RETURN_IF_ERROR(SendEvents());
  return Idle();
}

absl::Status Engine::SendEvents() {
  if (events_.empty()) return channel_->HasUnsent() ? channel_->Flush() : absl::OkStatus();
  absl::Status status = channel_->Send(Serialize(RankFrame{EventsFrame{events_}}));
  events_.clear();
  return status;
}

absl::Status Engine::SendIds() {
  const RankFrame& frame = capture_->frame();
  // Tokens go first. A part that is left out ends the recording, which the leader notices.
  const size_t bytes = std::get<RoutingFrame>(frame.body).ids.size();
  if (bytes + channel_->unsent_bytes() > kMostUnsentIds) return absl::OkStatus();
  return channel_->Send(Serialize(frame));
}

}  // namespace ballast
