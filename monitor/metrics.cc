#include "monitor/metrics.h"

#include <dirent.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <sstream>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/status.h"

namespace ballast {
namespace {

using prometheus::ClientMetric;
using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;
using prometheus::MetricFamily;
using prometheus::MetricType;

using HotTable = std::vector<HotExpert>;

// Label values, in the order of the enums.
constexpr const char* kCopyResults[] = {"applied", "failed"};
constexpr const char* kRebalanceResults[] = {"applied", "aborted", "rejected", "over_budget"};
constexpr const char* kRebalanceTriggers[] = {"threshold", "interval", "manual", "failure"};
constexpr const char* kLinks[] = {"node", "network"};
constexpr const char* kVerifyFailures[] = {"parameters", "replica_choice", "placement",
                                           "checkpoint"};
constexpr const char* kRequestResults[] = {"ok", "rejected", "cancelled", "failed"};

const Histogram::BucketBoundaries kStepBuckets = {.0005, .001, .002, .005, .01, .02, .05,
                                                  .1,    .2,   .5,   1,    2,   5};
const Histogram::BucketBoundaries kStallBuckets = {.00001, .00003, .0001, .0003, .001, .003,
                                                   .01,    .03,    .1,    .3,    1};

const Histogram::BucketBoundaries kPauseBuckets = {.001, .003, .01, .03, .1, .3, 1, 3, 10, 30};

// The second number of /proc/self/statm: pages in memory.
double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0;
  int64_t resident = 0;
  statm >> total >> resident;
  return static_cast<double>(resident * sysconf(_SC_PAGESIZE));
}

double OpenFiles() {
  DIR* directory = opendir("/proc/self/fd");
  if (directory == nullptr) return 0.0;
  double count = -3.0;  // ".", ".." and the directory itself
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count;
}

double UnixSeconds() {
  return static_cast<double>(ReadClockNs(CLOCK_REALTIME)) * 1e-9;
}

// What is read when somebody asks for it: the hot experts from an immutable table, the process from
// the kernel.
class PullCollector {
 public:
  explicit PullCollector(int32_t rank) : rank_(absl::StrCat(rank)), start_seconds_(UnixSeconds()) {}

  void SetHotExperts(std::shared_ptr<const HotTable> table) { hot_.store(std::move(table)); }

  void Collect(std::vector<MetricFamily>* out) const {
    const std::shared_ptr<const HotTable> hot = hot_.load();
    if (hot != nullptr && !hot->empty()) {
      MetricFamily family{"ballast_hot_expert_share_ratio",
                          "Share of a layer's copies that one of its hottest experts takes",
                          MetricType::Gauge,
                          {}};
      for (const HotExpert& expert : *hot) {
        family.metric.push_back(Metric(MetricType::Gauge, expert.share));
        family.metric.back().label.push_back({"layer", absl::StrCat(expert.layer)});
        family.metric.back().label.push_back({"expert", absl::StrCat(expert.expert)});
      }
      out->push_back(std::move(family));
    }
    const double cpu_seconds = static_cast<double>(ReadClockNs(CLOCK_PROCESS_CPUTIME_ID)) * 1e-9;
    const auto add = [&](const char* name, const char* help, MetricType type, double value) {
      out->push_back(MetricFamily{name, help, type, {Metric(type, value)}});
    };
    add("process_cpu_seconds_total", "Processor time of this process", MetricType::Counter,
        cpu_seconds);
    add("process_resident_memory_bytes", "Memory of this process that is resident",
        MetricType::Gauge, ResidentBytes());
    add("process_open_fds", "Open file descriptors of this process", MetricType::Gauge,
        OpenFiles());
    add("process_start_time_seconds", "When the metrics of this process began, Unix time",
        MetricType::Gauge, start_seconds_);
  }

 private:
  ClientMetric Metric(MetricType type, double value) const {
    ClientMetric metric;
    metric.label.push_back({"rank", rank_});
    (type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
    return metric;
  }

  const std::string rank_;
  const double start_seconds_;
  std::atomic<std::shared_ptr<const HotTable>> hot_;
};

// Builds metrics that all carry the rank.
class Builder {
 public:
  Builder(prometheus::Registry* registry, int32_t rank)
      : registry_(registry), rank_{{"rank", absl::StrCat(rank)}} {}

