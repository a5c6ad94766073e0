#include "runtime/engine.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <type_traits>
#include <variant>

#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "runtime/control_frames.h"

namespace ballast {
namespace {

constexpr int kLeader = 0;
// An idle rank looks up this often even if nobody speaks to it.
constexpr int kIdleWaitMs = 10'000;
// Pause between slices when transfers are all there is to do.
constexpr long kTransferPauseNs = 200'000;
// What may wait to be sent when recorded ids are added to it.
constexpr size_t kMostUnsentIds = 32u << 20;

int64_t UnixUs() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// Refuses sizes that could not be served, or not be had.
absl::Status CheckSizes(const EngineOptions& options, const ModelConfig& config) {
  const int64_t blocks = (config.context_tokens + kKvBlockTokens - 1) / kKvBlockTokens;
  const int64_t least = blocks * KvCache::BlockBytes(config, options.dtype);
  const int64_t most = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  if (options.kv_bytes < least || options.kv_bytes > most) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv-bytes is ", options.kv_bytes, ", allowed: ", least,
        " (one sequence of the model's whole context) to ", most, " (the machine's memory)"));
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

// What every rank tells all others at the opening of a step.
struct Engine::Header {
  int64_t step;
  uint64_t wake_seq;
  int64_t vote_plan_id;
  int64_t last_plan_id;     // the newest plan that has reached the rank
  int64_t command_plan_id;  // leader
  int64_t last_cpu_us;      // of the step before, outside waits
  uint32_t record_ids;      // leader: the recording that wants this step's ids; 0: none
  int32_t num_tokens;
  int32_t num_prefill;  // of these
  Vote vote;
  Command command;  // leader
  uint8_t stop;     // leader
  uint8_t busy;
};

Engine::Engine() = default;
Engine::~Engine() = default;

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    const EngineOptions& options, const Checkpoint& checkpoint, const KernelSet& kernels,
    const Placement& initial, Transport* transport, Communicator* communicator,
    ControlChannel* channel, EngineObserver* observer) {
  static_assert(std::is_trivially_copyable_v<Header>);
  const ModelConfig& config = checkpoint.config();
  std::unique_ptr<Engine> engine(new Engine);
  engine->options_ = options;
  engine->rank_ = communicator->rank();
  engine->comm_ = communicator;
  engine->channel_ = channel;
  engine->observer_ = observer;
  BALLAST_ASSIGN_OR_RETURN(
      engine->decoder_,
      Decoder::Create(checkpoint, {options.dtype, options.split}, kernels, communicator));
  BALLAST_RETURN_IF_ERROR(CheckSizes(options, config));
  engine->cache_ = std::make_unique<KvCache>(config, options.dtype, options.kv_bytes);
  Scheduler::Options scheduler = options.scheduler;
  scheduler.context_tokens = config.context_tokens;
  scheduler.eos_tokens = config.eos_tokens;
  scheduler.vocab_size = config.vocab_size;
  engine->scheduler_ = std::make_unique<Scheduler>(scheduler, engine->cache_.get());

  const int32_t slots = initial.topology().slots_on(engine->rank_);
  int32_t most_slots = 0;
  for (int32_t r = 0; r < communicator->size(); ++r) {
    most_slots = std::max(most_slots, initial.topology().slots_on(r));
  }
  engine->store_ = std::make_unique<ExpertStore>(
      ExpertStore::Options{
          .rank = engine->rank_,
          .num_layers = config.num_moe_layers(),
          .num_experts = config.gate.num_experts,
          .block_bytes = engine->decoder_->expert_bytes(),
          .resident_blocks = slots * config.num_moe_layers(),
          .staging_blocks = options.staging_experts > 0 ? options.staging_experts : most_slots,
          .chunk_bytes = options.chunk_bytes},
      transport);
  for (int32_t layer = 0; layer < config.num_moe_layers(); ++layer) {
    for (int32_t e = 0; e < config.gate.num_experts; ++e) {
      if (!initial.Hosts(layer, e, engine->rank_)) continue;
      BALLAST_RETURN_IF_ERROR(engine->decoder_->LoadExpert(
          checkpoint, layer, e, engine->store_->Allocate(layer, e).data()));
      engine->store_->Seal(layer, e);
    }
  }
  Rebalancer::Options rebalancer = options.rebalancer;
  rebalancer.rank = engine->rank_;
  engine->rebalancer_ = std::make_unique<Rebalancer>(rebalancer, engine->store_.get(), initial);
  engine->headers_.resize(static_cast<size_t>(communicator->size()));
  engine->rank_tokens_.resize(engine->headers_.size());
  engine->capture_ =
      std::make_unique<IdsCapture>(engine->rank_, config.num_moe_layers(), config.gate.top_k,
                                   TraceRecorder::IdBytes(config.gate.num_experts));
  return engine;
}

