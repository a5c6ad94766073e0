#include "tests/support/cluster.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "base/random.h"
#include "base/status.h"
#include "tests/support/test_metrics.h"

namespace ballast::testing {
namespace {

// Gathers the replies to a set of requests.
class Collector {
 public:
  explicit Collector(size_t count) : replies_(count), open_(count) {}

  void Take(size_t index, const TokenEvent& event) {
    const std::lock_guard lock(mutex_);
    if (event.token >= 0) replies_[index].tokens.push_back(event.token);
    if (event.finish == FinishReason::kNone) return;
    replies_[index].finish = event.finish;
    if (--open_ == 0) all_ended_.notify_all();
  }
  bool Wait(std::chrono::seconds timeout) {
    std::unique_lock lock(mutex_);
    return all_ended_.wait_for(lock, timeout, [this] { return open_ == 0; });
  }
  std::vector<Reply> replies() {
    const std::lock_guard lock(mutex_);
    return replies_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_ended_;
  std::vector<Reply> replies_;  // guarded by mutex_
  size_t open_;                 // guarded by mutex_
};

class CollectorSink : public TokenSink {
 public:
  CollectorSink(std::shared_ptr<Collector> collector, size_t index)
      : collector_(std::move(collector)), index_(index) {}
  void OnEvent(const TokenEvent& event) override { collector_->Take(index_, event); }

 private:
  std::shared_ptr<Collector> collector_;
  size_t index_;
};

class NoObserver : public EngineObserver {
  void OnStep(const StepRecord&) override {}
  void OnPlanEnded(const Rebalancer::Outcome&, const Placement&) override {}
  void OnRest(int32_t, int32_t, int64_t) override {}
  void OnVerified(const Verified&) override {}
  void OnParked() override {}
  void OnRegrouped(const Regrouping&, const Placement&) override {}
};

// A transport whose rank can die at any message: from then on nothing of it is sent or received,
// and its connection to the leader is gone.
class MortalTransport : public Transport {
 public:
  MortalTransport(std::unique_ptr<Transport> base, ControlChannel* channel)
      : base_(std::move(base)), channel_(channel), sent_(static_cast<size_t>(base_->size())) {}

  void DieAfter(int64_t messages) { left_ = messages; }
  void CorruptCopies(int chunks) { corrupt_ = chunks; }
  void LoseCopies(int chunks) { lose_ = chunks; }
  void SlowDown(int64_t us_per_message) { delay_us_ = us_per_message; }

  // So far, by peer; on the thread that posts.
  const std::vector<SentBytes>& sent() const { return sent_; }

  int rank() const override { return base_->rank(); }
  int size() const override { return base_->size(); }
  absl::StatusOr<Handle> PostSend(int peer, int tag, std::span<const std::byte> bytes) override {
    BALLAST_RETURN_IF_ERROR(Live(1));
    if (delay_us_ > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us_));
    // Whatever the generation (member_transport.h).
    const bool copies = tag % kTagsPerGeneration == kTagMigration;
    (copies ? sent_[peer].experts : sent_[peer].steps) += static_cast<int64_t>(bytes.size());
    if (copies && TakeOne(&lose_)) return kNowhere;
    if (copies && TakeOne(&corrupt_)) const_cast<std::byte&>(bytes.back()) ^= std::byte{16};
    return base_->PostSend(peer, tag, bytes);
  }
  absl::StatusOr<Handle> PostRecv(int peer, int tag, std::span<std::byte> bytes) override {
    BALLAST_RETURN_IF_ERROR(Live(1));
    return base_->PostRecv(peer, tag, bytes);
  }
  absl::StatusOr<bool> Test(Handle handle, size_t* received) override {
    BALLAST_RETURN_IF_ERROR(Live(0));
    if (handle == kNowhere) return true;
    return base_->Test(handle, received);
  }