  prometheus::Family<Counter>& Counters(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Labels(rank_).Register(*registry_);
  }
  prometheus::Family<Gauge>& Gauges(const char* name, const char* help) {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(rank_).Register(*registry_);
  }
  Counter* OneCounter(const char* name, const char* help) { return &Counters(name, help).Add({}); }
  Gauge* OneGauge(const char* name, const char* help) { return &Gauges(name, help).Add({}); }
  Histogram* OneHistogram(const char* name, const char* help,
                          const Histogram::BucketBoundaries& buckets) {
    auto& family =
        prometheus::BuildHistogram().Name(name).Help(help).Labels(rank_).Register(*registry_);
    return &family.Add({}, buckets);
  }
  void Info(const char* name, const char* help, const Labels& labels) {
    Gauges(name, help).Add(labels).Set(1.0);
  }

 private:
  prometheus::Registry* registry_;
  Labels rank_;
};

double ToDouble(int64_t n) {
  return static_cast<double>(n);
}

}  // namespace

struct RankMetrics::State {
  explicit State(const RankMetricsOptions& options);

  prometheus::Registry registry;
  PullCollector pull;

  Counter* prefill_tokens;
  Counter* decode_tokens;
  std::vector<Counter*> layer_tokens;  // [num_layers]
  std::vector<Gauge*> imbalance;       // [num_layers]
  Gauge* epoch;
  std::array<Counter*, std::size(kCopyResults)> copies;
  Counter* copy_bytes;
  std::array<Counter*, std::size(kLinks)> step_bytes, expert_bytes;
  std::array<std::array<Counter*, std::size(kRebalanceTriggers)>, std::size(kRebalanceResults)>
      rebalances;
  Histogram* step_seconds;
  Histogram* stall_seconds;
  std::array<Counter*, std::size(kRequestResults)> requests;
  Counter* tokens_generated;
  Gauge* queue_depth;
  Gauge* sequences;
  Gauge* kv_bytes;
  Counter* regroupings;
  Counter* reloads;
  Histogram* pause_seconds;
  Gauge* serving;
  Gauge* ranks_serving;
  Counter* requests_moved;
  std::vector<Gauge*> last_copies;  // by rank of the job
  Counter* copies_verified;
  Counter* controller_stalls;
  Counter* state_written;
  Counter* state_failed;
  std::array<Counter*, std::size(kVerifyFailures)> verify_failures;

 private:
  void AddInfo(const RankMetricsOptions& options, Builder* build);
  void AddExperts(const RankMetricsOptions& options, Builder* build);
  void AddServing(Builder* build);
  void AddGroup(const RankMetricsOptions& options, Builder* build);
  void AddVerification(Builder* build);
  void AddLeader(Builder* build);
};

RankMetrics::State::State(const RankMetricsOptions& options) : pull(options.rank) {
  Builder build(&registry, options.rank);
  AddInfo(options, &build);
  AddExperts(options, &build);
  AddServing(&build);
  AddGroup(options, &build);
  AddVerification(&build);
  AddLeader(&build);
}

void RankMetrics::State::AddInfo(const RankMetricsOptions& options, Builder* build) {
  build->Info("ballast_build_info", "The program; always 1",
              {{"version", options.version}, {"commit", options.commit}});
  build->Info("ballast_rank_info", "This rank; always 1",
              {{"node", options.node}, {"backend", options.backend}});
  build->Info("ballast_model_info", "The model; always 1",
              {{"model", options.model},
               {"layers", absl::StrCat(options.num_layers)},
               {"experts", absl::StrCat(options.num_experts)},
               {"topk", absl::StrCat(options.top_k)}});
}

void RankMetrics::State::AddExperts(const RankMetricsOptions& options, Builder* build) {
  auto& tokens = build->Counters("ballast_tokens_routed_total",
                                 "Tokens of this rank's sequences that went through the layers");
  prefill_tokens = &tokens.Add({{"phase", "prefill"}});
  decode_tokens = &tokens.Add({{"phase", "decode"}});

  auto& per_layer = build->Counters("ballast_layer_tokens_total",
                                    "Copies of tokens that this rank's experts computed");
  auto& ratios = build->Gauges("ballast_imbalance_ratio",
                               "Largest over mean rank load of the last window; 1 is balanced");
  for (int32_t layer = 0; layer < options.num_layers; ++layer) {
    const Labels labels = {{"layer", absl::StrCat(layer)}};
    layer_tokens.push_back(&per_layer.Add(labels));
    imbalance.push_back(&ratios.Add(labels));
  }
  epoch = build->OneGauge("ballast_placement_epoch", "Epoch of the placement in force");

  auto& copy_results = build->Counters("ballast_expert_copies_total",
                                       "Copies of experts that were sent to this rank");
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i] = &copy_results.Add({{"result", kCopyResults[i]}});
  }
  copy_bytes = build->OneCounter("ballast_expert_copy_bytes_total",
                                 "Bytes of experts that were sent to this rank");
  auto& sent =
      build->Counters("ballast_bytes_sent_total",
                      "Bytes of messages from this rank to ranks of its node and of others");
  for (size_t i = 0; i < step_bytes.size(); ++i) {
    step_bytes[i] = &sent.Add({{"link", kLinks[i]}, {"what", "steps"}});
    expert_bytes[i] = &sent.Add({{"link", kLinks[i]}, {"what", "experts"}});
  }
  auto& by_result =
      build->Counters("ballast_rebalances_total", "Migration plans that came to an end");
  for (size_t i = 0; i < rebalances.size(); ++i) {
    for (size_t j = 0; j < rebalances[i].size(); ++j) {
      rebalances[i][j] =
          &by_result.Add({{"result", kRebalanceResults[i]}, {"trigger", kRebalanceTriggers[j]}});
    }
  }
  step_seconds =
      build->OneHistogram("ballast_step_duration_seconds", "Length of a step", kStepBuckets);
  stall_seconds = build->OneHistogram(
      "ballast_serving_stall_seconds",
      "Time of each step that waited for a flip or went to a migration slice", kStallBuckets);
}