absl::Status Engine::Run() {
  while (true) {
    BALLAST_RETURN_IF_ERROR(ReadFrames());
    const Batch& batch = scheduler_->BuildBatch();
    BALLAST_RETURN_IF_ERROR(Open(batch));
    if (stopping_) return SendEvents();
    const bool work = std::any_of(headers_.begin(), headers_.end(),
                                  [](const Header& h) { return h.num_tokens > 0; });
    BALLAST_RETURN_IF_ERROR(work ? RunStep(batch) : Rest());
    BALLAST_RETURN_IF_ERROR(SendEvents());
    if (work && capture_->active()) BALLAST_RETURN_IF_ERROR(SendIds());
  }
}

absl::Status Engine::ReadFrames() {
  while (true) {
    BALLAST_ASSIGN_OR_RETURN(auto bytes, channel_->TryReceive());
    if (!bytes.has_value()) return absl::OkStatus();
    BALLAST_ASSIGN_OR_RETURN(LeaderFrame frame, ParseLeaderFrame(*bytes));
    wake_seq_ = frame.wake_seq;
    if (auto* submit = std::get_if<SubmitFrame>(&frame.body)) {
      scheduler_->Add(std::move(submit->request), &events_);
    } else if (auto* cancel = std::get_if<CancelFrame>(&frame.body)) {
      scheduler_->Cancel(cancel->request_id, &events_);
    } else if (auto* plan_frame = std::get_if<PlanFrame>(&frame.body)) {
      BALLAST_ASSIGN_OR_RETURN(MigrationPlan plan, MigrationPlan::Deserialize(plan_frame->plan));
      rebalancer_->OnPlan(std::move(plan));
    } else if (std::holds_alternative<StopFrame>(frame.body)) {
      stop_ = true;
    }
  }
}

absl::Status Engine::Open(const Batch& batch) {
  const PlanVote vote = rebalancer_->vote();
  Header mine{};
  mine.step = ++step_;
  mine.wake_seq = wake_seq_;
  mine.vote_plan_id = vote.plan_id;
  mine.vote = vote.vote;
  mine.last_plan_id = rebalancer_->last_plan_id();
  mine.last_cpu_us = last_cpu_us_;
  mine.num_tokens = batch.num_tokens();
  mine.num_prefill = batch.num_prefill;
  mine.busy = rebalancer_->busy();
  if (rank_ == kLeader) {
    mine.command_plan_id = next_command_.plan_id;
    mine.command = next_command_.command;
    mine.stop = stop_;
    if (options_.recorder != nullptr) mine.record_ids = options_.recorder->ids_recording();
    next_command_ = {};
  }
  BALLAST_RETURN_IF_ERROR(comm_->AllGather(rebalancer_->placement().epoch(),
                                           std::as_bytes(std::span(&mine, 1)),
                                           std::as_writable_bytes(std::span(headers_))));
  Report();
  for (int r = 0; r < comm_->size(); ++r) {
    if (headers_[r].step != step_) {
      return absl::InternalError(absl::StrCat("rank ", r, " opens step ", headers_[r].step,
                                              ", rank ", rank_, " step ", step_));
    }
  }
  if (aborted_.has_value()) ReportAbort();
  const Header& leader = headers_[kLeader];
  stopping_ = leader.stop != 0;
  BALLAST_ASSIGN_OR_RETURN(const Rebalancer::Outcome outcome,
                           rebalancer_->Execute({leader.command_plan_id, leader.command}));
  if (outcome.done == Command::kFlip) {
    copies_committed_ += outcome.copies;
    stall_ns_ += outcome.stall_ns;
    observer_->OnPlanEnded(outcome, rebalancer_->placement());
  } else if (outcome.done == Command::kAbort) {
    aborted_ = outcome;
  } else if (rank_ == kLeader) {
    std::vector<PlanVote> votes;
    for (const Header& h : headers_) votes.push_back({h.vote_plan_id, h.vote});
    next_command_ = rebalancer_->Judge(votes, NowNs());
  }
  return absl::OkStatus();
}