 private:
  absl::Status Live(int64_t messages) {
    const int64_t left = left_.load();
    if (left > messages) {
      if (left != kImmortal) left_.fetch_sub(messages);
      return absl::OkStatus();
    }
    channel_->Shutdown();
    return absl::UnavailableError("killed");
  }
  static bool TakeOne(std::atomic<int>* left) {
    if (*left == 0) return false;
    --*left;
    return true;
  }
  static constexpr int kTagsPerGeneration = 4;
  static constexpr Handle kNowhere = ~Handle{0};
  std::atomic<int> corrupt_ = 0, lose_ = 0;
  std::atomic<int64_t> delay_us_ = 0;
  static constexpr int64_t kImmortal = int64_t{1} << 62;
  std::unique_ptr<Transport> base_;
  ControlChannel* channel_;
  std::vector<SentBytes> sent_;
  std::atomic<int64_t> left_ = kImmortal;
};

}  // namespace

struct Cluster::Rank {
  std::unique_ptr<ControlChannel> channel;
  std::unique_ptr<MortalTransport> transport;
  std::unique_ptr<EngineObserver> observer;
  std::unique_ptr<Engine> engine;
  absl::Status status;
};

// Rank 0's observer: counts, then hands on to the leader.
struct Cluster::Counter : EngineObserver {
  explicit Counter(Cluster* owner) : cluster(owner) {}
  void OnStep(const StepRecord& record) override {
    ++cluster->steps_;
    cluster->prefill_tokens_ += record.num_tokens[TokenKind::kPrefill];
    cluster->decode_tokens_ += record.num_tokens[TokenKind::kDecode];
    cluster->leader_->OnStep(record);
    cluster->sent_to_ = cluster->ranks_[0]->transport->sent();
  }
  void OnPlanEnded(const Rebalancer::Outcome& outcome, const Placement& in_force) override {
    const bool applied = outcome.done == Command::kFlip;
    cluster->epoch_ = in_force.epoch();
    cluster->copies_ += applied ? outcome.copies : 0;
    ++(applied ? cluster->flips_ : cluster->aborts_);
    cluster->leader_->OnPlanEnded(outcome, in_force);
  }
  void OnRest(int32_t running, int32_t waiting, int64_t kv_bytes_used) override {
    cluster->leader_->OnRest(running, waiting, kv_bytes_used);
  }
  void OnVerified(const Verified& verified) override { cluster->leader_->OnVerified(verified); }
  void OnParked() override { cluster->leader_->OnParked(); }
  void OnRegrouped(const Regrouping& regrouping, const Placement& in_force) override {
    ++cluster->regroupings_;
    cluster->reloads_ += regrouping.reloads;
    cluster->epoch_ = in_force.epoch();
    cluster->leader_->OnRegrouped(regrouping, in_force);
    cluster->num_members_ = regrouping.group.ranks.size();
  }
  Cluster* cluster;
};

absl::StatusOr<std::unique_ptr<Cluster>> Cluster::Start(const ClusterOptions& options) {
  std::unique_ptr<Cluster> cluster(new Cluster);
  BALLAST_RETURN_IF_ERROR(cluster->Prepare(options));
  for (auto& rank : cluster->ranks_) {
    cluster->threads_.emplace_back([rank = rank.get()] { rank->status = rank->engine->Run(); });
  }
  return cluster;
}

absl::Status Cluster::Prepare(const ClusterOptions& options) {
  BALLAST_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(options.model));
  const ModelConfig& config = checkpoint_->config();
  const int n = options.num_ranks;
  const int32_t share = (config.gate.num_experts + n - 1) / n;
  const int32_t slots = options.slots_per_rank > 0 ? options.slots_per_rank
                                                   : std::min(share + 2, config.gate.num_experts);
  BALLAST_ASSIGN_OR_RETURN(const auto policy, MakePolicy(options.policy));
  BALLAST_ASSIGN_OR_RETURN(const Placement placement,
                           Placement::Contiguous(config.num_moe_layers(), config.gate.num_experts,
                                                 Topology::Uniform(n, slots, options.num_nodes),
                                                 policy->fills_spare_slots_at_start()));
  fabric_ = std::make_unique<LocalFabric>(n);
  num_members_ = static_cast<size_t>(n);
  std::vector<std::unique_ptr<ControlChannel>> leader_ends;
  for (int r = 0; r < n; ++r) {
    BALLAST_ASSIGN_OR_RETURN(auto pair, ControlChannel::MakePair());
    leader_ends.push_back(std::move(pair.first));
    auto rank = std::make_unique<Rank>();
    rank->channel = std::move(pair.second);
    rank->transport =
        std::make_unique<MortalTransport>(fabric_->MakeTransport(r), rank->channel.get());
    ranks_.push_back(std::move(rank));
  }
  const auto on_routing = [recorder = options.recorder](int rank, const RoutingFrame& f) {
    if (recorder == nullptr) return;
    recorder->AddIds(rank, {f.recording, f.step_begin, f.step_end, f.first, f.ids});
  };
  verification_ = std::make_unique<Verification>(
      Verification::Options{.ask = [this](uint64_t id) { return frontend_->AskToVerify(id); },
                            .serving = [this] { return frontend_->serving(); }});
  BALLAST_ASSIGN_OR_RETURN(
      frontend_, Frontend::Create({.context_tokens = config.context_tokens,
                                   .vocab_size = config.vocab_size,
                                   .on_routing = on_routing,
                                   .on_verified =
                                       [this](int rank, VerifiedFrame frame) {
                                         verification_->OnVerified(rank, std::move(frame));
                                       },
                                   .survive_losses = options.survive_losses,
                                   .slots = std::vector<int32_t>(static_cast<size_t>(n), slots),
                                   .node = placement.topology().node_of_rank},
                                  std::move(leader_ends), [](int, absl::Status) {}));
  BALLAST_RETURN_IF_ERROR(StartLeader(options, placement));
  return MakeEngines(options, placement);
}