void RankMetrics::State::AddServing(Builder* build) {
  auto& results = build->Counters("ballast_requests_total", "Requests that came to an end");
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i] = &results.Add({{"result", kRequestResults[i]}});
  }
  tokens_generated = build->OneCounter("ballast_tokens_generated_total", "Tokens sampled");
  queue_depth = build->OneGauge("ballast_queue_depth", "Requests that wait for admission");
  sequences = build->OneGauge("ballast_sequences_running", "Sequences in the batch");
  kv_bytes = build->OneGauge("ballast_kv_bytes_used", "Bytes of the key-value cache in use");
}

void RankMetrics::State::AddGroup(const RankMetricsOptions& options, Builder* build) {
  regroupings = build->OneCounter("ballast_regroupings_total",
                                  "Times that other ranks than before went on serving");
  reloads = build->OneCounter("ballast_expert_reloads_total",
                              "Experts whose last copy was lost, read from the checkpoint");
  pause_seconds =
      build->OneHistogram("ballast_regroup_pause_seconds",
                          "Time without a step while the ranks regrouped", kPauseBuckets);
  serving = build->OneGauge("ballast_rank_serving", "1 while this rank serves, 0 otherwise");
  serving->Set(1);
  build->OneGauge("ballast_ranks", "Ranks of the job")->Set(options.num_ranks);
  ranks_serving = build->OneGauge("ballast_ranks_serving", "Ranks that serve; on the leader");
  ranks_serving->Set(options.num_ranks);
  requests_moved = build->OneCounter("ballast_requests_moved_total",
                                     "Requests that went on at another rank; on the leader");
  auto& holders = build->Gauges("ballast_expert_last_copies",
                                "Experts, over all layers, that a rank alone holds; on the leader");
  for (int32_t r = 0; r < options.num_ranks; ++r) {
    last_copies.push_back(&holders.Add({{"holder", absl::StrCat(r)}}));
  }
}

void RankMetrics::State::AddVerification(Builder* build) {
  copies_verified = build->OneCounter("ballast_copies_verified_total",
                                      "Experts of this rank whose parameters were read again");
  auto& failures = build->Counters("ballast_verify_failures_total", "What was found wrong");
  for (size_t i = 0; i < verify_failures.size(); ++i) {
    verify_failures[i] = &failures.Add({{"what", kVerifyFailures[i]}});
  }
}

void RankMetrics::State::AddLeader(Builder* build) {
  controller_stalls =
      build->OneCounter("ballast_controller_stalls_total",
                        "Times that the controller made no progress and was given up");
  auto& writes = build->Counters("ballast_state_writes_total", "Attempts to write the state file");
  state_written = &writes.Add({{"result", "ok"}});
  state_failed = &writes.Add({{"result", "failed"}});
}

absl::StatusOr<std::unique_ptr<RankMetrics>> RankMetrics::Create(
    const RankMetricsOptions& options) {
  try {
    return std::unique_ptr<RankMetrics>(new RankMetrics(std::make_unique<State>(options)));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat("cannot register the metrics: ", e.what()));
  }
}

RankMetrics::RankMetrics(std::unique_ptr<State> state) : state_(std::move(state)) {}
RankMetrics::~RankMetrics() = default;