// An aborted plan has ended when every rank has received it and has nothing of it under way any
// more. Until then the controller must not send another: its messages would meet those of the old.
void Engine::ReportAbort() {
  for (const Header& h : headers_) {
    if (h.busy != 0 || h.last_plan_id < aborted_->plan_id) return;
  }
  observer_->OnPlanEnded(*aborted_, rebalancer_->placement());
  aborted_.reset();
}

absl::Status Engine::RunStep(const Batch& batch) {
  const int64_t began = NowNs(), cpu_began = ThreadCpuNs(), waited = comm_->wait_cpu_ns();
  const size_t events_before = events_.size();
  for (size_t r = 0; r < headers_.size(); ++r) rank_tokens_[r] = headers_[r].num_tokens;
  capture_->Begin(headers_[kLeader].record_ids, rank_tokens_);
  const auto between_layers = [this]() -> absl::Status {
    if (capture_->active()) capture_->TakeLayer(decoder_->last_ids());
    if (rebalancer_->busy()) {
      const int64_t slice_began = NowNs();
      rebalancer_->Slice();
      stall_ns_ += NowNs() - slice_began;
    }
    return absl::OkStatus();
  };
  BALLAST_ASSIGN_OR_RETURN(const auto logits,
                           decoder_->Forward(batch, cache_.get(), rebalancer_->table(),
                                             between_layers, &record_.layers));
  scheduler_->Finish(logits, &events_);

  last_cpu_us_ = (ThreadCpuNs() - cpu_began - (comm_->wait_cpu_ns() - waited)) / 1000;
  record_.step = step_;
  record_.end_unix_us = UnixUs();
  record_.wall_us = (NowNs() - began) / 1000;
  record_.epoch = rebalancer_->placement().epoch();
  record_.num_tokens = {};
  for (const Header& h : headers_) {
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
  record_.tokens_generated =
      std::count_if(events_.begin() + static_cast<std::ptrdiff_t>(events_before), events_.end(),
                    [](const TokenEvent& e) { return e.token >= 0; });
  record_open_ = true;
  copies_committed_ = 0;
  stall_ns_ = 0;
  return absl::OkStatus();
}

void Engine::Report() {
  if (!record_open_) return;
  record_.cpu_us.clear();
  for (const Header& h : headers_) record_.cpu_us.push_back(h.last_cpu_us);
  record_open_ = false;
  observer_->OnStep(record_);
}

absl::Status Engine::Rest() {
  last_cpu_us_ = 0;
  observer_->OnRest(scheduler_->num_running(), scheduler_->num_waiting(), cache_->bytes_used());
  if (rebalancer_->busy()) rebalancer_->Slice();
  bool busy = next_command_.command != Command::kNone || aborted_.has_value(), same_wake = true;
  for (const Header& h : headers_) {
    busy = busy || h.busy != 0;
    same_wake = same_wake && h.wake_seq == headers_[0].wake_seq;
  }
  if (busy || rebalancer_->busy()) {
    const timespec pause{0, kTransferPauseNs};
    nanosleep(&pause, nullptr);
    return absl::OkStatus();
  }
  // Somebody has read a frame that others have not: they have work to do in a moment.
  if (!same_wake) return absl::OkStatus();
  BALLAST_RETURN_IF_ERROR(SendEvents());
  return channel_->WaitReadable(kIdleWaitMs).status();
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