absl::Status Cluster::StartLeader(const ClusterOptions& options, const Placement& placement) {
  const ModelConfig& config = checkpoint_->config();
  BALLAST_ASSIGN_OR_RETURN(metrics_, TestMetrics({.num_layers = config.num_moe_layers(),
                                                  .num_experts = config.gate.num_experts,
                                                  .top_k = config.gate.top_k,
                                                  .num_ranks = options.num_ranks}));
  Leader::Options leader;
  ControllerOptions& controller = leader.loop.controller;
  controller.policy = options.policy;
  controller.num_groups = config.gate.num_groups;
  controller.window_tokens = options.window_tokens;
  controller.min_gain = options.min_gain;
  controller.force_every_steps = options.rebalance_every;
  leader.recorder = options.recorder;
  leader.stall_deadline_ms = options.stall_deadline_ms;
  leader.model = config.name;
  leader.state_file = options.state_file;
  leader.state_period_ms = options.state_period_ms;
  if (options.make_controller) leader.loop.make_controller = options.make_controller;
  leader.leave = [this](int32_t rank) { frontend_->Leave(rank).IgnoreError(); };
  leader.stay = [this](int32_t rank) { frontend_->Return(rank).IgnoreError(); };
  controller.backoff_steps = options.backoff_steps;
  controller.retry_from_file = options.retry_from_file;
  controller.max_incoming_per_rank =
      options.staging_experts > 0 ? 0 : placement.topology().slots_on(0);
  BALLAST_ASSIGN_OR_RETURN(
      leader_,
      Leader::Create(leader, placement,
                     RankObserver(0, options.num_ranks, config.num_moe_layers(), metrics_.get()),
                     metrics_.get(), [this](std::vector<std::byte> plan) {
                       return frontend_->BroadcastPlan(std::move(plan));
                     }));
  return absl::OkStatus();
}