void RankMetrics::OnStep(const StepSample& sample) {
  State& state = *state_;
  BALLAST_CHECK(sample.layer_copies.size() == state.layer_tokens.size());
  state.prefill_tokens->Increment(ToDouble(sample.prefill_tokens));
  state.decode_tokens->Increment(ToDouble(sample.decode_tokens));
  for (size_t layer = 0; layer < state.layer_tokens.size(); ++layer) {
    state.layer_tokens[layer]->Increment(ToDouble(sample.layer_copies[layer]));
  }
  state.step_seconds->Observe(sample.seconds);
  state.stall_seconds->Observe(sample.stall_seconds);
  const LinkBytes* const links[] = {&sample.to_node, &sample.to_network};
  for (size_t i = 0; i < std::size(links); ++i) {
    state.step_bytes[i]->Increment(ToDouble(links[i]->steps));
    state.expert_bytes[i]->Increment(ToDouble(links[i]->experts));
  }
}

void RankMetrics::SetImbalance(std::span<const double> ratio) {
  BALLAST_CHECK(ratio.size() == state_->imbalance.size());
  for (size_t layer = 0; layer < ratio.size(); ++layer) state_->imbalance[layer]->Set(ratio[layer]);
}

void RankMetrics::SetPlacementEpoch(int64_t epoch) {
  state_->epoch->Set(ToDouble(epoch));
}

void RankMetrics::OnExpertCopies(CopyResult result, int64_t copies, int64_t bytes) {
  state_->copies[static_cast<size_t>(result)]->Increment(ToDouble(copies));
  state_->copy_bytes->Increment(ToDouble(bytes));
}

void RankMetrics::OnRebalance(RebalanceResult result, RebalanceTrigger trigger) {
  state_->rebalances[static_cast<size_t>(result)][static_cast<size_t>(trigger)]->Increment();
}

void RankMetrics::SetHotExperts(std::vector<HotExpert> experts) {
  state_->pull.SetHotExperts(std::make_shared<const HotTable>(std::move(experts)));
}

void RankMetrics::OnRegrouped(int64_t reloads, double pause_seconds) {
  state_->regroupings->Increment();
  state_->reloads->Increment(ToDouble(reloads));
  state_->pause_seconds->Observe(pause_seconds);
}

void RankMetrics::SetServing(bool serves) {
  state_->serving->Set(serves ? 1 : 0);
}

void RankMetrics::SetRanksServing(int64_t ranks) {
  state_->ranks_serving->Set(ToDouble(ranks));
}

void RankMetrics::OnRequestsMoved(int64_t requests) {
  state_->requests_moved->Increment(ToDouble(requests));
}

void RankMetrics::SetLastCopies(std::span<const int64_t> last_copies) {
  BALLAST_CHECK(last_copies.size() == state_->last_copies.size());
  for (size_t r = 0; r < last_copies.size(); ++r) {
    state_->last_copies[r]->Set(ToDouble(last_copies[r]));
  }
}

void RankMetrics::OnCopiesVerified(int64_t copies) {
  state_->copies_verified->Increment(ToDouble(copies));
}

void RankMetrics::OnVerifyFailures(VerifyFailure kind, int64_t failures) {
  state_->verify_failures[static_cast<size_t>(kind)]->Increment(ToDouble(failures));
}

void RankMetrics::OnControllerStalled() {
  state_->controller_stalls->Increment();
}

void RankMetrics::OnStateWritten(bool ok) {
  (ok ? state_->state_written : state_->state_failed)->Increment();
}

void RankMetrics::OnRequest(RequestResult result) {
  state_->requests[static_cast<size_t>(result)]->Increment();
}

void RankMetrics::OnTokensGenerated(int64_t tokens) {
  state_->tokens_generated->Increment(ToDouble(tokens));
}

void RankMetrics::SetQueueDepth(int64_t requests) {
  state_->queue_depth->Set(ToDouble(requests));
}
void RankMetrics::SetSequencesRunning(int64_t n) {
  state_->sequences->Set(ToDouble(n));
}
void RankMetrics::SetKvBytesUsed(int64_t bytes) {
  state_->kv_bytes->Set(ToDouble(bytes));
}

absl::StatusOr<std::string> RankMetrics::Render() const {
  try {
    std::vector<MetricFamily> families = state_->registry.Collect();
    state_->pull.Collect(&families);
    std::ostringstream text;
    prometheus::TextSerializer().Serialize(text, families);
    return text.str();
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrCat("cannot render the metrics: ", e.what()));
  }
}

}  // namespace ballast