absl::Status Cluster::MakeEngines(const ClusterOptions& options, const Placement& placement) {
  EngineOptions engine;
  engine.dtype = options.dtype;
  engine.split = options.split;
  engine.kv_bytes = options.kv_bytes;
  engine.scheduler.max_seqs = options.max_seqs;
  engine.scheduler.max_batch_tokens = options.max_batch_tokens;
  engine.scheduler.prefill_chunk = options.prefill_chunk;
  engine.rebalancer.slice.slice_bytes = options.slice_bytes;
  engine.rebalancer.plan_deadline_ms = options.plan_deadline_ms;
  engine.chunk_bytes = options.chunk_bytes;
  engine.staging_experts = options.staging_experts;
  engine.step_timeout_ms = options.step_timeout_ms;
  engine.verify_period_ms = options.verify_period_ms;
  backend_ =
      std::make_unique<HostBackend>(options.kernels != nullptr ? *options.kernels : PlainKernels());
  for (size_t r = 0; r < ranks_.size(); ++r) {
    Rank& rank = *ranks_[r];
    if (r == 0) {
      engine.recorder = options.recorder;
      rank.observer = std::make_unique<Counter>(this);
    } else {
      engine.recorder = nullptr;
      rank.observer = std::make_unique<NoObserver>();
    }
    BALLAST_ASSIGN_OR_RETURN(
        rank.engine, Engine::Create(engine, *checkpoint_, backend_.get(), placement,
                                    rank.transport.get(), rank.channel.get(), rank.observer.get()));
  }
  return absl::OkStatus();
}

Cluster::~Cluster() {
  Stop();
}

absl::StatusOr<std::vector<Reply>> Cluster::Generate(std::vector<GenerationRequest> requests) {
  auto collector = std::make_shared<Collector>(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    BALLAST_RETURN_IF_ERROR(
        frontend_->Submit(std::move(requests[i]), std::make_shared<CollectorSink>(collector, i))
            .status());
  }
  if (!collector->Wait(std::chrono::seconds(240))) {
    return absl::DeadlineExceededError("requests without an end");
  }
  return collector->replies();
}

void Cluster::Kill(int rank, int64_t after_messages) {
  ranks_[rank]->transport->DieAfter(after_messages);
  if (after_messages < 0) ranks_[rank]->channel->Shutdown();
}

void Cluster::CorruptCopies(int rank, int chunks) {
  ranks_[rank]->transport->CorruptCopies(chunks);
}

void Cluster::LoseCopies(int rank, int chunks) {
  ranks_[rank]->transport->LoseCopies(chunks);
}

void Cluster::SlowDown(int rank, int64_t us_per_message) {
  ranks_[rank]->transport->SlowDown(us_per_message);
}

bool Cluster::AwaitMembers(size_t count) {
  for (int i = 0; i < 30'000 && num_members_ != count; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return num_members_ == count;
}

MemoryPlan Cluster::memory(int rank) const {
  return ranks_[static_cast<size_t>(rank)]->engine->memory();
}

const ExpertStore& Cluster::store(int rank) const {
  return ranks_[rank]->engine->store();
}

std::vector<absl::Status> Cluster::Stop() {
  std::vector<absl::Status> statuses;
  if (!threads_.empty()) frontend_->DrainAndStop(60'000);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  for (auto& rank : ranks_) statuses.push_back(rank->status);
  return statuses;
}

std::vector<GenerationRequest> RandomRequests(int count, int32_t vocab, int32_t longest_prompt,
                                              int32_t max_tokens, double temperature,
                                              uint64_t seed) {
  Random random(seed);
  std::vector<GenerationRequest> requests(static_cast<size_t>(count));
  for (size_t i = 0; i < requests.size(); ++i) {
    GenerationRequest& request = requests[i];
    request.prompt.resize(1 + random.Below(static_cast<uint32_t>(longest_prompt)));
    for (int32_t& token : request.prompt) {
      token = static_cast<int32_t>(random.Below(static_cast<uint32_t>(vocab)));
    }
    request.max_tokens = max_tokens;
    request.sampling.temperature = temperature;
    request.sampling.top_p = i % 2 == 0 ? 1.0 : 0.9;
    request.sampling.seed = i;
  }
  return requests;
}

}  // namespace ballast::testing
